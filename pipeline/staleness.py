"""The staleness gate: a hard bound per adapter, held by admission.

Staleness of a group: the version it is trained at minus the oldest version that sampled a token of it. Let S = max_staleness,
P = groups a step, and let the gate have B = (S + 1) P places. A group takes a place before it is sampled (`admit`); P places
come back (`release`) once a step's new version is installed on every sampler. Groups are trained first in, first out.

Bound. Let group g be admitted while version r is installed and the trainer is at t0 >= r. Of the places taken, at most B - 1
are ahead of g; P (t0 - r) of those belong to groups that are spent but not released, because their versions are not yet
installed. So at most B - 1 - P (t0 - r) groups are trained before g, P at a time, and g is trained at version
    <= t0 + floor((B - 1 - P (t0 - r)) / P)  =  r + floor((B - 1) / P)  =  r + S.
No token of g is older than r: a rollout reads the installed version when it is dispatched, which is not before it is admitted,
and the installed version never falls. A group done again (its sampler died) keeps its position and only gets younger. Nothing
overtakes, so nothing makes g later; what ends without being trained only shortens the queue. QED.

The bound is tight: with samplers that are never full, the group admitted last under r takes place B, has B - 1 ahead of it,
and is trained at r + S.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from weft.transport.messages import UNSAMPLED, Group


class StalenessError(AssertionError):
    """A group came to training older than its adapter allows: a fault of ours, so it ends the run."""


@dataclass(frozen=True)
class GateStatistics:
    """places: B; taken: groups admitted and not released; admitted, released: since the start."""

    places: int
    taken: int
    admitted: int
    released: int


class StalenessGate:
    """B = (max_staleness + 1) * groups_per_step places. `admit` waits for one; whoever installs a version calls `release`."""

    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        self.places = (max_staleness + 1) * groups_per_step
        self._admitted = 0
        self._released = 0
        self._freed = asyncio.Event()

    async def admit(self) -> None:
        """Take a place; waits while none is free."""
        while self._admitted - self._released >= self.places:
            self._freed.clear()
            await self._freed.wait()
        self._admitted += 1

    def release(self, groups: int) -> None:
        """Give back the places of `groups` groups: only after the version that they trained is installed."""
        assert 0 < groups <= self._admitted - self._released, f"release of {groups} of {self._admitted - self._released} places"
        self._released += groups
        self._freed.set()

    def statistics(self) -> GateStatistics:
        """The gate now."""
        return GateStatistics(self.places, self._admitted - self._released, self._admitted, self._released)


def oldest_version(group: Group) -> int:
    """The oldest version that sampled a token of the group (its own ref's, should no token be sampled)."""
    sampled = [sample.versions[sample.versions != UNSAMPLED] for sample in group.samples]
    return min((int(versions.min()) for versions in sampled if versions.size), default=group.ref.version)


def staleness(group: Group, version: int, bound: int) -> int:
    """`version` (the trainer's, now) minus the group's oldest. Raises StalenessError beyond `bound`."""
    age = version - oldest_version(group)
    if age > bound:
        raise StalenessError(f"{group.ref}: prompt {group.prompt_index} is {age} versions old at {version}, bound {bound}")
    return age
