"""Parameter sync as the pipeline awaits it: pipeline/interfaces.py over one relay that may die, and samplers that may.

    publish   trainer's step, or Publish ──slab──> relay Distribute ──> every sampler that is to serve the adapter has its bytes
              ──> trainer AskCanary ──> they have found its canary right ──> Withdraw where it is served no more
    audit     what AskCanary begins: of the first version that is published to a sampler's process, then of each eighth, and of
              one that has failed; what `serve` brings is as it is, and the next one is audited there. That the bytes in the
              engine's slot are the trainer's is proven of every version, by checksums; that the engine computes with them as
              the trainer does costs a forward of both, which the others' tokens wait for
    serve     a sampler that is to serve an adapter from now on gets the newest version, which the relay keeps
    a death   of a sampler: no sync waits for it. Of the relay: the new one is told every sampler, and the trainers hand over
              every installed version again

What concerns one adapter goes in order, one at a time; what concerns different ones goes beside each other.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from weft.actors.affinity import Affinity
from weft.actors.member import Member, dropped, numbers_of, statistics_of, together
from weft.actors.trainer_pool import TrainerPool
from weft.transport import messages
from weft.transport.errors import InstallError, PeerDiedError, RemoteError, VersionError, WeftError
from weft.transport.messages import AdapterRef, Distributed, SlabHandle

ATTEMPTS = 5  # of one publish, while nothing has died: a death's notice may come later than the error that it causes
AUDIT_EVERY = 8  # versions of an adapter
PAUSE_S = 0.25  # before the second attempt, and longer before each one after it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Joined:
    """A sampler's process that takes part in syncs; the next one may have its endpoint."""

    member: Member
    endpoint: str


class ParamSyncPool:
    """New versions to the samplers, over one relay."""

    def __init__(
        self, member: Member, trainers: TrainerPool, affinity: Affinity, deadline_s: float, workers: int = 1
    ) -> None:
        """workers: of each sampler's engine."""
        self._member = member
        self._workers = workers
        self._trainers = trainers
        self._affinity = affinity
        self._deadline_s = deadline_s  # of one sync
        self.audit_every = AUDIT_EVERY
        self._audited: dict[str, dict[int, tuple[_Joined, int]]] = {}  # by adapter and sampler: the process, and the lineage
        self._joined: dict[int, _Joined] = {}
        self._current: dict[str, AdapterRef] = {}  # what the relay has distributed
        self._held: dict[str, dict[int, AdapterRef]] = {}  # by adapter and sampler: the last version that it has installed
        self._absent: dict[str, asyncio.Event] = {}  # adapters that a new relay could not be given; set when they are published
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # by adapter

    async def wait_ready(self) -> None:
        await self._member.wait_ready()

    async def publish(self, ref: AdapterRef, supersedes: AdapterRef | None) -> Distributed:
        """Returns when every sampler that serves this adapter from now on has installed `ref`.

        Survives the death of the relay or of a sampler, and a place for slabs that is full for a moment; raises PeerDiedError
        for the trainer's death alone, and InstallError, RendezvousError or DeadlineError when it fails again and again though
        nothing has died.
        """
        turn = self._turn(ref.name)
        async with turn:
            targets = self._affinity.targets(ref.name)
            attempt = 0
            while True:
                await self._member.wait_ready()
                with _taken_or_removed(await self._slab(ref)) as handle:
                    await self._member.wait_ready()  # one that has come meanwhile knows no sampler before it is prepared
                    world = self._world()
                    there = {sampler: self._joined[sampler] for sampler in targets if sampler in self._joined}
                    try:
                        for sampler in there:
                            if self._held.get(ref.name, {}).get(sampler) not in (supersedes, ref):
                                await self._retire(ref.name, sampler)
                        handle = replace(handle, audited=attempt > 0 or self._is_audit_due(ref, there))
                        done = await self._distribute(handle, there, supersedes, closely=attempt > 0)
                    except WeftError as error:
                        attempt = 1 if world != self._world() else attempt + 1
                        if attempt >= ATTEMPTS:
                            raise
                        _log.warning("%s is not installed, attempt %d of %d: %s", ref, attempt, ATTEMPTS, error)
                    else:
                        self._note_installed(ref, there)
                        if handle.audited:
                            audited = {sampler: (joined, ref.lineage) for sampler, joined in there.items()}
                            self._audited.setdefault(ref.name, {}).update(audited)
                        await self._withdraw(ref.name)
                        return done
                await asyncio.sleep(PAUSE_S * attempt)

    async def _slab(self, ref: AdapterRef) -> SlabHandle:
        """From its trainer. A place without room for it may have some later: InstallError if it has not."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._trainers.publish(ref)
            except RemoteError as error:
                if attempt == ATTEMPTS or error.kind != "OSError":
                    raise InstallError(f"{ref}: its trainer cannot hand its weights over: {error}") from error
            await asyncio.sleep(PAUSE_S * attempt)
        raise AssertionError("the last attempt returns or raises")

    async def serve(self, name: str, sampler: int) -> None:
        """Returns when this sampler has the adapter's newest version: at once, where it was published to.

        Raises PeerDiedError when the sampler dies, or does not answer and so must; InstallError when it refuses the version, or
        the relay has none, again and again.
        """
        attempt = 0
        while not self._is_served(name, sampler):
            if name in self._absent:
                await self._absent[name].wait()
            await self._member.wait_ready()
            world = self._world()
            turn = self._turn(name)
            async with turn:
                ref, joined = self._current.get(name), self._joined.get(sampler)
                if joined is None:
                    raise PeerDiedError(f"sampler {sampler} is being restarted")
                if name in self._absent or self._is_served(name, sampler):
                    continue
                if ref is None:
                    raise InstallError(f"no version of {name} has been published")
                self._affinity.hold(name, sampler)
                try:
                    await self._retire(name, sampler)
                    await self._member.request(messages.Serve(sampler, name), 2 * self._deadline_s)
                except WeftError as error:
                    failure = error
                else:
                    if self._current.get(name) == ref and self._joined.get(sampler) is joined:
                        self._held[name][sampler] = ref
                    continue
            attempt = 1 if world != self._world() else attempt + 1
            if attempt >= ATTEMPTS:
                if isinstance(failure, InstallError):
                    raise failure
                joined.member.condemn(f"it was not given {ref}: {failure}")
                raise PeerDiedError(f"sampler {sampler} was not given {ref}: {failure}") from failure
            await asyncio.sleep(PAUSE_S * attempt)

    async def join(self, sampler: int, member: Member) -> None:
        """Returns when the relay knows this sampler, which is empty."""
        joined = _Joined(member, member.endpoint)
        while True:
            await self._member.wait_ready()
            with suppress(PeerDiedError):  # the relay's: the next one is asked again
                message = messages.JoinSampler(sampler, joined.endpoint, self._workers)
                await self._member.request(message, self._deadline_s)
                self._joined[sampler] = joined
                return

    async def leave(self, sampler: int) -> None:
        """No sync waits for this sampler any more."""
        self._joined.pop(sampler, None)
        for held in self._held.values():
            held.pop(sampler, None)
        with suppress(WeftError):  # a relay that cannot hear it now is told by `prepare` who is there
            await self._member.request(messages.LeaveSampler(sampler), self._deadline_s)

    async def drop(self, name: str) -> None:
        self._current.pop(name, None)
        self._held.pop(name, None)
        self._audited.pop(name, None)
        self._settle(name)
        limit = 2 * self._deadline_s  # the relay may be giving this very adapter to a sampler
        await dropped(name, self._member, self._member.request(messages.DropAdapter(name), limit))

    async def statistics(self) -> list[messages.SyncStatistics]:
        return await statistics_of([self._member])

    async def numbers(self) -> dict[str, dict[str, float]]:
        """What each process counts of itself, by its name."""
        return await numbers_of([self._member])

    async def prepare(self, member: Member) -> None:
        """Give a fresh relay the samplers and every installed version. What cannot be given now comes with its next publish."""
        for sampler, joined in list(self._joined.items()):
            try:
                await member.request(messages.JoinSampler(sampler, joined.endpoint, self._workers), self._deadline_s)
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
                    proven = replace(handle, audited=False)  # who has it found it right, and keeps it
                    try:
                        await self._distribute(proven, [s for s, held in self._held[ref.name].items() if held == ref], None)
                    except WeftError as error:
                        if not member.alive:
                            raise
                        failure = error
                    else:
                        self._settle(ref.name)
                        return
            await asyncio.sleep(PAUSE_S * attempt)
        _log.warning("the new relay could not be given %s: %s", ref, failure)

    async def lost(self, member: Member) -> None:
        """Nothing: the slabs that it held are with the trainers."""

    async def _distribute(
        self, handle: SlabHandle, samplers: Collection[int], supersedes: AdapterRef | None, closely: bool = False
    ) -> Distributed:
        """closely: a canary that differs is judged by its noise, too, which costs the trainer some forwards."""
        done: Distributed
        message = messages.Distribute(handle, tuple(samplers), supersedes)
        distributing = self._member.request(message, 2 * self._deadline_s)
        if handle.audited and handle.canary_logprob is None:  # its weights are on their way, and do not wait for it
            done, _ = await together(distributing, self._follow(handle.ref, closely))
        else:
            done = await distributing
        if done.notice:
            _log.warning("%s", done.notice)
        return done

    async def _follow(self, ref: AdapterRef, closely: bool) -> None:
        """Send the canary after a slab. When there is none, the slab's way ends too: nobody can check what it brings.

        It is computed on the GPU that the slab comes from, by another process than the relay's: the two would take turns there.
        """
        await self._member.request(messages.AwaitSent(ref), 2 * self._deadline_s)
        try:
            canary = await self._trainers.canary(ref, closely)
        except RemoteError as error:
            raise InstallError(f"{ref}: its trainer gives no canary: {error}") from error
        await self._member.request(canary, self._deadline_s)

    async def _withdraw(self, name: str) -> None:
        """Retire it where nobody asks for it any more. What cannot be retired now is so after the next publish."""
        for sampler in self._affinity.leaving(name):
            try:
                await self._retire(name, sampler)
            except WeftError as error:
                _log.warning("sampler %d keeps what it has of %s for now: %s", sampler, name, error)
            else:
                self._affinity.vacate(name, sampler)

    async def _retire(self, name: str, sampler: int) -> None:
        """What this sampler has of the adapter is for no new rollout. Of what it had when it served the adapter an earlier time
        nobody else would say so."""
        ref = self._held.get(name, {}).get(sampler)
        if ref is not None:
            await self._member.request(messages.Withdraw(sampler, ref), self._deadline_s)
            self._held.get(name, {}).pop(sampler, None)

    def _is_audit_due(self, ref: AdapterRef, samplers: dict[int, _Joined]) -> bool:
        known = self._audited.get(ref.name, {})
        new = any(known.get(sampler) != (joined, ref.lineage) for sampler, joined in samplers.items())
        return new or ref.version % self.audit_every == 0

    def _is_current(self, ref: AdapterRef) -> bool:
        return self._current.get(ref.name) == ref

    def _is_served(self, name: str, sampler: int) -> bool:
        return name in self._current and self._held[name].get(sampler) == self._current[name]

    def _turn(self, name: str) -> asyncio.Lock:
        """The adapter's lock; it lives as long as somebody holds or awaits it."""
        return self._turns.setdefault(name, asyncio.Lock())

    def _world(self) -> tuple[int, dict[int, _Joined]]:
        return self._member.deaths, dict(self._joined)

    def _note_installed(self, ref: AdapterRef, samplers: dict[int, _Joined]) -> None:
        self._current[ref.name] = ref
        held = self._held.setdefault(ref.name, {})
        held.update({sampler: ref for sampler, joined in samplers.items() if self._joined.get(sampler) is joined})
        self._settle(ref.name)

    def _settle(self, name: str) -> None:
        if name in self._absent:
            self._absent.pop(name).set()


@contextmanager
def _taken_or_removed(handle: SlabHandle) -> Iterator[SlabHandle]:
    """The file of this slab is gone after the block: a relay that died, or was never asked, has not taken it."""
    try:
        yield handle
    finally:
        if handle.path and handle.host in ("", socket.gethostname()):
            Path(handle.path).unlink(missing_ok=True)
