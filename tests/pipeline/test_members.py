"""What the pools' processes count of themselves reaches every sink, now and then while the run goes on and at its end; and
whoever stays silent is warned of."""

from __future__ import annotations

import asyncio
import json

import pytest
from rich.console import Console

from weft.actors.member import STATISTICS_DEADLINE_S
from weft.pipeline.history import History
from weft.pipeline.members import PERIOD_S, SILENT_S, Members
from weft.pipeline.metrics import Metrics
from weft.pipeline.summary import print_closing, summarize


class Pool:
    """Two processes, the second of which died once and does not answer while it starts."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, 0

    async def numbers(self) -> dict[str, dict[str, float]]:
        self.asked += 1
        await asyncio.sleep(0.5)
        again = {"ready": 0.0, "answers": 0.0} if self.asked == 2 else {"ready": 1.0, "answers": 1.0, "installs": 2.0}
        first = {"deaths": 0.0, "ready": 1.0, "answers": 1.0, "installs": float(self.asked)}
        return {f"{self.name}-0": first, f"{self.name}-1": {"deaths": 1.0, **again}}


class Silent:
    """One process that does not answer in these spells, (since, until); to ask it takes the deadline then."""

    def __init__(self, spells: list[tuple[float, float]], ready: float) -> None:
        self.spells, self.ready = spells, ready
        self.clock = asyncio.get_running_loop().time

    async def numbers(self) -> dict[str, dict[str, float]]:
        if not any(since <= self.clock() < until for since, until in self.spells):
            return {"one-0": {"deaths": 0.0, "ready": 1.0, "answers": 1.0}}
        await asyncio.sleep(STATISTICS_DEADLINE_S)
        return {"one-0": {"deaths": 0.0, "ready": self.ready, "answers": 0.0}}


def warned(simulation, pool, spells, ready=1.0):
    """(when, what) was warned of a process that is silent in these spells."""
    told: list[tuple[float, str]] = []

    async def main():
        clock = asyncio.get_running_loop().time
        silent = {pool: Silent(spells, ready)}
        members = Members(silent, clock, lambda event: None, lambda text: told.append((clock(), text)))
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(members.run())
            await asyncio.sleep(spells[-1][1] + 100)
            asking.cancel()

    simulation.run_virtual(main)
    return told


def asked(simulation, folder, seconds):
    """(lines of events.jsonl about processes, gauges by name) of a run that is asked for `seconds`, and once more."""
    gauges = {}

    async def main():
        clock = asyncio.get_running_loop().time
        pools = {"samplers": Pool("sampler"), "sync": Pool("relay")}
        with Metrics(
            folder, lambda name, value, tags: gauges.setdefault(name, {}).update({tuple(tags.items()): value})
        ) as metrics:
            members = Members(pools, clock, metrics, pytest.fail)
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(members.run())
                await asyncio.sleep(seconds)
                asking.cancel()
            await members.ask()

    simulation.run_virtual(main)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "MemberCounted"], gauges


def test_every_process_is_asked_each_period_and_at_the_end_and_the_pools_at_once(simulation, tmp_path):
    lines, _ = asked(simulation, tmp_path, 3 * PERIOD_S)
    times = [PERIOD_S + 0.5, 2 * (PERIOD_S + 0.5), 3 * PERIOD_S + 0.5]
    assert sorted({line["time"] for line in lines}) == pytest.approx(times)
    for time in times:
        told = [(line["pool"], line["member"]) for line in lines if line["time"] == pytest.approx(time)]
        assert told == [("samplers", "sampler-0"), ("samplers", "sampler-1"), ("sync", "relay-0"), ("sync", "relay-1")]


def test_numbers_reach_the_gauges_under_their_pool_and_process(simulation, tmp_path):
    _, gauges = asked(simulation, tmp_path, 0.0)
    assert gauges["weft_member_installs"][("pool", "samplers"), ("member", "sampler-0")] == 1.0
    assert gauges["weft_member_deaths"][("pool", "sync"), ("member", "relay-1")] == 1.0
    assert {tuple(name for name, _ in tags) for own in gauges.values() for tags in own} == {("pool", "member")}


def test_the_summary_has_what_each_process_counted_last_and_the_last_lines_who_died(simulation, tmp_path, synthetic_run):
    asked(simulation, tmp_path, 1.5 * PERIOD_S)  # the last asking finds one that does not answer
    history = History.read(tmp_path)
    summary = summarize(synthetic_run().statistics(), history, 1.0)
    assert summary["members"]["samplers"]["sampler-0"]["installs"] == 2.0
    assert summary["members"]["sync"]["relay-1"] == {"deaths": 1.0, "ready": 0.0, "answers": 0.0, "installs": 2.0}
    with (console := Console(width=100)).capture() as captured:
        print_closing(summary, console)
    assert "died and were started again: sampler-1 1x, relay-1 1x" in captured.get()


def test_a_resumed_run_tells_of_its_own_processes_alone(simulation, tmp_path):
    asked(simulation, tmp_path, 0.0)
    with Metrics(tmp_path):
        pass
    assert History.read(tmp_path).members == {}


def test_a_process_that_stays_silent_is_warned_of_once_a_spell(simulation):
    spells = [(15.0, 15.0 + SILENT_S - PERIOD_S), (95.0, 200.0), (300.0, 500.0)]  # the first is over too soon
    told = warned(simulation, "samplers", spells)
    assert len(told) == 2, told
    for (when, text), (since, _) in zip(told, spells[1:], strict=True):
        silent = int(text.removeprefix("one-0 has not answered for ").split()[0])
        assert SILENT_S <= silent <= SILENT_S + 2 * (PERIOD_S + STATISTICS_DEADLINE_S)
        assert since - PERIOD_S <= when - silent <= since, "from when it was heard last"
        assert text.endswith(" s: code of a task that holds Python's lock stops every adapter there")


def test_what_holds_a_sampler_is_not_said_of_another_process(simulation):
    ((_, text),) = warned(simulation, "trainers", [(15.0, 100.0)])
    assert text.startswith("one-0 has not answered for ") and text.endswith(" s")


def test_a_process_that_is_not_ready_is_not_silent(simulation):
    assert warned(simulation, "samplers", [(15.0, 500.0)], ready=0.0) == []
