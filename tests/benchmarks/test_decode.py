"""The benchmark of decoding: what its rows say, its mixes, and its small form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode  # noqa: E402
from decode_engine import CAPTURED, Arm  # noqa: E402


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


def test_the_small_form_writes_a_result_of_the_form_of_the_full_one(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert result["form"] == "smoke" and result["gate"]["kernel_relative_error"] < 1e-5
    assert result["gate"]["planted_scale_seen_as"] > 0.01
