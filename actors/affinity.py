"""Which samplers serve which adapter: the policy and its books, without a process in sight.

    add ──> a home ──> seat: the home with the fewest rollouts; while its homes are full, a sampler with room to spare: a guest
    publish ──> targets: the homes, as the plan has them now, and where it was a guest lately; elsewhere it is `leaving`

An adapter is at home on as few samplers as its share of the load needs: on one where many adapters share them, on all where it
is alone. So a decode step sees few adapters, and a sync goes to few samplers. Loads are rollouts in flight, the mean over each
adapter's last version. The plan changes with who is there, and every PLAN_S with the loads; an adapter follows it when its next
version is published, so that a move costs no sync of its own. A death moves those who lived there alone at once.

An engine has a fixed number of places for versions. What an adapter may need of them is its own at each of its homes, and only
`spare` of an engine's places go to those who have another home: so there is a home for everyone who was counted when the
engines were sized, even after a death (`engine_places`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

PLAN_S = 5.0  # between two plans while nobody comes or goes
SLACK = 0.25  # of a sampler's even share of the load: what it may have beyond that before somebody moves
VACANT = 0.25  # of a sampler's seats: with fewer free it takes no guests, for those who live there will want them


def engine_places(live_versions: Sequence[int], samplers: int) -> tuple[int, int]:
    """Places for versions in each engine, and how many of them are `spare`. live_versions: of each adapter.

    On `samplers` - 1 engines there is room for all: total / (samplers - 1) each, and twice the largest, once for what is left
    over in an engine that takes no further adapter, once to spare. Never more than the total: then everyone fits everywhere.
    """
    total, largest = sum(live_versions), max(live_versions)
    places = math.ceil(total / max(samplers - 1, 1)) + 2 * largest
    return (total, total) if places >= total else (places, largest)


class Welcome(IntEnum):
    """How a group is received: it must wait; it can be a guest somewhere; it has a seat at home."""

    NOT_NOW, AS_GUEST, AT_HOME = range(3)


@dataclass(eq=False)
class Seat:
    """Room for the rollouts of one group, from `Affinity.seat` to `leave`."""

    name: str
    rollouts: int
    sampler: int
    owner: object = None  # the adapter that was meant: another may have its name by now


@dataclass(frozen=True)
class _Books:
    """Places of each engine: that nobody has or has a right to, and that are taken by those who have another home."""

    free: Mapping[int, int]
    visiting: Mapping[int, int]


@dataclass(eq=False)
class _Adapter:
    """homes: the first is its own, the others are extra. held: samplers that have, or are about to have, a version of it."""

    places: int
    admitted: int  # rollouts, by its gate
    homes: tuple[int, ...]
    since: float  # when its version was published
    moved: float  # when `area` was brought up to date
    guest: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)  # since its version was published
    held: set[int] = field(default_factory=set)
    seated: Counter[int] = field(default_factory=Counter)
    area: float = 0.0  # rollout-seconds since its version was published
    load: float | None = None  # rollouts in flight: mean over its last versions, a newer one counting twice as much

    @property
    def serving(self) -> tuple[int, ...]:
        return (*self.homes, *sorted(self.guest - set(self.homes)))


class Affinity:
    """The books of one pool. Nothing here waits; `clock` in seconds."""

    def __init__(self, samplers: int, seats: int, places: int, spare: int, clock: Callable[[], float]) -> None:
        """seats: sequences that each sampler runs at once; places, spare: of each engine (`engine_places`)."""
        self._samplers = range(samplers)
        self._seats, self._places, self._spare = seats, places, spare
        self._clock = clock
        self._up: set[int] = set()
        self._adapters: dict[str, _Adapter] = {}
        self._load: Counter[int] = Counter()  # rollouts, by sampler
        self._plan: dict[str, tuple[int, ...]] = {}
        self._planned = -math.inf
        self._books: _Books | None = None  # None: to be counted again

    @property
    def capacity(self) -> int:
        """Rollouts that all samplers together run at once."""
        return len(self._samplers) * self._seats

    def homes(self, name: str) -> tuple[int, ...]:
        """Where it lives; never empty, but all of it may be down."""
        return self._adapters[name].homes

    # ---- who is there ----

    def add(self, name: str, rollouts: int, places: int) -> str:
        """Find it a home. rollouts: what its gate admits. Returns why there is none, or nothing. Told twice is told once."""
        before = self._adapters.get(name)
        if before is not None and before.places == places:
            return ""
        self.drop(name)
        free = self._counted().free
        fitting = [sampler for sampler in self._samplers if free[sampler] >= places]
        if not fitting:
            return f"{max(free.values())} are free: {self._places - max(free.values())} of {self._places}"
        now = self._clock()
        expected = self._expected()
        home = min(fitting, key=lambda sampler: (sampler not in self._up, expected[sampler], sampler))
        self._adapters[name] = _Adapter(places, rollouts, (home,), now, now)
        self._change()
        return ""

    def drop(self, name: str) -> None:
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            self._load.subtract(adapter.seated)
            self._change()

    def up(self, sampler: int) -> None:
        """A process of this sampler can serve, and holds nothing yet."""
        self._up.add(sampler)
        self._shelter()

    def down(self, sampler: int) -> None:
        """It is dead: who lived there alone moves, if there is room. Told twice is told once."""
        self._up.discard(sampler)
        for adapter in self._adapters.values():
            adapter.held.discard(sampler)
            adapter.guest.discard(sampler)
            adapter.used.discard(sampler)
        self._shelter()

    def _shelter(self) -> None:
        """A home on a sampler that is up for each adapter, where there is room."""
        self._change()
        expected, loads = self._expected(), self._loads()
        for name, adapter in self._adapters.items():
            alive = tuple(home for home in adapter.homes if home in self._up)
            fitting = [] if alive else [sampler for sampler in self._up if self._fits(name, sampler)]
            if fitting:
                alive = (min(fitting, key=lambda sampler: (expected[sampler], sampler)),)
                expected[alive[0]] += loads[name]
            if alive and alive != adapter.homes:
                adapter.homes = alive
                self._books = None

    def _change(self) -> None:
        """Somebody has come or gone."""
        self._plan, self._planned = {}, -math.inf
        self._books = None

    # ---- rollouts ----

    def welcome(self, name: str) -> Welcome:
        """What `seat` would find now."""
        if name not in self._adapters or any(self._load[sampler] < self._seats for sampler in self._adapters[name].serving):
            return Welcome.AT_HOME
        return Welcome.NOT_NOW if self._vacant(name) is None else Welcome.AS_GUEST

    def seat(self, name: str, rollouts: int) -> Seat:
        """Where the next group goes: to the emptiest home, or, if these are full, where it is welcome as a guest. A group that
        is welcome nowhere sits down at home all the same: who asks for it has waited, or need not."""
        adapter = self._adapters[name]
        serving = [sampler for sampler in adapter.serving if sampler in self._up] or list(adapter.serving)
        sampler = min(serving, key=lambda sampler: (self._load[sampler], serving.index(sampler)))
        if self._load[sampler] >= self._seats and (vacant := self._vacant(name)) is not None:
            sampler = vacant
            adapter.guest.add(sampler)
            self.hold(name, sampler)
        seat = Seat(name, rollouts, sampler, adapter)
        self._sit(seat, 1)
        return seat

    def move(self, seat: Seat) -> bool:
        """Away from a sampler that is down. False: no other serves the adapter."""
        adapter = self._adapters.get(seat.name)
        serving = [sampler for sampler in adapter.serving if sampler in self._up] if adapter is seat.owner and adapter else []
        if not serving:
            return False
        self._sit(seat, -1)
        seat.sampler = min(serving, key=self._load.__getitem__)
        self._sit(seat, 1)
        return True

    def leave(self, seat: Seat) -> None:
        """The group has ended; exactly once a seat."""
        self._sit(seat, -1)

    def _sit(self, seat: Seat, sign: int) -> None:
        adapter = self._adapters.get(seat.name)
        if adapter is None or adapter is not seat.owner:  # dropped, and its seats with it
            return
        now = self._clock()
        adapter.area += adapter.seated.total() * (now - adapter.moved)
        adapter.moved = now
        adapter.used.add(seat.sampler)
        adapter.seated[seat.sampler] += sign * seat.rollouts
        self._load[seat.sampler] += sign * seat.rollouts

    def _vacant(self, name: str) -> int | None:
        """The emptiest sampler that may have it as a guest."""
        most = self._seats * (1 - VACANT)
        free = [sampler for sampler in self._up if self._load[sampler] <= most and self._fits(name, sampler, extra=True)]
        return min(free, key=lambda sampler: (self._load[sampler], sampler), default=None)

    # ---- versions ----

    def targets(self, name: str) -> tuple[int, ...]:
        """Where the version that is published now goes: from here on these serve it, and have places of it."""
        adapter, now = self._adapters[name], self._clock()
        area = adapter.area + adapter.seated.total() * (now - adapter.moved)
        if area > 0 and now > adapter.since:
            load = area / (now - adapter.since)
            adapter.load = load if adapter.load is None else (adapter.load + load) / 2
        if now - self._planned >= PLAN_S:
            self._plan, self._planned = self._make_plan(), now
        lately, adapter.used = adapter.used, {sampler for sampler, rollouts in adapter.seated.items() if rollouts}
        adapter.area, adapter.since, adapter.moved = 0.0, now, now
        planned = self._plan.get(name, adapter.homes)
        first = tuple(home for home in planned[:1] if home in self._up and self._fits(name, home)) or adapter.homes[:1]
        extra = [home for home in planned if home not in first and home in self._up and self._fits(name, home, extra=True)]
        adapter.homes = (*first, *extra)
        adapter.guest = {guest for guest in adapter.guest if guest in lately and guest not in adapter.homes}
        serving = tuple(sampler for sampler in adapter.serving if sampler in self._up)
        adapter.held.update(serving)
        self._books = None
        return serving

    def hold(self, name: str, sampler: int) -> None:
        """This sampler is about to have a version of it."""
        if name in self._adapters:
            self._adapters[name].held.add(sampler)
            self._books = None

    def leaving(self, name: str) -> tuple[int, ...]:
        """Samplers that have a version of it, do not serve it any more and run none of its rollouts: retire it there."""
        adapter = self._adapters[name]
        return tuple(sorted(s for s in adapter.held if s not in adapter.serving and not adapter.seated[s]))

    def vacate(self, name: str, sampler: int) -> None:
        """It is retired there."""
        if name in self._adapters:
            self._adapters[name].held.discard(sampler)
            self._books = None

    # ---- the plan ----

    def _make_plan(self) -> dict[str, tuple[int, ...]]:
        """Homes for everyone, the heaviest first: as many as its load is even shares, rounded, and at least one."""
        up = sorted(self._up)
        draft = _Draft(dict.fromkeys(up, 0.0), dict.fromkeys(up, self._places), dict.fromkeys(up, self._spare))
        loads = self._loads()
        share = sum(loads.values()) / max(len(up), 1)
        limit = (1 + SLACK) * share
        for name in sorted(loads, key=lambda name: (-loads[name], name)):
            adapter, now = self._adapters[name], self._plan.get(name) or self._adapters[name].homes
            copies = min(max(round(loads[name] / share), 1), len(up)) if share else 1
            for _ in range(copies):
                if free := draft.free_for(name, adapter.places):
                    stays = [s for s in free if s in now and draft.load[s] + loads[name] / copies <= limit]
                    chosen = min(stays or free, key=lambda s: (draft.load[s], s))
                    draft.house(name, chosen, adapter.places)
                    draft.load[chosen] += loads[name] / copies
        self._level(draft, loads, limit)
        return draft.homes

    def _level(self, draft: _Draft, loads: Mapping[str, float], limit: float) -> None:
        """Where whole adapters do not divide evenly, one of the fullest sampler also lives on the emptiest."""
        for _ in draft.load:
            fullest, emptiest = (end(draft.load, key=draft.load.__getitem__) for end in (max, min))
            there = {name: adapter for name, adapter in self._adapters.items() if fullest in draft.homes.get(name, ())}
            there = {name: a for name, a in there.items() if emptiest in draft.free_for(name, a.places)}
            if draft.load[fullest] <= limit or not there:
                return
            name = min(there, key=lambda name: (emptiest not in there[name].homes, -loads[name], name))
            homes = draft.homes[name]
            for home in homes:
                draft.load[home] += loads[name] / (len(homes) + 1) - loads[name] / len(homes)
            draft.load[emptiest] += loads[name] / (len(homes) + 1)
            draft.house(name, emptiest, there[name].places)

    def _loads(self) -> dict[str, float]:
        """Of each adapter; of one that is new what its gate admits, in proportion to what the others make of theirs."""
        known = [(adapter.load, adapter.admitted) for adapter in self._adapters.values() if adapter.load is not None]
        made = sum(load for load, _ in known) / sum(admitted for _, admitted in known) if known else 1.0
        return {
            name: adapter.admitted * made if adapter.load is None else adapter.load for name, adapter in self._adapters.items()
        }

    def _expected(self) -> dict[int, float]:
        """Each sampler's load, an adapter's spread evenly over its homes."""
        expected = dict.fromkeys(self._samplers, 0.0)
        for name, load in self._loads().items():
            homes = self._adapters[name].homes
            for home in homes:
                expected[home] += load / len(homes)
        return expected

    # ---- places in the engines ----

    def _counted(self) -> _Books:
        if self._books is None:
            free, visiting = dict.fromkeys(self._samplers, self._places), dict.fromkeys(self._samplers, 0)
            for adapter in self._adapters.values():
                free[adapter.homes[0]] -= adapter.places
                for sampler in adapter.held - {adapter.homes[0]}:
                    free[sampler] -= adapter.places
                    visiting[sampler] += adapter.places
            self._books = _Books(free, visiting)
        return self._books

    def _fits(self, name: str, sampler: int, extra: bool = False) -> bool:
        """extra: beside its own home, out of what is spare."""
        adapter, books = self._adapters[name], self._counted()
        if sampler in adapter.held or (not extra and sampler == adapter.homes[0]):
            return True
        return books.free[sampler] >= adapter.places and (not extra or books.visiting[sampler] + adapter.places <= self._spare)


@dataclass
class _Draft:
    """A plan in the making, by sampler: load, places that are free, and of these what is for extra homes."""

    load: dict[int, float]
    room: dict[int, int]
    spare: dict[int, int]
    homes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def free_for(self, name: str, places: int) -> list[int]:
        """Where it may get one more home."""
        has = self.homes.get(name, ())
        return [s for s, room in self.room.items() if s not in has and room >= places and (not has or self.spare[s] >= places)]

    def house(self, name: str, sampler: int, places: int) -> None:
        has = self.homes.get(name, ())
        self.homes[name] = (*has, sampler)
        self.room[sampler] -= places
        self.spare[sampler] -= places if has else 0
