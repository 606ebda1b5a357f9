"""trace.json loads in ui.perfetto.dev whenever it is read, and shows who did what when."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from weft.configs.schema import RunConfig, TrainerConfig
from weft.pipeline.events import Event, GroupSampled, LaunchEnded, Phase, PhaseChanged, Synced
from weft.pipeline.history import read_lines
from weft.pipeline.interfaces import Pools
from weft.pipeline.metrics import Metrics
from weft.pipeline.run import Pipeline
from weft.pipeline.trace import FIRST_ROW, Marks, Trace, write_trace


def loaded(text: str) -> list[dict]:
    """As the viewer reads it: the closing bracket may be missing."""
    return json.loads(text if text.rstrip().endswith("]") else text + "]")


def records(folder: Path) -> list[dict]:
    return loaded((folder / "trace.json").read_text())


def rows(found: list[dict]) -> dict[str, list[dict]]:
    """The slices of each row by the row's name, in order of time. No two rows have one name."""
    names = {(r["pid"], r["tid"]): r["args"]["name"] for r in found if r["name"] == "thread_name"}
    assert len(set(names)) == len(names) and min(number for _, number in names) >= FIRST_ROW
    slices = defaultdict(list)
    for record in found:
        if record["ph"] == "X":
            slices[names[record["pid"], record["tid"]]].append(record)
    return {name: sorted(own, key=lambda r: (r["ts"], r["dur"])) for name, own in slices.items()}


def end(record: dict) -> int:
    return record["ts"] + record.get("dur", 0)


def check(found: list[dict]) -> None:
    """Whole microseconds, ends that never fall in the file, and rows whose slices follow each other."""
    timed = [record for record in found if record["ph"] != "M"]
    assert all(isinstance(r["ts"], int) and r["ts"] >= 0 and isinstance(r.get("dur", 0), int) for r in timed)
    assert all(record["dur"] >= 0 for record in timed if record["ph"] == "X")
    assert all(end(one) <= end(next_one) for one, next_one in pairwise(timed))
    for name, own in rows(found).items():
        assert all(end(one) <= next_one["ts"] for one, next_one in pairwise(own)), name


@pytest.fixture
def two(simulation, memory_folder):
    """(folder, events, records) of two adapters, one on-policy, on simulated pools with evaluations."""
    world = simulation.World(random.Random(3), capacity=8)
    configs = [
        simulation.adapter_config("a", max_staleness=0, num_steps=12, eval_prompts=4),
        simulation.adapter_config("b", max_staleness=2, num_steps=9),
    ]
    outcome = simulation.simulate(world, memory_folder / "run", configs)
    with Metrics(memory_folder) as metrics, Trace(memory_folder / "trace.json") as trace:
        for event in outcome.events:
            metrics(event)
            trace(event)
    return memory_folder, outcome.events, records(memory_folder)


@pytest.mark.parametrize("seed", range(20))
def test_slices_of_a_row_follow_each_other_whatever_happens(simulation, memory_folder, seed):
    world, configs = simulation.random_world(seed)

    async def disturb(running):
        chance = random.Random(seed)
        for _ in range(3):
            await world.pause(10)
            await chance.choice([running.samplers.process, running.trainers.process]).die()

    outcome = simulation.simulate(world, memory_folder, configs, disturb)
    write_trace(memory_folder / "trace.json", outcome.events)
    check(records(memory_folder))


def test_every_step_has_its_training_and_its_sync(two):
    folder, _, found = two
    slices = rows(found)
    synced = {
        (r["name"], r["args"]["lineage"], r["args"]["version"]) for n, own in slices.items() if n[:4] == "sync" for r in own
    }
    steps = list(read_lines(folder / "metrics.jsonl"))
    assert len(steps) == 12 + 9
    for step in steps:
        own = [r for r in slices[step["adapter"]] if r["args"] == {"lineage": step["lineage"], "step": step["step"]}]
        (training,) = [r for r in own if r["name"] == "training"]
        assert training["dur"] == pytest.approx(1e6 * step["time/train"], abs=2)
        assert (step["adapter"], step["lineage"], step["step"]) in synced
        launches = [r for r in slices["trainer 0"] if (r["ts"], end(r)) == (training["ts"], end(training))]
        assert len(launches) == 1 and step["adapter"] in launches[0]["name"].split(" + ")
    assert ("a", 0, 0) in synced and ("b", 0, 0) in synced, "version 0 is installed too"


def test_rollouts_training_and_syncs_of_two_adapters_overlap(two):
    slices = rows(two[2])

    def overlap(one: list[dict], other: list[dict]) -> int:
        return sum(max(min(end(a), end(b)) - max(a["ts"], b["ts"]), 0) for a in one for b in other)

    for one, other in (("a", "b"), ("b", "a")):
        training = [record for record in slices[one] if record["name"] == "training"]
        assert overlap(training, slices[f"{other} · rollouts"]) > 0
        syncing = [record for record in slices[one] if record["name"] == "syncing"]
        assert overlap(syncing, slices[f"{other} · rollouts"]) > 0
    own = [record for record in slices["a"] if record["name"] == "training"]
    assert overlap(own, slices["a · rollouts"]) == 0, "on-policy: nothing samples while its adapter trains"


def test_each_group_is_on_a_row_of_its_sampler_and_no_row_is_spare(two):
    _, events, found = two
    groups = [event for event in events if isinstance(event, GroupSampled)]
    drawn = [record for name, own in rows(found).items() if name.startswith("sampler 0") for record in own]
    told = sorted((g.adapter, round(1e6 * g.start), round(1e6 * g.time), g.tokens) for g in groups)
    assert sorted((r["name"], r["ts"], end(r), r["args"]["tokens"]) for r in drawn) == told
    changes = sorted([(round(1e6 * g.start), 1) for g in groups] + [(round(1e6 * g.time), -1) for g in groups])
    most = max(sum(by for _, by in changes[: i + 1]) for i in range(len(changes)))
    assert sum(name.startswith("sampler 0") for name in rows(found)) == most


def test_counters_tell_the_samplers_load_and_each_steps_staleness(two):
    folder, events, found = two
    counted = [(r["ts"], r["args"]["rollouts"]) for r in found if r["ph"] == "C" and r["name"] == "rollouts in flight"]
    assert counted[-1][1] == 0 and max(value for _, value in counted) >= 8
    for group in (event for event in events if isinstance(event, GroupSampled)):
        at = round(1e6 * group.start)
        assert [value for time, value in counted if time <= at][-1] >= group.rollouts
    for name in ("a", "b"):
        told = [r["args"]["steps"] for r in found if r["ph"] == "C" and r["name"] == f"staleness {name}"]
        assert told == [line["staleness/max"] for line in read_lines(folder / "metrics.jsonl") if line["adapter"] == name]


def test_it_loads_after_every_event_and_holds_no_more_memory_for_a_longer_run(tmp_path, synthetic_run):
    held = []
    for steps in (3, 30):
        path = tmp_path / f"{steps}.json"
        trace = Trace(path)
        for number, event in enumerate(synthetic_run(num_steps=steps).events()):
            trace(event)
            if steps == 3 or number % 100 == 0:
                loaded(path.read_text())
        trace.close()
        check(loaded(path.read_text()))
        held.append(len(trace._rows) + sum(map(len, trace._marks._lanes.values())) + len(trace._marks._adapters))
    assert held[1] <= held[0] + 8, "rows come and go with what is under way"


@pytest.mark.parametrize("seed", range(30))
def test_what_a_kill_cut_anywhere_is_gone_on_with_in_the_same_rows(tmp_path, synthetic_run, seed):
    path = tmp_path / "trace.json"
    with Trace(path) as trace:
        for event in synthetic_run(num_steps=2).events():
            trace(event)
    whole, before = path.read_bytes(), records(tmp_path)
    kept = random.Random(seed).randrange(len(whole))
    path.write_bytes(whole[:kept])
    with Trace(path) as trace:
        for event in synthetic_run(num_steps=2, seed=1).events():
            trace(event)
    found = records(tmp_path)
    check(found)
    text = whole[:kept].decode()
    survived = max(text.count("\n") - 2, 0)  # whole lines after the bracket, of which the newest may be cut short
    assert found[:survived] == before[:survived]
    old, new = rows(before), rows(found)
    assert len(new["letters"]) >= len(old["letters"]), "one row an adapter, not one a session"
    assert sum(record["name"] == "resumed" for record in found) == (survived > 0)


def test_a_file_that_was_closed_is_gone_on_with(tmp_path, synthetic_run):
    for _ in range(3):
        with Trace(tmp_path / "trace.json") as trace:
            for event in synthetic_run(num_steps=2).events():
                trace(event)
    found = records(tmp_path)
    check(found)
    assert sum(record["name"] == "resumed" for record in found) == 2
    assert sum(r["name"] == "training" for r in rows(found)["letters"]) == 6


def test_a_window_holds_what_touches_it_and_names_only_its_rows(tmp_path, two):
    _, events, found = two
    last = max(map(end, (record for record in found if record["ph"] != "M"))) / 1e6
    write_trace(tmp_path / "trace.json", events, last / 3, last / 2)
    window = records(tmp_path)
    check(window)
    kept = [record for record in window if record["ph"] == "X"]
    assert 0 < len(kept) < sum(record["ph"] == "X" for record in found)
    assert all(end(record) >= last / 3 * 1e6 and record["ts"] <= last / 2 * 1e6 for record in kept)
    whole = [
        record for record in found if record["ph"] == "X" and end(record) >= last / 3 * 1e6 and record["ts"] <= last / 2 * 1e6
    ]
    assert [(r["name"], r["ts"], r["dur"]) for r in kept] == [(r["name"], r["ts"], r["dur"]) for r in whole]
    named = {record["tid"] for record in window if record["name"] == "thread_name"}
    assert named == {record["tid"] for record in window if record["ph"] in "Xi"}


def test_launches_of_two_trainers_are_on_rows_of_their_own(tmp_path):
    events = [
        LaunchEnded(2.0, 2.0, {"a": 5}, 0),
        LaunchEnded(3.0, 2.5, {"b": 5, "c": 7}, 1),
        LaunchEnded(4.0, 2.0, {"a": 5}, 0),
    ]
    write_trace(tmp_path / "trace.json", events)
    slices = rows(records(tmp_path))
    assert [(r["ts"], r["dur"]) for r in slices["trainer 0"]] == [(0, 2_000_000), (2_000_000, 2_000_000)]
    assert slices["trainer 1"][0]["args"] == {"adapters": 2, "tokens": 12}


def test_what_is_under_way_at_the_end_is_ended():
    marks = Marks()
    assert not list(marks.take(PhaseChanged(1.0, "a", Phase.SYNCING, 0, 4)))
    list(marks.take(Synced(1.5, "a", 0, 4, 0.5, 0.1, 0.2)))
    (mark,) = marks.finish()
    assert (mark.name, mark.start, mark.end, mark.args["version"]) == ("syncing", 1_000_000, 1_500_000, 4)


def test_rounding_never_lets_two_slices_of_a_row_overlap(tmp_path):
    chance, now, events = random.Random(0), 0.0, []
    for _ in range(2_000):
        seconds = math.exp(chance.uniform(-12, 2))
        events.append(LaunchEnded(now + seconds, seconds, {"a": 1}, 0))
        now += seconds
    write_trace(tmp_path / "trace.json", events)
    check(records(tmp_path))
    assert list(rows(records(tmp_path))) == ["trainer 0"]


def test_all_times_are_of_the_clock_that_the_pipeline_is_given(simulation, memory_folder):
    def last(times: int) -> float:
        events: list[Event] = []

        async def main() -> None:
            now = asyncio.get_running_loop().time
            made = simulation.Simulation(simulation.World(random.Random(0), spread=False), memory_folder / str(times))
            pools = Pools(made.samplers, made.trainers, made.sync)
            settings = RunConfig(dir=str(memory_folder / f"run-{times}"))
            pipeline = Pipeline(settings, TrainerConfig(), pools, [events.append], lambda: times * now())
            await pipeline.run([simulation.adapter_config("a")])

        simulation.run_virtual(main)
        write_trace(memory_folder / "trace.json", events)
        return max(map(end, (record for record in records(memory_folder) if record["ph"] == "X")))

    assert last(3) == pytest.approx(3 * last(1))
