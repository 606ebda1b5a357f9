"""Who goes next: a fair share of the samplers, and one launch at a time on each trainer, shared by adapters that are ready.

FairShare       an adapter's group waits here for places on the samplers; whoever ends a group frees them.
StepScheduler   an adapter's batch waits here for the launch that its trainer runs; its end starts the next.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from weft.pipeline.balance import Balance
from weft.pipeline.events import PoolStatistics
from weft.pipeline.interfaces import Seat, Seats, Trainers
from weft.transport.errors import PeerDiedError
from weft.transport.messages import StepResult, TrainBatch

TURNS = 3
"""On-policy adapters of one home train in so many launches, or more. In virtual time, with the costs of two H200s, 2 would end
9 % later with four adapters, up to 5 % with eight, and up to 3 % sooner with sixteen."""
Clock = Callable[[], float]


class LoadMeter:
    """Integrates over time how much of a pool is in use."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = self._since = clock()
        self._load_seconds = 0.0  # integral of min(1, in_flight / capacity)
        self._busy_seconds = 0.0  # time with anything in flight
        self.in_flight = 0

    def change(self, by: int, capacity: int) -> None:
        """`by` more are in flight from now on."""
        self._advance(capacity)
        self.in_flight += by

    def statistics(self, capacity: int, waiting: int) -> PoolStatistics:
        """The pool since it began."""
        self._advance(capacity)
        elapsed = max(self._since - self._began, 1e-9)
        load, busy = self._load_seconds / elapsed, self._busy_seconds / elapsed
        return PoolStatistics(capacity, self.in_flight, waiting, load, busy, self._busy_seconds)

    def _advance(self, capacity: int) -> None:
        now = self._clock()
        passed, self._since = now - self._since, now
        self._load_seconds += passed * min(1.0, self.in_flight / capacity)
        self._busy_seconds += passed if self.in_flight else 0.0


@dataclass(frozen=True, eq=False)
class _Waiter:
    rollouts: int
    ticket: int
    granted: asyncio.Future[None]


class FairShare:
    """Places for rollouts on the samplers, shared by max-min fairness.

    While places are free where adapters live, the waiting one of these with the fewest rollouts in flight goes next; of
    several, the one whose next group was wanted first; within an adapter, first in, first out. When the homes of all that wait
    are full, one that is welcome elsewhere goes there. Work conserving: no place is free while a group waits that is welcome
    there. For that a group starts as soon as one place is free, so rollouts on a sampler may exceed what it runs at once by
    less than one group: the engine has places for these too, and a large group is never starved by small ones.
    """

    def __init__(
        self,
        samplers: Seats,
        clock: Clock,
        on_change: Callable[[str, int, int], None] = lambda name, in_flight, total: None,
    ) -> None:
        """on_change: told an adapter's rollouts in flight, and those of all, whenever they change."""
        self._samplers = samplers
        self._on_change = on_change
        self._meter = LoadMeter(clock)
        self._waiting: dict[str, list[_Waiter]] = {}  # of each adapter, by ticket
        self._in_flight: Counter[str] = Counter()
        self._tickets = itertools.count()

    def ticket(self) -> int:
        """A group's number in the order of first wishes. It keeps it when it is done again, and so its turn."""
        return next(self._tickets)

    @asynccontextmanager
    async def places(self, name: str, rollouts: int, ticket: int) -> AsyncIterator[Seat]:
        """Hold places for one group of adapter `name`; waits for them."""
        seat = await self._take(name, rollouts, ticket)
        try:
            yield seat
        finally:
            self._give_back(name, rollouts, seat)

    def in_flight(self, name: str) -> int:
        """Rollouts of this adapter on the samplers now."""
        return self._in_flight[name]

    def statistics(self) -> PoolStatistics:
        """The samplers, in rollouts; `waiting` in groups."""
        return self._meter.statistics(self._samplers.capacity, sum(map(len, self._waiting.values())))

    async def _take(self, name: str, rollouts: int, ticket: int) -> Seat:
        waiter = _Waiter(rollouts, ticket, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting.setdefault(name, []), waiter, key=lambda waiter: waiter.ticket)
        self._grant()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():  # granted and cancelled in the same moment
                self._give_back(name, rollouts, waiter.granted.result())
            elif waiter in self._waiting.get(name, ()):  # else `_grant` saw that it was cancelled before this task did
                self._remove(name, waiter)
            raise

    def _grant(self) -> None:
        while (name := self._next()) is not None:
            waiter = self._waiting[name][0]
            self._remove(name, waiter)
            if not waiter.granted.cancelled():
                self._in_flight[name] += waiter.rollouts
                self._meter.change(waiter.rollouts, self._samplers.capacity)
                self._on_change(name, self._in_flight[name], self._meter.in_flight)
                waiter.granted.set_result(self._samplers.seat(name, waiter.rollouts))

    def _next(self) -> str | None:
        """Whose turn it is, if anyone may go."""
        welcome = {name: how for name in self._waiting if (how := self._samplers.welcome(name))}
        tickets = {name: self._waiting[name][0].ticket for name in welcome}
        return min(welcome, key=lambda name: (-welcome[name], self._in_flight[name], tickets[name]), default=None)

    def _give_back(self, name: str, rollouts: int, seat: Seat) -> None:
        self._samplers.leave(seat)
        self._meter.change(-rollouts, self._samplers.capacity)
        self._in_flight[name] -= rollouts
        self._on_change(name, self._in_flight[name], self._meter.in_flight)
        if not self._in_flight[name]:
            del self._in_flight[name]
        self._grant()

    def _remove(self, name: str, waiter: _Waiter) -> None:
        self._waiting[name].remove(waiter)
        if not self._waiting[name]:
            del self._waiting[name]


@dataclass(frozen=True)
class Stepped:
    """One adapter's part of a launch. queue_seconds: until the launch began; train_seconds: the launch, shared with others."""

    result: StepResult
    queue_seconds: float
    train_seconds: float


@dataclass(eq=False)
class _Submission:
    batch: TrainBatch
    home: tuple[Hashable, ...]
    on_launch: Callable[[], None]
    submitted: float
    idle_before: float  # how long some trainer had been idle by then
    stepped: asyncio.Future[Stepped] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StepScheduler:
    """One launch at a time on each trainer, shared by its adapters that are ready.

    A launch takes the batch that has waited longest, whatever its size, then in order of age every one that still fits into the
    token budget, but no more on-policy ones than a third of the on-policy adapters that live there (or one): nothing of these
    is sampled while they train, so a launch of all would have all of them sample at once and wait at once. Each launch takes
    the oldest, so none starves: a batch waits for at most as many launches as were ahead of it.
    An adapter whose batch would wait, as many have before it, while another trainer is idle, moves there first (balance.py).
    A death of a trainer fails its launch and all that wait for it: their adapters are gone with it. Those of others go on.
    """

    def __init__(
        self,
        trainers: Trainers,
        token_budget: int,
        tasks: asyncio.TaskGroup,
        clock: Clock,
        on_end: Callable[[int, float, Mapping[str, int]], None] = lambda trainer, seconds, tokens: None,
    ) -> None:
        """on_end: told of each launch which trainer ran it, its seconds, and the packed tokens of each adapter; of a shared one
        so of each of its trainers, with the tokens that went there."""
        self._trainers = trainers
        self._token_budget = token_budget
        self._tasks = tasks
        self._clock = clock
        self._on_end = on_end
        self.turns = TURNS
        self._on_policy: set[str] = set()
        self._meter = LoadMeter(clock)
        self._pending: list[_Submission] = []
        self._launching: set[tuple[Hashable, ...]] = set()  # homes
        self._balance = Balance(clock)

    @contextmanager
    def on_policy(self, name: str) -> Iterator[None]:
        """While this lasts, nothing of adapter `name` is sampled from the end of its rollouts to that of its step."""
        self._on_policy.add(name)
        try:
            yield
        finally:
            self._on_policy.discard(name)

    async def submit(self, batch: TrainBatch, on_launch: Callable[[], None] = lambda: None) -> Stepped:
        """One optimizer step of one adapter; waits for its launch. Raises what the trainer raises.

        `on_launch` is called when its launch begins. To cancel a batch that is launched does not stop the launch.
        """
        submitted, idle_before = self._clock(), self._balance.idle_seconds
        home = self._trainers.home(batch.ref.name)
        if home in self._launching and self._is_one_idle() and self._balance.asks_for_move(home):
            if await self._trainers.move(batch.ref, self._launching):  # one that was not made says nothing of what one costs
                self._balance.note_move(self._clock() - submitted)
            home, idle_before = self._trainers.home(batch.ref.name), self._balance.idle_seconds
        submission = _Submission(batch, home, on_launch, submitted, idle_before)
        self._pending.append(submission)
        if home not in self._launching:
            self._launching.add(home)
            self._balance.set_idle(self._is_one_idle())
            self._tasks.create_task(self._launch(home))
        try:
            return await submission.stepped
        finally:
            if submission in self._pending:
                self._pending.remove(submission)

    def statistics(self) -> PoolStatistics:
        """The trainers: in flight are those that have a launch."""
        return self._meter.statistics(self._trainers.capacity, len(self._pending))

    async def _launch(self, home: tuple[Hashable, ...]) -> None:
        """Launch on one home until nobody waits for it.

        Begins a turn of the loop after the first submission, so all that come at once share.
        """
        try:
            while waiting := self._waiting(home):
                chosen = self._choose(waiting)
                for submission in chosen:
                    self._balance.note_wait(home, self._balance.idle_seconds - submission.idle_before)
                    self._pending.remove(submission)
                    submission.on_launch()
                await self._step(chosen)
        finally:
            self._launching.discard(home)
            self._balance.set_idle(self._is_one_idle())

    def _is_one_idle(self) -> bool:
        """Whether some trainer has no launch."""
        return sum(map(len, self._launching)) < self._trainers.capacity

    def _waiting(self, home: tuple[Hashable, ...]) -> list[_Submission]:
        return [submission for submission in self._pending if submission.home == home]

    def _choose(self, waiting: list[_Submission]) -> list[_Submission]:
        taking_turns = sum(self._trainers.home(name) == waiting[0].home for name in self._on_policy)
        places = max(1, taking_turns // self.turns)
        chosen: list[_Submission] = []
        tokens = 0
        for submission in waiting:
            on_policy = submission.batch.ref.name in self._on_policy
            fits = not chosen or tokens + len(submission.batch.tokens) <= self._token_budget
            if fits and (places or not on_policy):
                chosen.append(submission)
                tokens += len(submission.batch.tokens)
                places -= on_policy
        return chosen

    async def _step(self, chosen: list[_Submission]) -> None:
        began, home = self._clock(), chosen[0].home
        self._meter.change(len(home), self._trainers.capacity)
        try:
            results = await self._trainers.step([submission.batch for submission in chosen])
        except Exception as error:  # noqa: BLE001 nothing is swallowed: it is raised again in every adapter that waits for this launch
            lost = [*chosen, *self._waiting(home)] if isinstance(error, PeerDiedError) else chosen
            for submission in lost:
                if not submission.stepped.done():
                    submission.stepped.set_exception(error)
            self._pending = [submission for submission in self._pending if submission not in lost]
            return
        finally:
            self._meter.change(-len(home), self._trainers.capacity)
        seconds = self._clock() - began
        by_name = {result.ref.name: result for result in results.results}
        for submission in chosen:
            if not submission.stepped.done():  # else: cancelled on the way
                result = by_name[submission.batch.ref.name]
                submission.stepped.set_result(Stepped(result, began - submission.submitted, seconds))
        tokens = {submission.batch.ref.name: len(submission.batch.tokens) for submission in chosen}
        for trainer, own in results.shares or ((results.trainer, tokens),):
            self._on_end(trainer, seconds, own)
