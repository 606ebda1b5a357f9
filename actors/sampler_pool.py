"""Samplers as the pipeline awaits them: pipeline/interfaces.py over processes that may die.

    rollout   its seat says which sampler (affinity.py) ──> that has the adapter's newest version (sync_pool.py) ──> Group
    a death   its rollouts raise PeerDiedError, its adapters live on the others; the new process is told every adapter, joins
              the relay, is ready, and is given versions as adapters move back

Every sampler knows every adapter's environment; only the versions are where the adapter lives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from weft.actors.affinity import Affinity, Seat, Welcome
from weft.actors.member import Member, all_ready, any_ready, dropped, numbers_of, statistics_of, together
from weft.actors.sync_pool import ParamSyncPool
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig
from weft.transport import messages
from weft.transport.errors import AdapterFault, DeadlineError, EngineLostError, PeerDiedError, RemoteError, WeftError
from weft.transport.messages import AdapterRef, Group

_log = logging.getLogger(__name__)


class SamplerPool:
    """Rollouts of any installed version, each where its adapter lives."""

    def __init__(self, members: Sequence[Member], sync: ParamSyncPool, affinity: Affinity, deadline_s: float) -> None:
        self._members = members
        self._sync = sync
        self._affinity = affinity
        self._deadline_s = deadline_s
        self._adapters: dict[str, messages.AddAdapter] = {}

    @property
    def capacity(self) -> int:
        """Sequences that all samplers together run at once."""
        return self._affinity.capacity

    async def wait_ready(self) -> None:
        """Returns when every sampler runs and can be given any adapter."""
        await all_ready(self._members)

    async def add(self, config: AdapterConfig, lineage: int) -> int | None:
        """Build the adapter's environment on every sampler; returns its number of training prompts, None if endless.

        Raises AdapterFault when that fails or takes too long, and when no engine has places left for its versions: later it
        would be found by whichever adapter published next.
        """
        admitted = (config.max_staleness + 1) * config.batch_size
        taken = self._affinity.add(config.name, admitted, config.live_versions)
        if taken:
            raise AdapterFault(
                f"{config.name}: max_staleness={config.max_staleness} takes {config.live_versions} places for versions in a "
                f"sampler (max_staleness + 2), and {taken} are the other adapters', and a running engine gets no more",
                "ValueError",
            )
        message = self._adapters[config.name] = messages.AddAdapter(to_mapping(config), lineage)
        try:
            while True:
                await self.wait_ready()
                with suppress(PeerDiedError):  # the next process is told by `prepare`; told twice is told once
                    added = await together(*(self._ask(member, message, self._deadline_s) for member in self._members))
                    num_prompts: int | None = added[0].num_prompts
                    return num_prompts
        except WeftError as error:
            self._adapters.pop(config.name, None)
            self._affinity.drop(config.name)
            if isinstance(error, DeadlineError):
                said = f"{config.name}: its environment is not made within {self._deadline_s:g} s: {error}"
                raise AdapterFault(said, "DeadlineError") from error
            raise

    async def drop(self, name: str) -> None:
        self._adapters.pop(name, None)
        await self._sync.drop(name)  # first: a new relay may not bring it back
        for member in self._members:
            await dropped(name, member, self._ask(member, messages.DropAdapter(name), self._deadline_s))
        self._affinity.drop(name)

    def welcome(self, name: str) -> Welcome:
        return self._affinity.welcome(name)

    def seat(self, name: str, rollouts: int) -> Seat:
        return self._affinity.seat(name, rollouts)

    def leave(self, seat: Seat) -> None:
        self._affinity.leave(seat)

    async def rollout(
        self,
        ref: AdapterRef,
        prompt_index: int,
        group_size: int,
        held_out: bool = False,
        seat: Seat | None = None,
        epoch: int = 0,
        texts: bool = False,
    ) -> Group:
        """Waits until one of the samplers that serve the adapter is ready, and has its newest version.

        Raises PeerDiedError when the sampler that was sampling it died, AdapterFault when the environment raised.
        """
        if seat is None:
            seat = self.seat(ref.name, group_size)
            try:
                return await self.rollout(ref, prompt_index, group_size, held_out, seat, epoch, texts)
            finally:
                self.leave(seat)
        while not self._members[seat.sampler].ready:
            self._affinity.down(seat.sampler)  # `lost` is told a little later
            if not self._affinity.move(seat):
                await any_ready([member for member in self._members if not member.ready])
        member = self._members[seat.sampler]
        await self._sync.serve(ref.name, seat.sampler)
        group: Group = await self._ask(member, messages.Rollout(ref, prompt_index, group_size, held_out, epoch, texts))
        return group

    async def statistics(self) -> list[messages.SamplerStatistics]:
        """Of those that answer now."""
        return await statistics_of(self._members)

    async def numbers(self) -> dict[str, dict[str, float]]:
        """What each process counts of itself, by its name."""
        return await numbers_of(self._members)

    async def prepare(self, member: Member) -> None:
        """Tell a fresh sampler every adapter, and the relay of it."""
        for name, message in list(self._adapters.items()):
            if name in self._adapters:  # still; what comes while this goes on is told by `add`, which waits for this to end
                try:
                    await member.request(message, self._deadline_s)
                except (RemoteError, DeadlineError) as error:  # its own fault: its next rollout here says so, to it alone
                    _log.warning("%s comes up without %s: %s", member.name, name, error)
        sampler = self._members.index(member)
        await self._sync.join(sampler, member)
        self._affinity.up(sampler)

    async def lost(self, member: Member) -> None:
        sampler = self._members.index(member)
        self._affinity.down(sampler)
        await self._sync.leave(sampler)

    async def _ask(self, member: Member, message: Any, deadline_s: float | None = None) -> Any:
        """A sampler without its engine is a dead one, from the moment when it says so."""
        try:
            return await member.request(message, deadline_s)
        except EngineLostError as error:
            member.condemn(str(error))
            raise PeerDiedError(f"{member.name}: {error}") from error
