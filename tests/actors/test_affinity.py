"""Where adapters live, as a policy: no process, time by hand, and hundreds of random histories against the books' laws."""

from __future__ import annotations

import random

import pytest

from weft.actors.affinity import PLAN_S, Affinity, Seat, Welcome, engine_places


class House:
    """An Affinity whose samplers are all up, and its clock."""

    def __init__(self, samplers: int = 2, seats: int = 16, live: tuple[int, ...] = (3,) * 8, up: bool = True) -> None:
        self.now = 0.0
        self.samplers, self.seats = samplers, seats
        self.places, self.spare = engine_places(live, samplers)
        self.affinity = Affinity(samplers, seats, self.places, self.spare, lambda: self.now)
        for sampler in range(samplers if up else 0):
            self.affinity.up(sampler)

    def add(self, *names: str, rollouts: int = 8, places: int = 3) -> None:
        for name in names:
            assert not self.affinity.add(name, rollouts, places)

    def publish(self, *names: str) -> None:
        """Each in turn, a while later; what it leaves is retired at once."""
        for name in names:
            self.now += PLAN_S
            self.affinity.targets(name)
            for sampler in self.affinity.leaving(name):
                self.affinity.vacate(name, sampler)

    def homes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.affinity.homes(name) for name in self.affinity._adapters}

    def run(self, rollouts: dict[str, int], seconds: float) -> None:
        """Have so many in flight for so long."""
        seats = [self.affinity.seat(name, number) for name, number in rollouts.items()]
        self.now += seconds
        for seat in seats:
            self.affinity.leave(seat)


def test_an_adapter_alone_lives_on_every_sampler() -> None:
    house = House(samplers=4)
    house.add("a")
    house.publish("a")
    assert sorted(house.affinity.homes("a")) == [0, 1, 2, 3]


def test_many_adapters_live_on_one_sampler_each_and_as_many_on_each_sampler() -> None:
    house = House(samplers=4, live=(3,) * 32)
    names = [f"a{index}" for index in range(32)]
    house.add(*names)
    house.publish(*names, *names)
    homes = house.homes().values()
    assert {len(home) for home in homes} == {1}
    assert [sum(sampler in home for home in homes) for sampler in range(4)] == [8] * 4


@pytest.mark.parametrize(("adapters", "samplers"), [(3, 2), (5, 4), (2, 3), (7, 6), (13, 4)])
def test_no_sampler_has_much_more_than_its_share_however_the_numbers_divide(adapters: int, samplers: int) -> None:
    house = House(samplers, live=(3,) * adapters)
    names = [f"a{index}" for index in range(adapters)]
    house.add(*names)
    house.publish(*names, *names)
    load = [sum(1 / len(home) for home in house.homes().values() if sampler in home) for sampler in range(samplers)]
    assert max(load) <= 1.26 * adapters / samplers
    assert sum(map(len, house.homes().values())) <= adapters + samplers, "no more homes than it takes"


def test_an_adapter_whose_rollouts_are_more_than_the_others_together_lives_on_several_samplers() -> None:
    house = House(samplers=4, live=(3,) * 9)
    house.add(*"abcdefgh", rollouts=8)
    house.add("huge", rollouts=64)
    house.publish(*"abcdefgh", "huge", *"abcdefgh")
    assert len(house.affinity.homes("huge")) == 2
    assert all(len(house.affinity.homes(name)) == 1 for name in "abcdefgh")
    beside = [name for name in "abcdefgh" if set(house.affinity.homes(name)) <= set(house.affinity.homes("huge"))]
    assert len(beside) <= 2, "of an even share, a quarter"


def test_a_home_is_kept_while_loads_wander_a_little_and_moved_when_they_shift() -> None:
    house = House(samplers=2, seats=64)
    house.add(*"abcd")
    house.publish(*"abcd")
    before = house.homes()
    chance = random.Random(0)
    for _ in range(20):
        house.run({name: chance.randint(6, 10) for name in "abcd"}, 30.0)
        house.publish(*"abcd")
    assert house.homes() == before
    (together,) = {name for name in "bcd" if house.homes()[name] == house.homes()["a"]}
    for _ in range(4):  # these two have nearly all the work now
        house.run({name: 16 if name in ("a", together) else 1 for name in "abcd"}, 30.0)
        house.publish(*"abcd")
    assert not set(house.homes()["a"]) & set(house.homes()[together]), house.homes()


def test_a_death_moves_adapters_at_once_and_they_come_back_with_their_next_versions() -> None:
    house = House(samplers=2, live=(3,) * 4)
    house.add(*"abcd")
    house.publish(*"abcd")
    house.affinity.down(0)
    assert set(house.homes().values()) == {(1,)}
    house.affinity.up(0)
    assert set(house.homes().values()) == {(1,)}, "nobody moves while nothing is published"
    house.publish(*"abcd", *"abcd")
    assert sorted(house.homes().values()) == [(0,), (0,), (1,), (1,)]


def test_with_every_sampler_dead_a_group_has_its_seat_and_moves_to_the_first_that_comes_back() -> None:
    house = House(samplers=2, live=(3,))
    house.add("a")
    house.publish("a")
    house.affinity.down(0)
    house.affinity.down(1)
    assert house.affinity.welcome("a") is Welcome.AT_HOME
    seat = house.affinity.seat("a", 4)
    other = 1 - seat.sampler
    assert not house.affinity.move(seat)
    house.affinity.up(other)
    assert house.affinity.move(seat)
    assert seat.sampler == other


def test_a_full_home_makes_guests_of_its_groups_where_a_quarter_is_free_and_none_otherwise() -> None:
    house = House(samplers=2, seats=16)
    house.add(*"abcd")
    house.publish(*"abcd")
    a, b = (next(name for name in "abcd" if house.homes()[name] == (sampler,)) for sampler in range(2))
    seats = [house.affinity.seat(a, 8) for _ in range(2)]
    assert house.affinity.welcome(a) is Welcome.AS_GUEST
    assert house.affinity.welcome(b) is Welcome.AT_HOME
    seats.append(house.affinity.seat(b, 13))
    assert house.affinity.welcome(a) is Welcome.NOT_NOW, "those who live there will want what is left"
    assert house.affinity.welcome(b) is Welcome.AT_HOME
    house.affinity.leave(seats.pop())
    guest = house.affinity.seat(a, 8)
    assert guest.sampler == 1
    house.affinity.leave(seats.pop())
    assert house.affinity.welcome(a) is Welcome.AT_HOME
    house.affinity.leave(guest)
    house.publish(a)
    assert 1 in house.affinity._adapters[a].held, "it was a guest lately"
    house.publish(a)
    assert 1 not in house.affinity._adapters[a].held


@pytest.mark.parametrize("samplers", range(1, 9))
@pytest.mark.parametrize("seed", range(20))
def test_no_engine_is_asked_for_more_places_than_it_has_and_everyone_has_a_home_though_one_is_dead(
    samplers: int, seed: int
) -> None:
    chance = random.Random(seed)
    live = tuple(chance.randint(2, 5) for _ in range(chance.randint(1, 24)))
    house = House(samplers, seats=16, live=live, up=False)
    affinity, names, seats, dead = house.affinity, [f"a{i}" for i in range(len(live))], list[Seat](), set(range(samplers))
    for sampler in list(dead):
        affinity.up(sampler)
        dead.discard(sampler)
    for name, places in zip(names, live, strict=True):
        house.add(name, rollouts=chance.randint(1, 64), places=places)
    for _ in range(300):
        house.now += chance.expovariate(1.0)
        name = chance.choice(names)
        match chance.choice(["seat", "seat", "seat", "leave", "leave", "publish", "publish", "die", "come"]):
            case "seat" if affinity.welcome(name):
                seats.append(affinity.seat(name, chance.randint(1, 8)))
            case "leave" if seats:
                affinity.leave(seats.pop(chance.randrange(len(seats))))
            case "publish":
                served = affinity.targets(name)
                assert set(affinity.homes(name)) - dead <= set(served)
                for sampler in affinity.leaving(name):
                    assert (name, sampler) not in {(seat.name, seat.sampler) for seat in seats}, "it still has rollouts there"
                    affinity.vacate(name, sampler)
            case "die" if not dead and samplers > 1:
                dead.add(chance.randrange(samplers))
                affinity.down(*dead)
                for seat in [seat for seat in seats if seat.sampler in dead]:
                    affinity.leave(seat)
                    seats.remove(seat)
                assert not any(set(home) <= dead for home in house.homes().values()), "somebody has no home"
            case "come" if dead:
                affinity.up(dead.pop())
        for sampler in range(samplers):
            held = sum(adapter.places for adapter in affinity._adapters.values() if sampler in adapter.held)
            assert held <= house.places
            assert affinity._load[sampler] == sum(seat.rollouts for seat in seats if seat.sampler == sampler)
    for name in names:
        affinity.drop(name)
    assert not any(affinity._load.values())


def test_engines_have_places_for_what_can_be_there_and_no_more() -> None:
    assert engine_places([3] * 8, 1) == (24, 24)
    assert engine_places([3] * 8, 2) == (24, 24), "the other may die"
    assert engine_places([3] * 64, 6) == (45, 3)


def test_an_adapter_that_no_engine_has_places_for_is_refused_with_the_numbers() -> None:
    house = House(samplers=1, live=(3, 3))
    house.add("a", "b")
    assert house.affinity.add("c", 8, 1) == "0 are free: 6 of 6"
    assert not house.affinity.add("b", 8, 3), "a new lineage takes no second places"
    house.affinity.drop("a")
    assert not house.affinity.add("c", 8, 2)
