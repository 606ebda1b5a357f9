"""One process of a pool, kept alive: started, prepared, watched, and started again when it dies.

    spawn ──> prepare ──> ready ──> (requests) ──> death: every pending request raises PeerDiedError ──> spawn ...
       ^                                                                                             |
       '────────────── at most `restarts` times within WINDOW_S, or without being ready ─────────────'
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from weft.transport import messages
from weft.transport.errors import DeadlineError, PeerDiedError, StartError, WeftError

STATISTICS_DEADLINE_S = 5.0
RESTARTS = 5
WINDOW_S = 600.0  # deaths longer ago are forgotten: a run may take weeks
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Process(Protocol):
    """A ready process, as cluster.py and the tests make it."""

    endpoint: str
    pid: int

    async def wait_death(self) -> str:
        """Returns why it ended."""

    async def stop(self) -> None:
        """Ends it, if it has not ended."""


class Client(Protocol):
    """transport.channel.Client, or its twin in memory."""

    async def request(self, message: Any, deadline_s: float | None) -> Any: ...

    def fail(self, error: WeftError) -> None: ...

    async def aclose(self) -> None: ...


Spawn = Callable[[], Awaitable[Process]]
Connect = Callable[[str], Client]


class Member:
    """One place of a pool and the process that fills it now.

    prepare: what a fresh process is told before it is ready; lost: called at each death, before anything is restarted.
    """

    def __init__(
        self, name: str, spawn: Spawn, connect: Connect, restarts: int = RESTARTS, clock: Callable[[], float] | None = None
    ) -> None:
        """clock: seconds, the event loop's if None."""
        self.name = name
        self.deaths = 0
        self.last_death = ""  # why
        self._spawn = spawn
        self._connect = connect
        self._restarts = restarts
        self._clock = clock
        self._remembered: deque[float] = deque()  # when it died
        self._was_ready = False  # in this life
        self._process: Process | None = None
        self._client: Client | None = None
        self._ready = asyncio.Event()
        self._condemned = asyncio.Event()
        self._trouble = ""

    @property
    def ready(self) -> bool:
        """Whether it takes requests now."""
        return self._ready.is_set()

    @property
    def alive(self) -> bool:
        """Whether it has a process that can be asked, prepared or not."""
        return self._client is not None

    @property
    def endpoint(self) -> str:
        """Where its present process listens."""
        assert self._process is not None
        return self._process.endpoint

    @property
    def pid(self) -> int | None:
        """Of its present process; None between two."""
        return self._process.pid if self._process else None

    async def wait_ready(self) -> None:
        """Wait until it takes requests. `keep` ends with an exception, and so its TaskGroup, when it never will again."""
        await self._ready.wait()

    async def request(self, message: Any, deadline_s: float | None = None) -> Any:
        """The reply of the present process; PeerDiedError if it dies first, or if there is none. Usable in `prepare`."""
        client = self._client
        if client is None:
            raise PeerDiedError(f"{self.name} is being restarted")
        try:
            return await client.request(message, deadline_s)
        except PeerDiedError:
            if client is self._client:  # the channel knows before Ray does: nobody may find this one ready meanwhile
                self.condemn()
            raise

    def condemn(self, why: str = "") -> None:
        """Take no more requests, and end the process: it lives, and is of no use any more. The first reason is the reason."""
        self._ready.clear()
        self._trouble = self._trouble or why
        self._condemned.set()

    async def keep(self, prepare: Callable[[], Awaitable[None]], lost: Callable[[], Awaitable[None]]) -> None:
        """Keep it alive until cancelled. Raises StartError or PeerDiedError when it cannot be."""
        while True:
            why = await self._one_life(prepare)
            self.deaths += 1
            self.last_death = f"{why}: {self._trouble}" if self._trouble else why
            _log.warning("%s", self.last_death)
            await lost()
            if (deaths := self._count_death()) > self._restarts:
                said = f"{self.name} ended {deaths} times in a short while: more than a run survives"
                raise PeerDiedError(f"{said}. The last: {self.last_death}")

    def _count_death(self) -> int:
        """Deaths lately, with this one. A life that never was ready forgets none: slow failures are failures too."""
        now = (self._clock or asyncio.get_running_loop().time)()
        while self._was_ready and self._remembered and self._remembered[0] <= now - WINDOW_S:
            self._remembered.popleft()
        self._remembered.append(now)
        return len(self._remembered)

    async def _one_life(self, prepare: Callable[[], Awaitable[None]]) -> str:
        """From start to death; returns why it ended."""
        self._was_ready = False
        try:
            process = await self._spawn()
        except StartError as error:
            if self.deaths == 0:
                raise  # it never ran: starting it again would show the same traceback, later
            return str(error)
        self._process, client = process, self._connect(process.endpoint)
        self._client, self._trouble = client, ""
        self._condemned.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                preparing = tasks.create_task(self._prepare(prepare))
                executing = tasks.create_task(self._execute(process))
                why = await process.wait_death()
                self._ready.clear()
                self._client = None
                client.fail(PeerDiedError(why))
                preparing.cancel()
                executing.cancel()
            return why
        finally:
            self._ready.clear()
            self._process = self._client = None
            await client.aclose()
            await process.stop()

    async def _prepare(self, prepare: Callable[[], Awaitable[None]]) -> None:
        try:
            await prepare()
        except WeftError as error:
            self.condemn(f"{self.name} could not be prepared: {error}")
        else:
            if not self._condemned.is_set():
                self._was_ready = True
                self._ready.set()

    async def _execute(self, process: Process) -> None:
        await self._condemned.wait()
        await process.stop()


async def all_ready(members: Sequence[Member]) -> None:
    """Returns when all of them take requests."""
    while not all(member.ready for member in members):  # one may die while another is waited for
        await together(*(member.wait_ready() for member in members))


async def any_ready(members: Sequence[Member]) -> list[Member]:
    """Returns when one of them takes requests: all that do."""
    while not (ready := [member for member in members if member.ready]):
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(member.wait_ready()) for member in members]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
    return ready


async def statistics_of(members: Sequence[Member]) -> list[Any]:
    """Of those that answer now."""

    async def ask(member: Member) -> Any:
        with suppress(WeftError):  # a dying one has none; the next poll asks again
            return await member.request(messages.GetStatistics(), STATISTICS_DEADLINE_S)

    replies = await together(*(ask(member) for member in members))
    return [reply for reply in replies if reply is not None]


async def numbers_of(members: Sequence[Member]) -> dict[str, dict[str, float]]:
    """By name: how often each has died, whether it takes requests, whether it answers now, and what it counts if it does."""

    async def ask(member: Member) -> tuple[str, dict[str, float]]:
        found = {"deaths": float(member.deaths), "ready": float(member.ready), "answers": 0.0}
        with suppress(WeftError):  # told of by `answers`
            found |= numbers(await member.request(messages.GetStatistics(), STATISTICS_DEADLINE_S)) | {"answers": 1.0}
        return member.name, found

    return dict(await together(*(ask(member) for member in members)))


def numbers(statistics: Any) -> dict[str, float]:
    """The numbers of a process's statistics: of what it names (adapters, versions) how many, of a mapping each value."""
    found: dict[str, float] = {}
    for name, value in ((one.name, getattr(statistics, one.name)) for one in dataclasses.fields(statistics)):
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": float(number) for key, number in value.items()}
        elif isinstance(value, tuple):
            found[name] = float(len(value))
        elif isinstance(value, int | float) and not name.endswith("pid"):
            found[name] = float(value)
    return found


async def dropped(name: str, member: Member, asked: Awaitable[Any]) -> None:
    """Returns when this process has dropped the adapter. One that does not in time is of no use, and would give or take places
    for what is no more; the process that follows it never hears of that, nor that of one that has died."""
    try:
        with suppress(PeerDiedError):
            await asked
    except DeadlineError as error:
        member.condemn(f"it did not drop {name}: {error}")


async def together(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """Await all at once. The first exception ends the others and is raised as it is, not in a group."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(call) for call in calls]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in running]
