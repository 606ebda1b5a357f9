"""The trainers that the pipeline awaits: pipeline/interfaces.py over processes that may die.

An adapter may move: saved by the process that has it, loaded by another, dropped by the first.
Where there are fewer adapters than trainers, one may live on several: each trains some of its rows (shared_step.py).
A death: every call about an adapter that the process held raises PeerDiedError until `add` makes that adapter again, and
`wait_lost` tells those that call nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import shutil
import tempfile
import uuid
from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from weft.actors.member import Member, all_ready, numbers_of, statistics_of, together
from weft.actors.shared_step import join, split
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig
from weft.transport import messages
from weft.transport.broadcast import RendezvousStore
from weft.transport.errors import AdapterFault, DeadlineError, PeerDiedError, RemoteError, VersionError, WeftError
from weft.transport.messages import AdapterRef, Saved, SlabHandle, StepResults, TrainBatch

NOTICE_S = 2.0  # by which the notice of a death may come later than the errors that it causes
ATTEMPTS = 3  # of one shared step that no trainer has taken though none has died
_log = logging.getLogger(__name__)


class _Life:
    """One trainer's process, from its start to its death, of which every call says the same."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self._number = member.deaths + 1
        self.why = ""
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether anybody has noticed its death."""
        return self._ended.is_set()

    async def request(self, message: Any, deadline_s: float | None = None) -> Any:
        """Its reply. PeerDiedError when it is dead; the first call that notices tells whoever waits."""
        if not self.ended:
            try:
                return await self.member.request(message, deadline_s)
            except PeerDiedError as error:
                self.end(str(error))
        raise PeerDiedError(self.why)

    def end(self, why: str) -> None:
        """It is dead, and what it held is lost."""
        if not self.ended:
            self.why = f"process {self._number} of {self.member.name}: {why}"
            self._ended.set()

    async def wait_end(self) -> str:
        """Returns why it ended."""
        await self._ended.wait()
        return self.why


_Home = tuple[_Life, ...]  # the trainers of one adapter: all of them have all of its state


class TrainerPool:
    """Weights, gradients, moments of every adapter. Each lives in one trainer, or in several that were empty when it came."""

    def __init__(
        self,
        members: Sequence[Member],
        deadline_s: float,
        folder: str | None = None,
        backend: str = "gloo",
    ) -> None:
        """folder: where a state is while its adapter moves, best in shared memory; None: the system's temporary folder.
        backend: of the sums of gradients where several share an adapter, as SyncConfig has it."""
        self._members = members
        self._expected = len(members)
        self._backend = "gloo" if backend == "gloo" else "nccl"  # in use
        self._may_fall_back = backend == "nccl-or-gloo"
        self._store: RendezvousStore | None = None
        self._epochs: dict[_Home, str] = {}
        self._folder = Path(folder or tempfile.gettempdir())
        self._numbers = itertools.count()  # of moves
        self._moving_to: set[_Life] = set()
        self._moved = asyncio.Event()  # set at each move, and then another one
        self._added: dict[str, messages.AddAdapter] = {}
        self._deadline_s = deadline_s  # of making an adapter: its environment or weights
        self._lives = {member: _Life(member) for member in members}
        self._home: dict[str, _Home] = {}
        self._slabs: dict[str, SlabHandle] = {}  # that came with a step

    @property
    def capacity(self) -> int:
        """Launches that run at once: one on each trainer."""
        return len(self._members)

    def home(self, name: str) -> _Home:
        """The processes that hold this adapter, dead or alive."""
        return self._home[name]

    def expect(self, adapters: int) -> None:
        """So many are there or are to come: where they are fewer than the trainers, these are shared out among them."""
        self._expected = adapters

    async def wait_ready(self) -> None:
        """Returns when every trainer runs. One that was restarted is empty: `add` and `load`."""
        await all_ready(self._members)

    async def add(self, config: AdapterConfig, lineage: int) -> None:
        """Raises AdapterFault when it cannot be made, or not in time."""
        await self.wait_ready()
        before = self._home.get(config.name, ())
        home = before if before and not _why(before) else self._new_home(config.name)
        self._home[config.name] = home  # before it is asked: those that join meanwhile count this one too
        message = self._added[config.name] = messages.AddAdapter(to_mapping(config), lineage)
        try:
            await self._drop_at([life for life in before if life not in home], config.name)
            await _each(home, message, self._deadline_s)
        except DeadlineError as error:  # it may be made yet, so its home stays known to `drop`
            said = f"{config.name}: {home[0].member.name} has not made its weights within {self._deadline_s:g} s"
            raise AdapterFault(said, "DeadlineError") from error
        except BaseException as error:
            if isinstance(error, WeftError):  # of one of them: others may have made it
                await self._drop_at(home, config.name)
            if before:
                self._home[config.name] = before
            else:
                self._home.pop(config.name, None)
            raise

    def _new_home(self, name: str) -> _Home:
        """The trainer with the fewest adapters, of none that several share if there is another: who shares waits for all. Where
        adapters are fewer than trainers, an even part of those without one."""
        others = {other: home for other, home in self._home.items() if other != name}
        count = {member: sum(self._lives[member] in home for home in others.values()) for member in self._members}
        to_come = max(self._expected - len(others), 1)
        empty = sum(not number for number in count.values())
        shared = {life for home in others.values() if len(home) > 1 for life in home}
        best = sorted(self._members, key=lambda member: (self._lives[member] in shared, count[member]))
        chosen = best[: max(math.ceil(empty / to_come), 1)]
        return tuple(self._lives[member] for member in chosen)

    async def drop(self, name: str) -> None:
        self._added.pop(name, None)
        self._slabs.pop(name, None)
        home = self._home.pop(name, None)
        await self._drop_at(home or (), name)

    async def _drop_at(self, lives: Sequence[_Life], name: str) -> None:
        for life in lives:
            try:
                with suppress(PeerDiedError):  # then it is gone already
                    await life.request(messages.DropAdapter(name), self._deadline_s)
            except DeadlineError as error:  # its memory is lost to the others, and nothing else
                _log.warning("%s may still hold %s, which has left: %s", life.member.name, name, error)

    async def move(self, ref: AdapterRef, busy: Collection[tuple[Hashable, ...]]) -> bool:
        """To the trainer with the fewest adapters of those that are neither `busy` nor shared, state and all. False: there is
        none, or it could not take it, and all is as it was. Raises PeerDiedError when the process that has it dies."""
        at_work = {life for home in busy for life in home}
        at_work |= {life for home in self._home.values() if len(home) > 1 for life in home}
        home, *others = self._home[ref.name]
        free = [m for m in self._members if m.ready and self._lives[m] not in {home, *at_work, *self._moving_to}]
        if not free or others:
            return False
        new = self._lives[min(free, key=self._count)]
        folder = self._folder / f"move-{next(self._numbers)}"
        self._moving_to.add(new)
        try:
            await home.request(messages.Save(ref, str(folder)))
            await new.request(self._added[ref.name], self._deadline_s)
            await new.request(messages.Load(ref, str(folder)), self._deadline_s)
        except WeftError as error:
            if home.ended:
                raise
            _log.warning("%s stays on %s: %s", ref, home.member.name, error)
            await self._drop_at([new], ref.name)
            return False
        finally:
            self._moving_to.discard(new)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._home[ref.name] = (new,)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        await self._drop_at([home], ref.name)
        return True

    async def wait_lost(self, name: str) -> str:
        """Returns why the process died that holds this adapter, or held it last."""
        while True:
            home, moved = self._home[name], self._moved
            async with asyncio.TaskGroup() as tasks:
                waiting = [tasks.create_task(wait) for wait in (*(life.wait_end() for life in home), moved.wait())]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in waiting:
                    task.cancel()
            if (why := _why(home)) and self._home.get(name, home) is home:
                return why

    async def step(self, batches: Sequence[TrainBatch]) -> StepResults:
        """One launch of adapters that have one home."""
        (home,) = {self._home[batch.ref.name] for batch in batches}
        if len(home) > 1:
            done = [await self._share(batch, home) for batch in batches]
            results = StepResults(tuple(one.results[0] for one in done), sum(one.seconds for one in done))
            parts = {batch.ref.name: split(batch, len(home)) for batch in batches}
            shares = [{name: len(own[rank].tokens) for name, own in parts.items()} for rank in range(len(home))]
        else:
            results, shares = await home[0].request(messages.TrainStep(tuple(batches))), []
        slabs = {one.ref.name: one.slab for one in results.results if one.slab is not None}
        self._slabs |= {name: slab for name, slab in slabs.items() if name in self._home}  # not dropped meanwhile
        numbers = [self._members.index(life.member) for life in home]
        return replace(results, trainer=numbers[0], shares=tuple(zip(numbers, shares, strict=False)))

    async def _share(self, batch: TrainBatch, home: _Home) -> StepResults:
        """One step on all of these trainers. Raises PeerDiedError when one dies, or has stepped where another could not: what
        they hold is one state no more. What no group could be had for is tried again; AdapterFault when that goes on."""
        parts = split(batch, len(home))
        for attempt in range(1, ATTEMPTS + 1):
            done = await self._take_shares(parts, home)
            results = [one for one in done if isinstance(one, StepResults)]
            if len(results) == len(home):
                return StepResults((join(parts, [one.results[0] for one in results]),), max(one.seconds for one in results))
            failures = [one for one in done if isinstance(one, WeftError)]
            # one trainer's own says why, the others only that their group is no more
            failure = next((one for one in failures if isinstance(one, RemoteError)), failures[0])
            why = await self._death(home)
            if why or results:
                raise PeerDiedError(why or f"a step on {len(home)} trainers: {failure}") from failure
            if isinstance(failure, AdapterFault):
                raise failure
            if isinstance(failure, RemoteError) or attempt == ATTEMPTS:  # no fault of the group, or one that stays
                said = f"{batch.ref}: no step on {len(home)} trainers: {failure}"
                raise AdapterFault(said, type(failure).__name__) from failure
            if self._backend == "nccl" and self._may_fall_back:
                self._backend = "gloo"
                _log.warning("shared steps go through the host (gloo) from now on, since over nccl: %s", failure)
        raise AssertionError("the last attempt returns or raises")

    async def _take_shares(self, parts: Sequence[TrainBatch], home: _Home) -> list[StepResults | WeftError]:
        """What each of these trainers says to its part. When one fails, the others wait for it no more."""
        self._store = self._store or RendezvousStore()
        epoch = self._epochs.setdefault(home, uuid.uuid4().hex[:12])
        store, size, ended = self._store.address, len(home), False

        async def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                await self._end_share(home, epoch)

        async def take(rank: int) -> StepResults | WeftError:
            share = messages.TrainShare(parts[rank], store, epoch, rank, size, self._backend, self._deadline_s)
            try:
                done: StepResults = await home[rank].request(share)
            except WeftError as error:
                await end()
                return error
            return done

        try:
            return await together(*map(take, range(size)))
        except BaseException:
            await end()
            raise

    async def _end_share(self, home: _Home, epoch: str) -> None:
        """Whoever waits in this group waits no more."""
        self._epochs.pop(home, None)
        assert self._store is not None
        self._store.dissolve(epoch)
        for life in home:
            with suppress(WeftError):  # who is dead waits for nobody
                await life.request(messages.EndShare(epoch), self._deadline_s)

    async def _death(self, home: _Home) -> str:
        """Why one of these trainers died; nothing if none is known to be dead soon."""
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(life.wait_end()) for life in home]
            await asyncio.wait(waiting, timeout=NOTICE_S, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        return _why(home)

    async def save(self, ref: AdapterRef, folder: str) -> Saved:
        saved: Saved = await self._home[ref.name][0].request(messages.Save(ref, folder))
        return saved

    async def load(self, ref: AdapterRef, folder: str) -> None:
        await _each(self._home[ref.name], messages.Load(ref, folder))

    async def export(self, ref: AdapterRef, folder: str) -> None:
        await self._home[ref.name][0].request(messages.Export(ref, folder))

    async def publish(self, ref: AdapterRef) -> SlabHandle:
        """The weights of `ref`, for the relay: what came with its step, once, and else what its trainer says."""
        home, there = self._home[ref.name][0], self._slabs.get(ref.name)
        if there is not None and there.ref == ref and not home.ended:
            return self._slabs.pop(ref.name)
        handle: SlabHandle = await home.request(messages.Publish(ref), self._deadline_s)
        return handle

    async def canary(self, ref: AdapterRef, closely: bool = False) -> messages.Canary:
        """Of the weights of `ref`, which the trainer must still have."""
        if ref.name not in self._home:
            raise VersionError(f"{ref} has been dropped: no canary")
        message = messages.AskCanary(ref, closely)
        canary: messages.Canary = await self._home[ref.name][0].request(message, self._deadline_s)
        return canary

    async def statistics(self) -> list[messages.TrainerStatistics]:
        """Of those that answer now."""
        return await statistics_of(self._members)

    async def numbers(self) -> dict[str, dict[str, float]]:
        """What each process counts of itself, by its name."""
        return await numbers_of(self._members)

    async def prepare(self, member: Member) -> None:
        """Nothing: a fresh trainer is empty until the pipeline adds to it."""

    async def lost(self, member: Member) -> None:
        life, self._lives[member] = self._lives[member], _Life(member)
        life.end(member.last_death)
        self._epochs = {home: epoch for home, epoch in self._epochs.items() if life not in home}

    def _count(self, member: Member) -> int:
        return sum(self._lives[member] in home for home in self._home.values())


def _why(home: _Home) -> str:
    """Why one of these trainers died; nothing while they all live."""
    return next((life.why for life in home if life.ended), "")


async def _each(home: _Home, message: Any, deadline_s: float | None = None) -> None:
    await together(*(life.request(message, deadline_s) for life in home))
