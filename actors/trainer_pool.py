"""The trainers that the pipeline awaits: pipeline/interfaces.py over processes that may die.

An adapter may move: saved by the process that has it, loaded by another, dropped by the first.
A death: every call about an adapter that the process held raises PeerDiedError until `add` makes that adapter again, and
`wait_lost` tells those that call nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile
from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from weft.actors.member import Member, all_ready, numbers_of, statistics_of
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig
from weft.transport import messages
from weft.transport.errors import AdapterFault, DeadlineError, PeerDiedError, WeftError
from weft.transport.messages import AdapterRef, Saved, SlabHandle, StepResults, TrainBatch

_log = logging.getLogger(__name__)


class _Life:
    """One trainer's process, from its start to its death, of which every call says the same."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self._number = member.deaths + 1
        self._why = ""
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
        raise PeerDiedError(self._why)

    def end(self, why: str) -> None:
        """It is dead, and what it held is lost."""
        if not self.ended:
            self._why = f"process {self._number} of {self.member.name}: {why}"
            self._ended.set()

    async def wait_end(self) -> str:
        """Returns why it ended."""
        await self._ended.wait()
        return self._why


class TrainerPool:
    """Weights, gradients and moments of every adapter; each adapter lives in one trainer."""

    def __init__(self, members: Sequence[Member], deadline_s: float, folder: str | None = None) -> None:
        """folder: where a state is while its adapter moves, best in shared memory; None: the system's temporary folder."""
        self._members = members
        self._folder = Path(folder or tempfile.gettempdir())
        self._numbers = itertools.count()  # of moves
        self._moving_to: set[_Life] = set()
        self._moved = asyncio.Event()  # set at each move, and then another one
        self._added: dict[str, messages.AddAdapter] = {}
        self._deadline_s = deadline_s  # of making an adapter: its environment or weights
        self._lives = {member: _Life(member) for member in members}
        self._home: dict[str, _Life] = {}

    @property
    def capacity(self) -> int:
        """Launches that run at once: one on each trainer."""
        return len(self._members)

    def home(self, name: str) -> Hashable:
        """The process that has held this adapter since its newest `add`, dead or alive."""
        return self._home[name]

    async def wait_ready(self) -> None:
        """Returns when every trainer runs. One that was restarted is empty: `add` and `load`."""
        await all_ready(self._members)

    async def add(self, config: AdapterConfig, lineage: int) -> None:
        """Raises AdapterFault when it cannot be made, or not in time."""
        await self.wait_ready()
        before = self._home.get(config.name)
        home = self._lives[min(self._members, key=self._count)] if before is None or before.ended else before
        self._home[config.name] = home  # before it is asked: those that join meanwhile count this one too
        message = self._added[config.name] = messages.AddAdapter(to_mapping(config), lineage)
        try:
            await home.request(message, self._deadline_s)
        except DeadlineError as error:  # it may be made yet, so its home stays known to `drop`
            said = f"{config.name}: {home.member.name} has not made its weights within {self._deadline_s:g} s"
            raise AdapterFault(said, "DeadlineError") from error
        except BaseException:
            if before is None:
                self._home.pop(config.name, None)
            else:
                self._home[config.name] = before
            raise

    async def drop(self, name: str) -> None:
        self._added.pop(name, None)
        home = self._home.pop(name, None)
        if home is not None:
            await self._drop_at(home, name)

    async def _drop_at(self, home: _Life, name: str) -> None:
        try:
            with suppress(PeerDiedError):  # then it is gone already
                await home.request(messages.DropAdapter(name), self._deadline_s)
        except DeadlineError as error:  # its memory is lost to the others, and nothing else
            _log.warning("%s may still hold %s, which has left: %s", home.member.name, name, error)

    async def move(self, ref: AdapterRef, busy: Collection[Hashable]) -> bool:
        """To the trainer with the fewest adapters of those that are not `busy`, state and all. False: there is none, or that
        one could not take it, and all is as it was. Raises PeerDiedError when the process that has it dies."""
        home = self._home[ref.name]
        free = [m for m in self._members if m.ready and self._lives[m] not in (*busy, home, *self._moving_to)]
        if not free:
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
            await self._drop_at(new, ref.name)
            return False
        finally:
            self._moving_to.discard(new)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._home[ref.name] = new
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        await self._drop_at(home, ref.name)
        return True

    async def wait_lost(self, name: str) -> str:
        """Returns why the process died that holds this adapter, or held it last."""
        while True:
            home, moved = self._home[name], self._moved
            async with asyncio.TaskGroup() as tasks:
                waiting = [tasks.create_task(home.wait_end()), tasks.create_task(moved.wait())]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in waiting:
                    task.cancel()
            if home.ended and self._home.get(name, home) is home:
                return await home.wait_end()

    async def step(self, batches: Sequence[TrainBatch]) -> StepResults:
        """One launch of adapters that have one home."""
        (home,) = {self._home[batch.ref.name] for batch in batches}
        results: StepResults = await home.request(messages.TrainStep(tuple(batches)))
        return replace(results, trainer=self._members.index(home.member))

    async def save(self, ref: AdapterRef, folder: str) -> Saved:
        saved: Saved = await self._home[ref.name].request(messages.Save(ref, folder))
        return saved

    async def load(self, ref: AdapterRef, folder: str) -> None:
        await self._home[ref.name].request(messages.Load(ref, folder))

    async def export(self, ref: AdapterRef, folder: str) -> None:
        await self._home[ref.name].request(messages.Export(ref, folder))

    async def publish(self, ref: AdapterRef) -> SlabHandle:
        """The weights of `ref`, for the relay."""
        handle: SlabHandle = await self._home[ref.name].request(messages.Publish(ref), self._deadline_s)
        return handle

    async def statistics(self) -> list[messages.TrainerStatistics]:
        """Of those that answer now."""
        return await statistics_of(self._members)

    async def numbers(self) -> dict[str, dict[str, float]]:
        """What each process counts of itself, by its name."""
        return await numbers_of(self._members)

    async def prepare(self, member: Member) -> None:
        """Nothing: a fresh trainer is empty until the pipeline adds to it."""

    async def lost(self, member: Member) -> None:
        self._lives[member].end(member.last_death)
        self._lives[member] = _Life(member)

    def _count(self, member: Member) -> int:
        return sum(home is self._lives[member] for home in self._home.values())
