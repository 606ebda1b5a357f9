"""The training step's benchmark: its arithmetic, its gate, and that it runs where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_step

    return train_step


def test_the_ceiling_is_that_of_the_arithmetic_that_no_step_avoids(train_step) -> None:
    """Qwen3-4B: 18.1 GFLOP a token at 2,048 tokens a row, 16.7 at 512, and 1.2 % for rank 32 on all linears."""
    cases = train_step.CASES
    for name, wanted in (("N=1 S=2048", 18.1e9), ("N=1 S=512", 16.7e9)):
        assert train_step.flop_per_token(cases[name], train_step.QWEN3_4B) == pytest.approx(1.012 * wanted, rel=0.005)


def test_the_gate_closes_for_a_gradient_that_is_wrong(train_step, monkeypatch: pytest.MonkeyPatch) -> None:
    import step_check
    import torch

    right = step_check._gradients

    def wrong(decoder, adapters, chosen, uneven=False):
        gradients = right(decoder, adapters, chosen, uneven)
        if len(chosen) > 1 and decoder.head.dtype == torch.float32:
            gradients[2][: len(gradients[2]) // 10] = 0  # a tenth of one adapter is skipped
        return gradients

    monkeypatch.setattr(step_check, "_gradients", wrong)
    with pytest.raises(AssertionError, match="joint against solo"):
        step_check.check(torch.device("cpu"))


def test_it_runs_on_a_cpu_keeps_what_did_not_run_and_draws_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--smoke", "--no-peft", "--learning", "0", "--runs", "1"]
    for more in ([], ["--keep", "--no-solo"]):
        done = subprocess.run([*command, "--output", str(path), *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(path.read_text())
    runs = {row["contender"]: row["run"] for row in result["rows"]}
    assert runs == {"weft": 1, "base without LoRA": 1, "weft, one adapter at a time": 0}
    assert len(result["runs"]) == 2 and result["gate"]["joint_against_solo"] < 1e-2
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    assert path.with_suffix(".png").stat().st_size > 1000
