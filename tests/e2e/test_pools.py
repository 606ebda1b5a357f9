"""Two samplers and two trainers: who lives where, and what a death of each is to the adapters of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STEPS = 12
SHORT = ("adapters=three", f"every.num_steps={STEPS}", "every.batch_size=32", "every.eval_prompts=8", "run.checkpoint_every=2")
SEVERAL = ("cluster.samplers=2", "cluster.trainers=2", "cluster.sampler.kv_cache_gib=0.5")


def test_with_two_samplers_and_two_trainers_a_death_of_each_moves_or_rolls_back_its_own_adapters_alone(
    weft: Any, adapters: str, tmp_path: Path
) -> None:
    run = weft(tmp_path / "run", adapters, *SHORT, *SEVERAL, "cluster.dashboard_port=0")
    run.wait_until(lambda: len({step["adapter"] for step in run.steps()}) == 3, "a step of each")
    run.wait_until(lambda: {group["sampler"] for group in run.groups()} == {0, 1}, "groups of both samplers")
    run.kill("sampler-0")
    after = len(run.steps())
    run.wait_until(lambda: len(run.steps()) >= after + 6, "steps with one sampler, or both again")
    run.kill("trainer-1")
    assert run.wait() == 0, run.output()[-4000:]
    summary = run.summary()
    assert {adapter["version"] for adapter in summary["adapters"].values()} == {STEPS}
    assert summary["staleness_violations"] == 0
    assert max(step["logprob_diff"] for step in run.steps() if "logprob_diff" in step) < 1e-3
    rolled_back = {name for name, adapter in summary["adapters"].items() if adapter["rollbacks"]}
    assert len(rolled_back) <= 2, "those of the other trainer go on"
