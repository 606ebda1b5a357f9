"""The benchmark of decoding: what its rows say, its mixes, and its small form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.actors.base_model import tiny_path
from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes
from weft.actors.model import load_model
from weft.kernels.logprob import token_logprobs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode  # noqa: E402 they are no package: their folder is put on the path first
import decode_check  # noqa: E402
import decode_plot  # noqa: E402
from decode_check import Apart, check_greedy, judge, pairs_of  # noqa: E402
from decode_engine import CAPTURED, Arm, Load  # noqa: E402


class Engine:
    """A contender that answers in so many seconds."""

    def __init__(self, arm: Arm, seconds: float) -> None:
        self.arm, self.seconds = arm, seconds

    def ask(self, method: str, load: decode.Load) -> float:
        assert method == "time"
        return self.seconds * (1 + load.seed % 1000 / 1e6)


def test_retention_is_of_no_lora_and_the_ratio_of_vllms_own_kernels_in_the_same_row() -> None:
    seconds = {"no LoRA": 1.0, decode.FEW: 2.0, decode.MOST: 5.0, decode.OURS: 1.25}
    engines = {arm.name: Engine(arm, seconds[arm.name]) for arm in decode.MAIN}
    rows = list(decode.measure("main", engines, 3, 1))  # type: ignore[arg-type]
    found = {(row["contender"], row["adapters"], row["batch"], row["mix"], row["generated"]): row for row in rows}
    ours = found[decode.OURS, 64, 256, "uniform", 256]
    assert ours["retention"] == pytest.approx(0.8, abs=1e-3) and ours["ratio_to_vllm"] == pytest.approx(4.0, abs=1e-2)
    assert found[decode.OURS, 8, 256, "uniform", 256]["ratio_to_vllm"] == pytest.approx(1.6, abs=1e-2)
    assert found[decode.FEW, 8, 256, "uniform", 256]["retention"] == pytest.approx(0.5, abs=1e-3)
    assert "ratio_to_vllm" not in found[decode.FEW, 8, 256, "uniform", 256]
    assert found["no LoRA", 0, 256, "uniform", 256]["tokens_per_second"] == pytest.approx(256 * 256, rel=1e-3)


def test_an_engine_that_did_not_start_leaves_the_others_their_rows() -> None:
    engines = {arm.name: Engine(arm, 1.0) for arm in decode.MAIN if arm.name != decode.MOST}
    rows = decode.measure("main", engines, 1, 1)  # type: ignore[arg-type]
    assert {row["contender"] for row in rows} == {*engines}


def test_a_row_has_ten_turns_at_most_and_in_the_default_settings_five_at_least_where_it_is_short() -> None:
    turns = {generated: decode.turns_of(generated, decode.ROUNDS, decode.SHORTEST) for generated in (1, 64, 256)}
    assert turns[256] == decode.ROUNDS == 3 and 5 <= turns[64] <= 10 and turns[1] == 10
    assert decode.turns_of(1, 2, 192) == 10 and decode.turns_of(64, 2, 192) == 3 and decode.turns_of(64, 12, 192) == 12


KEPT = {
    "rows": [{"part": "main", "contender": "no LoRA"}]
    + [{"part": "ranks", "contender": f"{whose}, r={rank}"} for rank in (8, 64) for whose in ("vllm", "weft")],
    "gate": {"kernel_relative_error": 0.1, "ranks": {"greedy": {"weft, r=8 / vllm, r=8": 1, "weft, r=64 / vllm, r=64": 2}}},
    "profiles": {"no LoRA": 1},
}


def test_contenders_that_did_not_run_keep_what_is_there_of_them() -> None:
    arms = ["vllm, r=8", "weft, r=8"]
    new = {"part": "ranks", "contender": "weft, r=8", "batch": 64}
    done = {"gate": {"greedy": {"weft, r=8 / vllm, r=8": 3}}, "rows": [new], "profiles": {}}
    found = decode.beside(KEPT, "ranks", arms, False, done)
    assert [row for row in found["rows"] if row is not new] == [row for row in KEPT["rows"] if row["contender"] not in arms]
    assert new in found["rows"] and found["profiles"] == {"no LoRA": 1}
    assert found["gate"]["ranks"]["greedy"] == {"weft, r=8 / vllm, r=8": 3, "weft, r=64 / vllm, r=64": 2}
    assert found["gate"]["kernel_relative_error"] == 0.1
    small = decode.beside(KEPT, "ranks", arms, True, done)
    assert small["rows"] == KEPT["rows"] and small["gate"]["ranks"] == KEPT["gate"]["ranks"]
    assert small["gate"]["ranks, the base that ships"] == done["gate"]


def test_sampled_log_probabilities_are_within_the_bound_or_no_worse_than_vllms_own() -> None:
    near, far = Apart((0.01, 0.018), (0.5, 0.6)), Apart((0.03, 0.048), (0.5, 0.6))
    judge("weft", near, None)
    judge("weft", far, Apart((0.03, 0.035), (0.5, 0.6)))
    for theirs in (None, near, Apart((0.03, 0.03), (0.5, 0.6))):
        with pytest.raises(AssertionError, match="weft and the trainer"):
            judge("weft", far, theirs)


def test_adapters_that_make_no_difference_prove_nothing() -> None:
    with pytest.raises(AssertionError, match="without adapter"):
        judge("weft", Apart((0.01, 0.01), (0.019, 0.015)), None)


@pytest.mark.parametrize("part", decode.PARTS)
def test_the_gate_compares_engines_whose_adapters_are_the_same_and_every_one_of_ours(part: str) -> None:
    pairs = pairs_of([Engine(arm, 1.0) for arm in decode.PARTS[part][0]])  # type: ignore[misc]
    assert [ours.arm for ours, _ in pairs] == [arm for arm in decode.PARTS[part][0] if arm.ours]
    for ours, theirs in pairs:
        assert theirs is not None and theirs.arm.ranks == ours.arm.ranks and theirs.arm.slots and not theirs.arm.ours
    alone = [Engine(arm, 1.0) for arm in decode.PARTS[part][0] if arm.ours]
    assert all(theirs is None for _, theirs in pairs_of(alone))  # type: ignore[arg-type]


class Greedy(Engine):
    """Answers every request with these tokens; where its log-probabilities are not given, its own token has all."""

    def __init__(self, name: str, tokens: list[int], likely: dict[int, dict[int, float]]) -> None:
        super().__init__(Arm(name, 8), 0.0)
        self.tokens, self.likely = tokens, likely

    def ask(self, method: str, load: Load) -> Any:  # type: ignore[override]
        positions = [self.likely.get(at, {token: 0.0}) for at, token in enumerate(self.tokens)]
        return {"tokens": [self.tokens for _ in load.adapters], "logprobs": [positions for _ in load.adapters]}


def test_greedy_engines_may_part_where_two_tokens_are_as_good_and_nowhere_else() -> None:
    theirs = Greedy("vllm", [5, 6, 7], {1: {6: -1.0, 9: -1.1}})
    assert check_greedy(theirs, theirs, 2, 3) == {"greedy_sequences": 4, "the_same": 4, "widest_gap_where_they_part": 0.0}  # type: ignore[arg-type]
    near = Greedy("weft", [5, 9, 1], {1: {9: -1.0, 6: -1.05}})
    assert check_greedy(near, theirs, 2, 3)["widest_gap_where_they_part"] == 0.1  # type: ignore[arg-type]
    untold = Greedy("weft", [5, 9, 1], {1: {9: -1.0, 3: -1.05}})  # at most as likely as the least of those told
    assert check_greedy(untold, theirs, 2, 3)["widest_gap_where_they_part"] == 0.1  # type: ignore[arg-type]
    for likely in ({9: -0.5, 6: -1.1}, {9: -0.5, 3: -0.9}):  # told as less likely; not told at all
        with pytest.raises(AssertionError, match="part at tokens"):
            check_greedy(Greedy("weft", [5, 9, 1], {1: likely}), theirs, 2, 3)  # type: ignore[arg-type]
    noisy = Greedy("weft", [5, 9, 1], {1: {9: -1.0, 6: -1.2}})
    assert check_greedy(noisy, theirs, 2, 3, noise=0.03)["widest_gap_where_they_part"] == 0.2  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="part at tokens"):
        check_greedy(noisy, theirs, 2, 3, noise=0.02)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="part at tokens"):  # whatever the noise
        check_greedy(Greedy("weft", [5, 9, 1], {1: {9: -1.0, 6: -1.4}}), theirs, 2, 3, noise=1.0)  # type: ignore[arg-type]


class Sampled(Engine):
    """Answers with random tokens and the trainer's own log-probabilities of them; `wrong`: under the next adapter."""

    def __init__(self, arm: Arm, wrong: bool) -> None:
        super().__init__(arm, 0.0)
        self.wrong = wrong

    def ask(self, method: str, load: Load) -> Any:  # type: ignore[override]
        base = tiny_path()
        shapes = linear_shapes(json.loads((Path(base) / "config.json").read_text()))
        decoder, answer = load_model(base, torch.bfloat16, "cpu"), {"prompts": [], "tokens": [], "logprobs": []}
        for n in load.adapters:
            number = (n + self.wrong) % len(load.adapters)
            layout = SlabLayout.build(shapes, tuple(shapes), self.arm.ranks[number % len(self.arm.ranks)])
            ids = torch.randint(5, 200, (12 + load.generated,), generator=torch.Generator().manual_seed(n))
            pairs = layout.views(decode_check.random_slab(layout.numel, number + 1, "cpu"))
            with torch.no_grad():
                hidden = decoder(ids[:-1], [0, len(ids) - 1], LoraBatch.build([0, len(ids) - 1], [1.0], [pairs]))
                found, _ = token_logprobs(hidden, decoder.head, ids[1:], torch.ones(len(ids) - 1))
            answer["prompts"].append(ids[:12].tolist())
            answer["tokens"].append(ids[12:].tolist())
            answer["logprobs"].append([{t: p} for t, p in zip(ids[12:].tolist(), found[11:].tolist(), strict=True)])
        return answer


def test_the_gate_knows_an_engine_that_samples_under_the_wrong_adapters() -> None:
    arm = Arm("weft", 3, (8, 32), ours=True)
    engines = [Sampled(arm, False), Sampled(replace(arm, name="wrong"), True)]
    found = decode_check.against_trainer(engines, tiny_path(), 24, "cpu")  # type: ignore[arg-type]
    assert found["weft"].mean < 1e-3 and found["wrong"].mean > 3e-3
    judge("weft", found["weft"], None)
    with pytest.raises(AssertionError):
        judge("wrong", found["wrong"], None)


@pytest.mark.parametrize("part", decode.PARTS)
def test_every_row_names_contenders_of_its_part_that_can_serve_it(part: str) -> None:
    arms, rows = decode.PARTS[part]
    by_name = {arm.name: arm for arm in arms}
    assert len(by_name) == len(arms) and (arms[0].slots == 0 or part == "ranks")  # nothing is retained without the base alone
    for row in rows:
        assert row.batch in CAPTURED
        assert all(by_name[name].slots >= min(row.adapters, row.batch) for name in row.arms)
        assert sum(name.startswith("vllm") for name in row.arms) <= 1


def test_a_uniform_mix_gives_each_adapter_its_share_and_a_zipf_draw_does_not() -> None:
    even = Counter(decode.Row(64, 256, ()).load(0).adapters)
    assert set(even.values()) == {4} and len(even) == 64
    skewed = Counter(decode.Row(64, 256, (), zipf=True).load(0).adapters)
    assert skewed[0] > 4 * skewed[30] and sum(skewed.values()) == 256


def test_the_picture_has_each_row_beside_its_own_rivals(tmp_path: Path) -> None:
    shutil.copy(ROOT / "benchmarks" / "results" / "decode-h200.json", tmp_path / "decode.json")
    decode.redraw(tmp_path / "decode.json")
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    groups = decode_plot.cases(json.loads((tmp_path / "decode.json").read_text())["rows"])
    assert groups
    for beside in groups.values():
        ours, theirs, base = (beside[name] for name in ("ours", "vLLM's own kernels", "without LoRA"))
        assert round(theirs["median_s"] / ours["median_s"], 2) == ours["ratio_to_vllm"]
        assert round(base["median_s"] / ours["median_s"], 3) == ours["retention"]


def test_the_small_form_writes_a_result_of_the_form_of_the_full_one(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert result["form"] == "smoke" and result["gate"]["kernel_relative_error"] < 1e-5
    assert result["gate"]["planted_scale_seen_as"] > 0.01
