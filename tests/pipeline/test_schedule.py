"""Fair shares of the samplers and shared trainer launches, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import numpy as np
import pytest

from weft.pipeline.schedule import FairShare, StepScheduler
from weft.transport.errors import PeerDiedError
from weft.transport.messages import AdapterRef, StepResult, StepResults, TrainBatch


def batch(name, tokens):
    none = np.zeros(0, np.float32)
    return TrainBatch(AdapterRef(name, 0, 0), np.zeros(tokens, np.int32), none, none, none, none, none, none, 0, 0)


class Hall:
    """One sampler, or several of which `homes` says who lives where; guests wherever a quarter is free."""

    def __init__(self, seats, homes=None):
        self.seats, self.homes = seats, homes or {}
        self.load = Counter()

    @property
    def capacity(self):
        return self.seats * (1 + max(self.homes.values(), default=0))

    def welcome(self, name):
        if self.load[self.homes.get(name, 0)] < self.seats:
            return 2
        return int(any(self.load[sampler] <= 0.75 * self.seats for sampler in self.homes.values()))

    def seat(self, name, rollouts):
        home = self.homes.get(name, 0)
        if self.load[home] >= self.seats:
            home = min(self.homes.values(), key=self.load.__getitem__)
        assert self.load[home] < self.seats, "nobody waits for nothing"
        self.load[home] += rollouts
        return home, rollouts

    def leave(self, seat):
        self.load[seat[0]] -= seat[1]


class Trainer:
    """Takes a second a launch, or `seconds` of the first of its home, which is what a name has before its colon: "x+y:a"."""

    def __init__(self, dies_at=(), seconds=None):
        self.launches = []
        self.running = set()
        self.dies_at = dies_at
        self.seconds = seconds or {}
        self.capacity = max(1, len(self.seconds))

    def home(self, name):
        return (*name.rpartition(":")[0].split("+"),)

    async def step(self, batches):
        (home,) = {self.home(item.ref.name) for item in batches}
        assert home not in self.running, "one launch at a time"
        self.running.add(home)
        self.launches.append([item.ref.name for item in batches])
        number = len(self.launches)
        await asyncio.sleep(self.seconds.get(home[0], 1.0))
        self.running.discard(home)
        if number in self.dies_at:
            raise PeerDiedError("killed")
        results = tuple(StepResult(item.ref, len(item.tokens), {}) for item in batches)
        parts = {item.ref.name: len(item.tokens) // len(home) for item in batches}
        shares = tuple((number, parts) for number in range(len(home)))
        return StepResults(results, 1.0, 0, shares if len(home) > 1 else ())


def scheduled(simulation, submissions, token_budget, trainer=None, on_policy=()):
    """Submit (time, name, tokens); returns the trainer, and by name the result and its time. on_policy: names."""
    trainer, done = trainer or Trainer(), {}

    async def one(scheduler, time, name, tokens):
        await asyncio.sleep(time)
        try:
            stepped = await scheduler.submit(batch(name, tokens))
        except PeerDiedError as error:
            done[name] = (error, asyncio.get_running_loop().time())
        else:
            done[name] = (stepped, asyncio.get_running_loop().time())

    async def main():
        with contextlib.ExitStack() as while_it_lasts:
            async with asyncio.TaskGroup() as tasks:
                scheduler = StepScheduler(trainer, token_budget, tasks, asyncio.get_running_loop().time)
                for name in on_policy:
                    while_it_lasts.enter_context(scheduler.on_policy(name))
                for submission in submissions:
                    tasks.create_task(one(scheduler, *submission))

    simulation.run_virtual(main)
    return trainer, done


def test_all_that_are_ready_at_once_share_a_launch(simulation):
    trainer, _ = scheduled(simulation, [(0, "a", 5), (0, "b", 5), (0, "c", 5)], 100)
    assert trainer.launches == [["a", "b", "c"]]


def test_a_shared_launch_is_all_its_trainers_work(simulation):
    """Three trainers, two of which share an adapter: busy are two, then three, and none is idle beside these."""
    trainer, ended = Trainer(seconds={"x": 4.0, "y": 4.0, "z": 2.0}), []

    async def main():
        async with asyncio.TaskGroup() as tasks:
            clock = asyncio.get_running_loop().time
            scheduler = StepScheduler(trainer, 100, tasks, clock, lambda *told: ended.append(told))
            tasks.create_task(scheduler.submit(batch("x+y:a", 6)))
            await asyncio.sleep(1)
            assert scheduler.statistics().in_flight == 2 and scheduler._balance._idle
            tasks.create_task(scheduler.submit(batch("z:b", 5)))
            await asyncio.sleep(1)
            assert scheduler.statistics().in_flight == 3 and not scheduler._balance._idle
            await asyncio.sleep(2)
            assert scheduler.statistics().load == pytest.approx((2 * 4 + 2) / (3 * 4))

    simulation.run_virtual(main)
    assert ended == [(0, 2.0, {"z:b": 5}), (0, 4.0, {"x+y:a": 3}), (1, 4.0, {"x+y:a": 3})]


def test_those_that_come_while_a_launch_runs_gather_for_the_next(simulation):
    trainer, done = scheduled(simulation, [(0, "a", 5), (0.2, "b", 5), (0.7, "c", 5)], 100)
    assert trainer.launches == [["a"], ["b", "c"]]
    assert done["b"][0].queue_seconds == pytest.approx(0.8)
    assert done["c"][0].train_seconds == pytest.approx(1.0)


def test_a_launch_takes_a_third_of_the_on_policy_adapters_at_most_and_of_others_all_that_wait(simulation):
    trainer, _ = scheduled(simulation, [(0, name, 1) for name in "abcdefgh"], 100, on_policy="abdefg")
    assert trainer.launches == [[*"abch"], [*"de"], [*"fg"]]
    trainer, _ = scheduled(simulation, [(0, name, 1) for name in "abc"], 100, on_policy="ab")
    assert trainer.launches == [[*"ac"], ["b"]], "one, where a third is none"
    several = [(0, f"{home}:{i}", 1) for home in "xy" for i in range(3)]
    trainer, _ = scheduled(simulation, several, 100, on_policy={"x:0", "x:1", "x:2"})
    assert trainer.launches == [["x:0"], ["y:0", "y:1", "y:2"], ["x:1"], ["x:2"]], "of those that live there"


def test_the_oldest_batch_is_in_every_launch_however_many_are_on_policy(simulation):
    chance = random.Random(2)
    several = [(chance.uniform(0, 20), f"a{i}", 1) for i in range(200)]
    on_policy = {f"a{i}" for i in range(0, 200, 2)}
    trainer, _ = scheduled(simulation, several, 100, on_policy=on_policy)
    waiting = [name for _, name, _ in sorted(several)]
    for launch in trainer.launches:
        assert launch[0] == waiting[0], "so each waits for as many launches as were ahead of it, at most"
        assert len(on_policy.intersection(launch)) <= 33
        waiting = [name for name in waiting if name not in launch]
    assert not waiting


def test_who_is_on_policy_no_longer_takes_no_turn(simulation):
    trainer = Trainer()

    async def main():
        async with asyncio.TaskGroup() as tasks:
            scheduler = StepScheduler(trainer, 100, tasks, asyncio.get_running_loop().time)
            with scheduler.on_policy("a"), scheduler.on_policy("b"):
                pass
            for name in "ab":
                tasks.create_task(scheduler.submit(batch(name, 1)))

    simulation.run_virtual(main)
    assert trainer.launches == [["a", "b"]]


def test_a_launch_keeps_the_token_budget_and_a_bigger_batch_goes_alone(simulation):
    trainer, _ = scheduled(simulation, [(0, "a", 6), (0, "huge", 50), (0, "b", 4), (0, "c", 1)], 10)
    assert trainer.launches == [["a", "b"], ["huge"], ["c"]]


def test_the_oldest_batch_is_in_every_launch(simulation):
    chance = random.Random(0)
    submissions = [(chance.uniform(0, 20), f"a{i}", chance.randint(0, 15)) for i in range(200)]
    trainer, done = scheduled(simulation, submissions, 10)
    tokens = {name: size for _, name, size in submissions}
    waiting = [name for _, name, _ in sorted(submissions)]
    for launch in trainer.launches:
        assert launch[0] == waiting[0]
        assert sum(tokens[name] for name in launch) <= 10 or len(launch) == 1
        waiting = [name for name in waiting if name not in launch]
    assert not waiting and len(done) == 200


def test_a_death_fails_the_launch_and_all_that_wait_and_nothing_later(simulation):
    submissions = [(0, "a", 5), (0.5, "b", 5), (0.6, "c", 5), (3.0, "later", 5)]
    trainer, done = scheduled(simulation, submissions, 100, Trainer(dies_at={1}))
    assert [name for name in done if isinstance(done[name][0], PeerDiedError)] == ["a", "b", "c"]
    assert done["later"][1] == 4.0
    assert trainer.launches == [["a"], ["later"]]


def test_a_batch_that_is_cancelled_does_not_go_to_the_trainer(simulation):
    trainer = Trainer()

    async def main():
        async with asyncio.TaskGroup() as tasks:
            scheduler = StepScheduler(trainer, 10, tasks, asyncio.get_running_loop().time)
            tasks.create_task(scheduler.submit(batch("a", 1)))
            await asyncio.sleep(0.5)
            waiting = tasks.create_task(scheduler.submit(batch("b", 1)))
            await asyncio.sleep(0.1)
            waiting.cancel()

    simulation.run_virtual(main)
    assert trainer.launches == [["a"]]


def test_trainers_launch_apart_and_ones_death_is_not_the_others(simulation):
    submissions = [(0.0, "slow:a", 5), (0.0, "fast:b", 5), (0.5, "slow:c", 5), (1.1, "fast:d", 5), (2.2, "fast:e", 5)]
    trainer, done = scheduled(simulation, submissions, 100, Trainer(seconds={"slow": 10.0, "fast": 1.0}))
    assert trainer.launches == [["slow:a"], ["fast:b"], ["fast:d"], ["fast:e"], ["slow:c"]]
    assert {name: time for name, (_, time) in done.items()} == pytest.approx(
        {"slow:a": 10.0, "fast:b": 1.0, "fast:d": 2.1, "fast:e": 3.2, "slow:c": 20.0}
    )
    submissions = [(0.0, "x:a", 5), (0.1, "y:b", 5), (0.2, "x:c", 5), (0.3, "y:d", 5)]
    trainer, done = scheduled(simulation, submissions, 100, Trainer(dies_at=(2,), seconds={"x": 5.0, "y": 1.0}))
    assert {name for name, (result, _) in done.items() if isinstance(result, PeerDiedError)} == {"y:b", "y:d"}


async def sample(share, name, size, seconds, order, running, ticket=None):
    async with share.places(name, size, share.ticket() if ticket is None else ticket):
        order.append(name)
        running[name] += size
        await asyncio.sleep(seconds)
        running[name] -= size


def test_the_next_place_goes_to_the_adapter_with_the_least_in_flight(simulation):
    order, running = [], Counter()

    async def main():
        share = FairShare(Hall(4), asyncio.get_running_loop().time)
        async with asyncio.TaskGroup() as tasks:
            for name in ["a"] * 6 + ["b"] * 2 + ["c"] * 2:
                tasks.create_task(sample(share, name, 1, 10.0 if name == "a" else 1.0, order, running))

    simulation.run_virtual(main)
    assert order[:4] == ["a"] * 4  # alone, it has them all
    assert order[4:] == ["b", "c", "a", "a", "b", "c"]  # fewest in flight, then longest waiting


@pytest.mark.parametrize("seed", range(50))
def test_shares_are_work_conserving_and_bounded(simulation, seed):
    chance = random.Random(seed)
    capacity, sizes = chance.randint(1, 20), {f"a{i}": chance.randint(1, 6) for i in range(chance.randint(2, 6))}
    running = Counter()

    async def client(share, name, seconds):
        for _ in range(30):
            async with share.places(name, sizes[name], share.ticket()):
                running[name] += sizes[name]
                assert sum(running.values()) < capacity + max(sizes.values())
                assert share.statistics().in_flight < capacity + max(sizes.values())
                await asyncio.sleep(chance.expovariate(1.0) * seconds)
                running[name] -= sizes[name]

    async def watch(share):
        while True:
            await asyncio.sleep(0.05)
            statistics = share.statistics()
            assert not statistics.waiting or statistics.in_flight >= capacity

    async def main():
        share = FairShare(Hall(capacity), asyncio.get_running_loop().time)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch(share))
            async with asyncio.TaskGroup() as clients:
                for name in sizes:
                    seconds = chance.uniform(0.1, 5)
                    for _ in range(chance.randint(1, 10)):
                        clients.create_task(client(share, name, seconds))
            watching.cancel()
            assert share.statistics().in_flight == share.statistics().waiting == 0

    simulation.run_virtual(main)


def test_an_adapter_that_floods_the_samplers_does_not_starve_another(simulation):
    order, running, waited = [], Counter(), []

    async def flood(share, tasks):
        for _ in range(2000):
            tasks.create_task(sample(share, "flood", 8, 1.0, order, running))

    async def small(share):
        for _ in range(50):
            began = asyncio.get_running_loop().time()
            async with share.places("small", 1, share.ticket()):
                waited.append(asyncio.get_running_loop().time() - began)
                await asyncio.sleep(0.3)

    async def main():
        share = FairShare(Hall(16), asyncio.get_running_loop().time)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(flood(share, tasks))
            tasks.create_task(small(share))

    simulation.run_virtual(main)
    assert max(waited) <= 1.0


def test_who_has_a_place_at_home_goes_before_guests_and_guests_before_an_empty_place(simulation):
    """a lives on the first of two samplers and b on the second, each of eight seats; a wants more than there is."""
    order, running = [], Counter()

    async def main():
        hall = Hall(8, {"a": 0, "b": 1})
        share = FairShare(hall, asyncio.get_running_loop().time)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(sample(share, "b", 2, 1.0, order, running))
            for _ in range(12):
                tasks.create_task(sample(share, "a", 2, 1.0, order, running))
            await asyncio.sleep(0.5)
            assert dict(hall.load) == {0: 8, 1: 8}, "one group of a is a guest"
            tasks.create_task(sample(share, "b", 2, 1.0, order, running))
            await asyncio.sleep(1)
            assert dict(hall.load) == {0: 8, 1: 8}, "b has a place again, the others are guests'"
            assert running == {"a": 14, "b": 2}

    simulation.run_virtual(main)
    assert order == ["b"] * 3 + ["a"] * 5 + ["b"] + ["a"] * 7


def test_a_group_done_again_keeps_its_turn(simulation):
    order = []

    async def main():
        share = FairShare(Hall(1), asyncio.get_running_loop().time)
        tickets = [share.ticket() for _ in range(4)]
        async with asyncio.TaskGroup() as tasks:
            for i in (3, 1, 2, 0):

                async def one(i=i):
                    async with share.places("a", 1, tickets[i]):
                        order.append(i)
                        await asyncio.sleep(1)

                tasks.create_task(one())

    simulation.run_virtual(main)
    assert order == [3, 0, 1, 2]  # 3 found the place free


def test_a_waiter_that_is_cancelled_at_any_moment_keeps_no_place(simulation):
    async def main():
        share = FairShare(Hall(1), asyncio.get_running_loop().time)
        order, running = [], Counter()
        for turns in range(6):
            async with asyncio.TaskGroup() as tasks:
                holder = tasks.create_task(sample(share, "a", 1, 1.0, order, running))
                await asyncio.sleep(0)
                doomed = tasks.create_task(sample(share, "b", 1, 1.0, order, running))
                await asyncio.sleep(0)
                holder.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
                doomed.cancel()
            assert share.statistics().in_flight == share.statistics().waiting == 0

    simulation.run_virtual(main)


def test_busy_shares_are_integrals_over_time(simulation):
    async def main():
        share = FairShare(Hall(4), asyncio.get_running_loop().time)
        await asyncio.sleep(2)
        async with share.places("a", 2, share.ticket()):
            await asyncio.sleep(2)
            assert share.in_flight("a") == 2
        statistics = share.statistics()
        assert (statistics.load, statistics.busy, statistics.busy_seconds) == (0.25, 0.5, 2.0)

    simulation.run_virtual(main)
