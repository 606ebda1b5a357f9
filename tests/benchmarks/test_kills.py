"""benchmarks/kills.py: what counts as a pause, and where the longest one is seen."""

from __future__ import annotations

import json
import random
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def kills(load: Any) -> ModuleType:
    """The module."""
    module: ModuleType = load("kills")
    return module


def groups(**times: list[float]) -> list[dict[str, Any]]:
    """Groups of each adapter that ended then, in that order."""
    made = [{"adapter": name, "at": at, "sampler": 0} for name, each in times.items() for at in each]
    return sorted(made, key=lambda group: group["at"])


def test_a_pause_counts_if_it_touches_the_time_of_the_kill_and_no_other_does(kills: ModuleType) -> None:
    times = [0.0, 50.0, 51.0, 58.0, 59.0, 90.0]
    assert kills.longest_pause(times, 52.0, 55.0) == 7.0, "the kill is within it"
    assert kills.longest_pause(times, 57.0, 58.5) == 7.0, "it began in it"
    assert kills.longest_pause(times, 50.5, 52.0) == 7.0, "it ended in it"
    assert kills.longest_pause(times, 50.1, 50.9) == 1.0
    assert kills.longest_pause(times, 0.0, float("inf")) == 50.0


def test_no_pause_of_one_adapter_is_hidden_by_what_the_others_go_on_with(kills: ModuleType) -> None:
    busy = [number / 10 for number in range(1000)]
    told = kills.pauses(groups(busy=busy, waits=[10.0, 60.0, 61.0], lived=[10.0, 40.0]), 20.0, 30.0, ["lived"])
    assert told["together"] == pytest.approx(0.1)
    assert (told["any"], told["of"], told["lived_there"]) == (50.0, "waits", 30.0)


def test_an_adapter_that_made_its_last_group_before_the_kill_paused_for_nothing(kills: ModuleType) -> None:
    told = kills.pauses(groups(gone=[1.0, 2.0], stays=[1.0, 9.0, 11.0]), 5.0, 10.0)
    assert (told["any"], told["of"]) == (8.0, "stays")


def test_the_longest_pause_of_all_is_never_longer_than_that_of_one(kills: ModuleType) -> None:
    chance = random.Random(0)
    for _ in range(100):
        times = {name: [chance.uniform(0, 100) for _ in range(chance.randint(2, 30))] for name in "abc"}
        every = groups(**{name: [0.0, *each, 100.0] for name, each in times.items()})
        began = chance.uniform(0, 100)
        told = kills.pauses(every, began, began + 5)
        assert 0 < told["together"] <= told["any"] <= 100


def test_what_a_broadcast_holds_up_is_what_has_been_syncing_for_long_enough(
    kills: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills.time, "time", lambda: 100.0)
    ago = {"short": kills.HOLD_S / 2, "long": kills.HOLD_S * 2, "other": kills.HOLD_S * 2}
    phases = [{"adapter": name, "phase": "syncing", "at": 100.0 - seconds} for name, seconds in ago.items()]
    assert kills.held_up(phases, ["short", "long"]) == {"long"}
    assert kills.held_up([*phases, {"adapter": "long", "phase": "sampling", "at": 99.9}], ["short", "long"]) == set()


def test_a_file_is_read_on_from_where_it_was_left_and_never_half_a_line(kills: ModuleType, tmp_path: Any) -> None:
    run = object.__new__(kills.Run)
    run.folder, run._read = tmp_path, {}
    assert run.lines("metrics.jsonl") == []
    lines = [json.dumps({"step": step}) + "\n" for step in range(40)]
    text, chance = "".join(lines), random.Random(1)
    while text:
        cut = chance.randint(0, 30)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(text[:cut])
        text = text[cut:]
        written = (tmp_path / "metrics.jsonl").read_text().count("\n")
        assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(written))
    assert len(run.lines("metrics.jsonl")) == 40


def test_the_next_kill_waits_for_a_group_of_every_adapter_that_makes_any(
    kills: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = object.__new__(kills.Run)
    run.folder, run._read = tmp_path, {}
    phases = {"a": "sampling", "b": "training", "c": "finished"}
    script = [
        [{"event": "PhaseChanged", "adapter": name, "phase": phase, "at": 1.0} for name, phase in phases.items()],
        [{"event": "GroupSampled", "adapter": name, "at": 9.0} for name in phases],
        [{"event": "GroupSampled", "adapter": "a", "at": 11.0}],
        [{"event": "GroupSampled", "adapter": "b", "at": 12.0}],
    ]
    monkeypatch.setattr(kills.time, "time", lambda: 10.0)
    seen: list[bool] = []

    def wait_until(condition: Any, what: str) -> None:
        for lines in script:
            with (tmp_path / "events.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            seen.append(condition())

    monkeypatch.setattr(run, "wait_until", wait_until, raising=False)
    run.wait_groups()
    assert seen == [False, False, False, True]
