from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.pipeline.staleness import StalenessError, StalenessGate, oldest_version, staleness
from weft.transport.messages import UNSAMPLED, AdapterRef, Group, Sample


def group(*versions, ref_version=0):
    samples = tuple(
        Sample(np.zeros(len(own), np.int32), np.array(own, np.int32), np.zeros(len(own), np.float32), 0.0) for own in versions
    )
    return Group(AdapterRef("a", 0, ref_version), 7, samples)


@given(per_step=st.integers(1, 5), bound=st.integers(0, 4), rounds=st.lists(st.integers(1, 3), max_size=8))
def test_places_taken_never_exceed_the_bound(per_step, bound, rounds):
    async def main():
        gate = StalenessGate(per_step, bound)
        admitted = 0

        async def admit_all():
            nonlocal admitted
            while True:
                await gate.admit()
                admitted += 1
                assert gate.statistics().taken <= gate.statistics().places == (bound + 1) * per_step

        async with asyncio.TaskGroup() as tasks:
            admitting = [tasks.create_task(admit_all()) for _ in range(2)]
            for turns in rounds:
                for _ in range(turns):
                    await asyncio.sleep(0)
                if gate.statistics().taken >= per_step:
                    gate.release(per_step)
            for _ in range(10):
                await asyncio.sleep(0)
            assert gate.statistics().taken == gate.places  # work conserving
            assert admitted == gate.statistics().released + gate.places == gate.statistics().admitted
            for task in admitting:
                task.cancel()

    asyncio.run(main())


def test_a_gate_refuses_to_release_what_it_never_admitted():
    with pytest.raises(AssertionError, match="release of 1 of 0"):
        StalenessGate(1, 0).release(1)


def test_the_oldest_token_counts_not_the_rollouts_first_version():
    mixed = group([UNSAMPLED, 5, 5, UNSAMPLED, 4], [UNSAMPLED, 6], ref_version=6)
    assert oldest_version(mixed) == 4
    assert staleness(mixed, 6, 2) == 2


def test_a_group_beyond_its_bound_is_refused_by_name():
    with pytest.raises(StalenessError, match="prompt 7 is 3 versions old at 4, bound 2"):
        staleness(group([1, 1]), 4, 2)


def test_a_group_without_a_sampled_token_is_as_old_as_its_ref():
    assert oldest_version(group([UNSAMPLED], ref_version=3)) == 3
