from __future__ import annotations

import asyncio

import pytest

from weft.configs.schema import AdapterConfig
from weft.pipeline.adapter import LEGAL, Adapter, Progress
from weft.pipeline.events import Phase


def in_loop(test):
    """An adapter's futures belong to a loop."""

    async def main():
        test(Adapter(AdapterConfig(name="a"), 0.0))

    asyncio.run(main())


def test_only_legal_transitions_are_possible():
    def check(adapter):
        for before in Phase:
            for after in Phase:
                adapter.phase = before
                if after in LEGAL[before]:
                    adapter.enter(after)
                    assert adapter.phase is after
                else:
                    with pytest.raises(AssertionError, match=f"a: {before} -> {after}"):
                        adapter.enter(after)

    in_loop(check)


def test_an_end_is_for_good_and_every_other_phase_may_fail():
    for phase in Phase:
        assert (not LEGAL[phase]) == phase.ended
        assert phase.ended or Phase.FAILED in LEGAL[phase]


def test_every_phase_can_be_reached():
    reached = {Phase.JOINING}
    for _ in Phase:
        reached |= {after for before in reached for after in LEGAL[before]}
    assert reached == set(Phase)


def test_the_first_fault_counts_and_leaving_is_none():
    def check(adapter):
        adapter.interrupt(None)
        assert adapter.leaving and adapter.interrupted.done()
        adapter.raise_fault()
        adapter.interrupt(ValueError("first"))
        adapter.interrupt(ValueError("second"))
        with pytest.raises(ValueError, match="first"):
            adapter.raise_fault()

    in_loop(check)


def test_a_new_lineage_forgets_faults_and_remembers_that_it_is_to_leave():
    def check(adapter):
        adapter.interrupt(ValueError("its trainer died"))
        adapter.begin_lineage(Progress(lineage=1, version=4))
        adapter.raise_fault()
        assert not adapter.interrupted.done()
        assert str(adapter.ref) == "a/1/4"
        adapter.interrupt(None)
        adapter.begin_lineage(Progress(lineage=2, version=4))
        assert adapter.interrupted.done()

    in_loop(check)


def test_a_step_counts_once_everywhere():
    def check(adapter):
        adapter.take_step(0.5, 100, 160, [0, 1, 0])
        adapter.take_step(0.75, 50, 0, [0, 0])
        statistics = adapter.statistics(rollouts_in_flight=3)
        assert (statistics.version, statistics.rewards, statistics.reward) == (2, (0.5, 0.75), 0.75)
        assert (statistics.tokens_sampled, statistics.tokens_trained) == (150, 160)
        assert (statistics.staleness, statistics.max_staleness_seen) == (0, 1)
        assert adapter.progress.prompts == 2 * adapter.config.groups_per_step

    in_loop(check)
