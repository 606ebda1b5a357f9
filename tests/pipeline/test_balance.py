"""Adapters move to idle trainers when waiting has cost more than moving would, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np
import pytest

from weft.pipeline.balance import FIRST_MOVE_S, PATIENCE
from weft.pipeline.schedule import StepScheduler
from weft.transport.messages import AdapterRef, StepResult, StepResults, TrainBatch


class Trainers:
    """Each takes `seconds` of every adapter of a launch, one after the other; a move takes `move_seconds`."""

    def __init__(self, homes, capacity, seconds, move_seconds=1.0, movable=True):
        self.homes, self.capacity, self.seconds = dict(homes), capacity, seconds
        self.move_seconds, self.movable = move_seconds, movable
        self.moves, self.running, self.moving = [], set(), set()
        self.asked = []  # when a move was asked for

    def home(self, name):
        return (self.homes[name],)

    async def move(self, ref, busy):
        free = [home for home in range(self.capacity) if (home,) not in busy]
        assert free, "asked for nothing"
        self.asked.append(asyncio.get_running_loop().time())
        self.moving.add(ref.name)
        await asyncio.sleep(self.move_seconds)
        self.moving.discard(ref.name)
        if self.movable:
            self.moves.append((ref.name, self.homes[ref.name], free[0]))
            self.homes[ref.name] = free[0]
        return self.movable

    async def step(self, batches):
        names = [item.ref.name for item in batches]
        (home,) = {self.homes[name] for name in names}
        assert home not in self.running and not set(names) & self.moving, "it is trained where it is, and not while it moves"
        self.running.add(home)
        await asyncio.sleep(sum(self.seconds[name] for name in names))
        self.running.discard(home)
        return StepResults(tuple(StepResult(item.ref, 0, {}) for item in batches), 1.0, home)


def steps_of(simulation, trainers, elsewhere, until, seed=0, leave=None):
    """Steps of each adapter in `until` seconds, when it samples and syncs for `elsewhere` seconds between two of them."""
    done, chance = Counter(), random.Random(seed)
    none = np.zeros(0, np.float32)

    async def live(scheduler, name, end):
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(chance.uniform(0.5, 1.5) * elsewhere)
            ref = AdapterRef(name, 0, done[name])
            await scheduler.submit(TrainBatch(ref, np.zeros(5, np.int32), none, none, none, none, none, none, 0, 0))
            done[name] += 1

    async def main():
        async with asyncio.TaskGroup() as tasks:
            scheduler = StepScheduler(trainers, 1, tasks, asyncio.get_running_loop().time)  # a launch each
            for name in trainers.homes:
                tasks.create_task(live(scheduler, name, (leave or {}).get(name, until)))

    simulation.run_virtual(main)
    return done


def test_what_one_trainer_has_too_much_of_moves_to_an_idle_one_and_stays(simulation):
    homes, seconds = dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 1.0)
    moved = Trainers(homes, 2, seconds)
    stayed = Trainers(homes, 2, seconds, movable=False)
    many, few = (sum(steps_of(simulation, trainers, 1.0, 1000.0).values()) for trainers in (moved, stayed))
    assert many > 1.6 * few
    assert sorted(Counter(moved.homes.values()).values()) == [2, 2]
    assert len(moved.moves) == 2


def test_equal_trainers_exchange_nothing_whatever_the_moment_brings(simulation):
    for seed in range(20):
        trainers = Trainers({"a": 0, "b": 1, "c": 0, "d": 1}, 2, dict.fromkeys("abcd", 1.0))
        steps_of(simulation, trainers, 1.0, 500.0, seed)
        assert len(trainers.moves) <= 2, trainers.moves


def test_a_move_that_is_refused_at_once_makes_the_next_one_no_cheaper(simulation):
    refusing = Trainers(dict.fromkeys("abcd", 0), 2, dict.fromkeys("abcd", 1.0), move_seconds=0.0, movable=False)
    steps_of(simulation, refusing, 1.0, 300.0)
    assert len(refusing.asked) > 3
    gaps = np.diff(refusing.asked)
    assert gaps.min() > PATIENCE * FIRST_MOVE_S / len(refusing.homes)


def test_when_the_adapters_of_one_trainer_have_ended_those_of_the_other_come(simulation):
    homes, seconds = {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "f": 1}, dict.fromkeys("abcdef", 1.0)
    trainers = Trainers(homes, 2, seconds)
    steps_of(simulation, trainers, 1.0, 1000.0, leave=dict.fromkeys("abc", 100.0))
    assert {trainers.homes[name] for name in "def"} == {0, 1}
    assert not [move for move in trainers.moves if move[0] in "abc"]


@pytest.mark.parametrize("seed", range(30))
def test_moves_cost_little_beside_the_waiting_that_asked_for_them_and_never_slow_a_run_down(simulation, seed):
    chance = random.Random(seed)
    names, capacity = [f"a{i}" for i in range(chance.randint(2, 10))], chance.randint(2, 4)
    homes = {name: chance.randrange(capacity) for name in names}
    seconds = {name: 10 ** chance.uniform(-0.5, 0.7) for name in names}
    move_seconds, elsewhere = 10 ** chance.uniform(-1, 1), 10 ** chance.uniform(-0.5, 1)
    moved = Trainers(homes, capacity, seconds, move_seconds)
    stayed = Trainers(homes, capacity, seconds, move_seconds, movable=False)
    until = 3000.0
    with_moves = steps_of(simulation, moved, elsewhere, until, seed)
    without = steps_of(simulation, stayed, elsewhere, until, seed)
    assert len(moved.moves) * move_seconds <= len(names) * until / PATIENCE
    work = [sum(count[name] * seconds[name] for name in names) for count in (with_moves, without)]
    assert work[0] > 0.93 * work[1]
