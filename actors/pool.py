"""Samplers and parameter sync as the pipeline awaits them: pipeline/interfaces.py over processes that may die.

    SamplerPool   a death: its rollouts raise PeerDiedError; the new process is told every adapter, joins the relay, is ready
    ParamSyncPool a death: the new relay is told every sampler, and the trainers hand over every installed version again

    publish(ref): trainer Publish ──slab──> relay Distribute ──> every joined sampler has installed it
A sampler joins between publishes, never during one: so none is missed by it, and none reaches it twice.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.actors.member import Member, all_ready, any_ready, numbers_of, statistics_of, together
from weft.actors.trainer_pool import TrainerPool
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig
from weft.transport import messages
from weft.transport.errors import (
    AdapterFault,
    DeadlineError,
    EngineLostError,
    PeerDiedError,
    RemoteError,
    VersionError,
    WeftError,
)
from weft.transport.messages import AdapterRef, Distributed, Group, SlabHandle

ATTEMPTS = 5  # of one publish, while nothing has died: a death's notice may come later than the error that it causes
PAUSE_S = 0.25  # before the second attempt, and longer before each one after it
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Joined:
    """A sampler's process that takes part in every sync."""

    member: Member
    endpoint: str


class ParamSyncPool:
    """New versions to the samplers, over one relay."""

    def __init__(self, member: Member, trainers: TrainerPool, deadline_s: float) -> None:
        self._member = member
        self._trainers = trainers
        self._deadline_s = deadline_s  # of one sync
        self._joined: dict[int, _Joined] = {}
        self._current: dict[str, AdapterRef] = {}  # what the relay has distributed
        self._absent: dict[str, asyncio.Event] = {}  # adapters that a new relay could not be given; set when they are published
        self._syncing = _SharedLock()  # shared by publishes; a join has it alone

    async def wait_ready(self) -> None:
        await self._member.wait_ready()

    async def publish(self, ref: AdapterRef, supersedes: AdapterRef | None) -> Distributed:
        """Returns when every sampler that serves this adapter has installed `ref`.

        Survives the death of the relay or of a sampler; raises PeerDiedError for the trainer's alone, and InstallError,
        RendezvousError or DeadlineError when it fails again and again though nothing has died.
        """
        attempt = 0
        while True:
            async with self._syncing.shared():
                await self._member.wait_ready()
                with _taken_or_removed(await self._trainers.publish(ref)) as handle:
                    await self._member.wait_ready()  # one that has come meanwhile knows no sampler before it is prepared
                    world = self._world()
                    try:
                        done: Distributed = await self._distribute(handle, supersedes)
                    except WeftError:
                        attempt = 1 if world != self._world() else attempt + 1
                        if attempt >= ATTEMPTS:
                            raise
                    else:
                        self._held(ref)
                        return done
            await asyncio.sleep(PAUSE_S * attempt)

    async def join(self, sampler: int, member: Member) -> None:
        """Returns when this sampler has the newest version of every adapter."""
        joined = _Joined(member, member.endpoint)
        async with self._syncing.alone():
            while True:
                await self._member.wait_ready()
                with suppress(PeerDiedError):  # the relay's: the next one is asked again
                    await self._member.request(messages.JoinSampler(sampler, joined.endpoint), self._join_limit_s())
                    self._joined[sampler] = joined
                    return

    async def leave(self, sampler: int) -> None:
        """No sync waits for this sampler any more."""
        self._joined.pop(sampler, None)
        with suppress(WeftError):  # a relay that cannot hear it now is told by `prepare` who is there
            await self._member.request(messages.LeaveSampler(sampler), self._deadline_s)

    async def drop(self, name: str) -> None:
        limit = self._join_limit_s()  # the relay may be giving this very adapter to a sampler that joins
        self._current.pop(name, None)
        self._settle(name)
        await _dropped(name, self._member, self._member.request(messages.DropAdapter(name), limit))

    async def wait_held(self, name: str) -> None:
        """Wait until the relay has what samplers need of this adapter: at once, but after a death of relay and sampler both."""
        if name in self._absent:
            await self._absent[name].wait()

    async def statistics(self) -> list[messages.SyncStatistics]:
        return await statistics_of([self._member])

    async def numbers(self) -> dict[str, dict[str, float]]:
        """What each process counts of itself, by its name."""
        return await numbers_of([self._member])

    async def prepare(self, member: Member) -> None:
        """Give a fresh relay the samplers and every installed version. What cannot be given now comes with its next publish."""
        for sampler, joined in list(self._joined.items()):
            try:
                await member.request(messages.JoinSampler(sampler, joined.endpoint), self._deadline_s)
            except WeftError as error:
                if not member.alive:
                    raise
                # Dead or not: no sync reaches it any more, so it may not serve. It joins again when it is back.
                if self._joined.get(sampler) is joined:
                    self._joined.pop(sampler)
                    joined.member.condemn(f"it did not join the new relay: {error}")
        for ref in list(self._current.values()):
            await self._hand_over(member, ref)

    async def _hand_over(self, member: Member, ref: AdapterRef) -> None:
        """Give a fresh relay this version, unless its adapter is dropped or goes on from another one meanwhile.

        When it cannot be written or distributed, the samplers that live have it all the same; one that comes and lacks it says
        so to this adapter alone.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if not self._is_current(ref):
                return
            try:
                handle = await self._trainers.publish(ref)
            except (PeerDiedError, VersionError):  # it has died or is a version ahead: the next publish is on its way
                if self._is_current(ref):
                    self._absent.setdefault(ref.name, asyncio.Event())
                return
            except WeftError as error:
                failure: WeftError = error
            else:
                with _taken_or_removed(handle):
                    if not self._is_current(ref):
                        return
                    try:
                        await self._distribute(handle, None)
                    except WeftError as error:
                        if not member.alive:
                            raise
                        failure = error
                    else:
                        self._settle(ref.name)
                        return
            await asyncio.sleep(PAUSE_S * attempt)
        _log.warning("the new relay could not be given %s: %s", ref, failure)

    def _is_current(self, ref: AdapterRef) -> bool:
        return self._current.get(ref.name) == ref

    async def lost(self, member: Member) -> None:
        """Nothing: the slabs that it held are with the trainers."""

    async def _distribute(self, handle: SlabHandle, supersedes: AdapterRef | None) -> Distributed:
        message = messages.Distribute(handle, tuple(self._joined), supersedes)
        done: Distributed = await self._member.request(message, 2 * self._deadline_s)
        if done.notice:
            _log.warning("%s", done.notice)
        return done

    def _join_limit_s(self) -> float:
        """For all that a sampler is given when it joins."""
        return self._deadline_s * (1 + len(self._current))

    def _world(self) -> tuple[int, dict[int, _Joined]]:
        return self._member.deaths, dict(self._joined)

    def _held(self, ref: AdapterRef) -> None:
        self._current[ref.name] = ref
        self._settle(ref.name)

    def _settle(self, name: str) -> None:
        if name in self._absent:
            self._absent.pop(name).set()


class SamplerPool:
    """Rollouts of any installed version, each on the sampler with the fewest sequences in flight."""

    def __init__(
        self, members: Sequence[Member], sync: ParamSyncPool, max_num_seqs: int, max_live_versions: int, deadline_s: float
    ) -> None:
        self._members = members
        self._sync = sync
        self._max_num_seqs = max_num_seqs
        self._max_live_versions = max_live_versions
        self._deadline_s = deadline_s
        self._adapters: dict[str, messages.AddAdapter] = {}
        self._places: dict[str, int] = {}  # in each engine, of the adapters that are here
        self._in_flight = dict.fromkeys(members, 0)

    @property
    def capacity(self) -> int:
        """Sequences that all samplers together run at once."""
        return len(self._members) * self._max_num_seqs

    async def wait_ready(self) -> None:
        """Returns when every sampler runs and has every adapter's newest version."""
        await all_ready(self._members)

    async def add(self, config: AdapterConfig, lineage: int) -> int | None:
        """Build the adapter's environment on every sampler; returns its number of training prompts, None if endless.

        Raises AdapterFault when that fails or takes too long, and when the engines have no places left for its versions: later
        it would be found by whichever adapter published next.
        """
        self._take_places(config)
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
            self._places.pop(config.name, None)
            if isinstance(error, DeadlineError):
                said = f"{config.name}: its environment is not made within {self._deadline_s:g} s: {error}"
                raise AdapterFault(said, "DeadlineError") from error
            raise

    async def drop(self, name: str) -> None:
        self._adapters.pop(name, None)
        await self._sync.drop(name)  # first: a new relay may not bring it back
        for member in self._members:
            await _dropped(name, member, self._ask(member, messages.DropAdapter(name), self._deadline_s))
        self._places.pop(name, None)

    async def rollout(self, ref: AdapterRef, prompt_index: int, group_size: int, held_out: bool = False) -> Group:
        """Waits until one sampler is ready, whichever.

        Raises PeerDiedError when the sampler that was sampling it died, AdapterFault when the environment raised.
        """
        await self._sync.wait_held(ref.name)
        member = min(await any_ready(self._members), key=self._in_flight.__getitem__)
        self._in_flight[member] += group_size
        try:
            group: Group = await self._ask(member, messages.Rollout(ref, prompt_index, group_size, held_out))
            return group
        finally:
            self._in_flight[member] -= group_size

    async def statistics(self) -> list[messages.SamplerStatistics]:
        """Of those that answer now."""
        return await statistics_of(self._members)

    async def numbers(self) -> dict[str, dict[str, float]]:
        """What each process counts of itself, by its name."""
        return await numbers_of(self._members)

    async def prepare(self, member: Member) -> None:
        """Tell a fresh sampler every adapter, and have the relay give it their newest versions."""
        for name, message in list(self._adapters.items()):
            if name in self._adapters:  # still; what comes while this goes on is told by `add`, which waits for this to end
                try:
                    await member.request(message, self._deadline_s)
                except (RemoteError, DeadlineError) as error:  # its own fault: its next rollout here says so, to it alone
                    _log.warning("%s comes up without %s: %s", member.name, name, error)
        await self._sync.join(self._members.index(member), member)

    async def lost(self, member: Member) -> None:
        await self._sync.leave(self._members.index(member))

    def _take_places(self, config: AdapterConfig) -> None:
        others = sum(places for name, places in self._places.items() if name != config.name)
        if others + config.live_versions > self._max_live_versions:
            raise AdapterFault(
                f"{config.name}: max_staleness={config.max_staleness} takes {config.live_versions} places for versions in each "
                f"sampler (max_staleness + 2), and {max(self._max_live_versions - others, 0)} are free: "
                f"{others} of {self._max_live_versions} are the other adapters', and a running engine gets no more",
                "ValueError",
            )
        self._places[config.name] = config.live_versions

    async def _ask(self, member: Member, message: Any, deadline_s: float | None = None) -> Any:
        """A sampler without its engine is a dead one, from the moment when it says so."""
        try:
            return await member.request(message, deadline_s)
        except EngineLostError as error:
            member.condemn(str(error))
            raise PeerDiedError(f"{member.name}: {error}") from error


@contextmanager
def _taken_or_removed(handle: SlabHandle) -> Iterator[SlabHandle]:
    """The file of this slab is gone after the block: a relay that died, or was never asked, has not taken it."""
    try:
        yield handle
    finally:
        if handle.path and handle.host in ("", socket.gethostname()):
            Path(handle.path).unlink(missing_ok=True)


async def _dropped(name: str, member: Member, asked: Awaitable[Any]) -> None:
    """Returns when this process has dropped the adapter. One that does not in time is of no use, and would give or take places
    for what is no more; the process that follows it never hears of that, nor that of one that has died."""
    try:
        with suppress(PeerDiedError):
            await asked
    except DeadlineError as error:
        member.condemn(f"it did not drop {name}: {error}")


class _SharedLock:
    """A readers-writer lock: many share it, or one has it alone. Who wants it alone goes before those that come after."""

    def __init__(self) -> None:
        self._sharing = 0
        self._alone = asyncio.Lock()
        self._free = asyncio.Event()
        self._free.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._alone:
            self._sharing += 1
            self._free.clear()
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self._free.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._alone:
            await self._free.wait()
            yield
