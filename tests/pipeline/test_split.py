"""What an adapter-step needs is found again from a run, and the split that is recommended is the best of all."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import random
import shutil
from dataclasses import dataclass

import pytest

from weft.configs.schema import RunConfig, TrainerConfig
from weft.pipeline.events import GroupSampled, StepTaken
from weft.pipeline.history import GroupSpan, History
from weft.pipeline.interfaces import Pools
from weft.pipeline.metrics import Metrics
from weft.pipeline.run import Pipeline
from weft.pipeline.split import Split, Wanted, Work, account, bound, busy, fit, recommend, splits
from weft.transport.messages import Group, StepResults

TOKENS = 2  # of a simulated rollout
SLAB_S = 0.02  # of a simulated sync, before its own seconds


@dataclass(frozen=True)
class Case:
    """Known work, and what a cluster of `members` is wanted for. first, more: t0 and t1 of the samplers."""

    first: float
    more: float
    training: float
    sync: float
    adapters: int
    staleness: int = 0
    members: int = 6
    places: int = 32
    rollouts: int = 16  # a step
    steps: int = 12
    launch: float = 0.0  # of a launch, beside its batches' own seconds

    @property
    def work(self) -> Work:
        room = self.places / self.rollouts
        return Work(TOKENS * self.first, TOKENS * self.more * self.rollouts, room, self.training, self.sync + SLAB_S)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.adapters, self.adapters * (self.staleness + 1))


CASES = {
    "samplers are the work": Case(0.2, 0.2, 1.0, 0.2, adapters=12),
    "trainers are the work": Case(0.5, 0.01, 2.5, 0.2, adapters=12),
    "both are": Case(0.5, 0.06, 2.2, 0.3, adapters=12),
    "few adapters, stale": Case(1.0, 0.06, 2.0, 0.3, adapters=4, staleness=2),
    "latency is": Case(8.0, 0.01, 0.5, 2.0, adapters=6),
    "five adapters at home": Case(0.05, 0.033, 3.0, 0.1, adapters=5, staleness=2, steps=20),
    "eight processes": Case(0.3, 0.08, 1.5, 0.1, adapters=16, members=8),
    "one adapter, on all trainers": Case(0.3, 0.02, 4.0, 0.1, adapters=1, staleness=3, steps=24),
    "two adapters, on two trainers each": Case(0.3, 0.02, 4.0, 0.1, adapters=2, staleness=3, steps=24),
}


class Engine:
    """A sampler: everything in flight goes on together, a token each first + more * in_flight seconds."""

    def __init__(self, first, more):
        self.first, self.more, self.in_flight = first, more, 0
        self._now = asyncio.get_running_loop().time
        self._tokens, self._since, self._alarm = 0.0, self._now(), None
        self._ends, self._numbers = [], itertools.count()

    async def run(self, rollouts):
        self._advance()
        done = asyncio.get_running_loop().create_future()
        heapq.heappush(self._ends, (self._tokens + TOKENS, next(self._numbers), rollouts, done))
        self.in_flight += rollouts
        self._set()
        await done

    def _advance(self):
        now = self._now()
        self._tokens += (now - self._since) / (self.first + self.more * self.in_flight)
        self._since = now

    def _set(self):
        if self._alarm:
            self._alarm.cancel()
        if self._ends:
            seconds = (self._ends[0][0] - self._tokens) * (self.first + self.more * self.in_flight)
            self._alarm = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._ring)

    def _ring(self):
        self._advance()
        while self._ends and self._ends[0][0] <= self._tokens + 1e-9:
            _, _, rollouts, done = heapq.heappop(self._ends)
            self.in_flight -= rollouts
            done.set_result(None)
        self._set()


def pools(simulation, case, num_samplers, num_trainers):
    """Samplers and trainers of this work, so many of each."""
    # One sampler to the policy of who lives where: what is divided evenly here is each moment's rollouts, not adapters.
    world = simulation.World(random.Random(0), capacity=case.places * num_samplers, spread=False, sync_seconds=case.sync)

    class Samplers(simulation.SimulatedSamplers):
        def __init__(self):
            super().__init__(world)
            self.engines = [Engine(case.first, case.more) for _ in range(num_samplers)]

        async def rollout(self, ref, prompt_index, group_size, held_out=False, seat=None, epoch=0, texts=False):
            assert ref in world.acknowledged
            index = min(range(num_samplers), key=lambda index: self.engines[index].in_flight)
            await self.engines[index].run(group_size)
            samples = tuple(simulation._sample(prompt_index, ref.version, 0.5) for _ in range(group_size))
            return Group(ref, prompt_index, samples, sampler=index)

    class Trainers(simulation.SimulatedTrainers):
        def __init__(self):
            super().__init__(world)
            self.homes = {}

        @property
        def capacity(self):
            return num_trainers

        def home(self, name):
            first = self.homes.setdefault(name, len(self.homes))
            return tuple(range(num_trainers))[first % num_trainers :: case.adapters]

        async def step(self, batches):
            (home,) = {self.home(batch.ref.name) for batch in batches}
            seconds = (case.launch + case.training * len(batches)) / len(home)
            await asyncio.sleep(seconds)
            own = {batch.ref.name: len(batch.tokens) // len(home) for batch in batches}
            shares = tuple((trainer, own) for trainer in home) if len(home) > 1 else ()
            return StepResults(tuple(self._train(batch) for batch in batches), seconds, home[0], shares)

    samplers, trainers = Samplers(), Trainers()
    return Pools(samplers, trainers, simulation.SimulatedSync(world, samplers, trainers))


def run_split(simulation, folder, case, num_samplers, num_trainers, batches=3):
    """(history of a run on this split, adapter-steps a second while all adapters had steps to take). batches: of a launch."""
    configs = [
        simulation.adapter_config(
            f"a{i}", num_steps=case.steps, batch_size=case.rollouts, group_size=4, max_staleness=case.staleness
        )
        for i in range(case.adapters)
    ]
    events, dir = [], folder / f"{num_samplers}-{num_trainers}"

    async def main():
        settings = RunConfig(dir=str(dir / "run"), checkpoint_every=1000)
        with Metrics(dir) as metrics:
            made = pools(simulation, case, num_samplers, num_trainers)
            pipeline = Pipeline(settings, TrainerConfig(token_budget=batches * case.rollouts), made, [metrics, events.append])
            await pipeline.run(configs)

    simulation.run_virtual(main)
    began = min(event.start for event in events if isinstance(event, GroupSampled))
    taken = [event.time for event in events if isinstance(event, StepTaken)]
    return History.read(dir), len(taken) / (max(taken) - began)


@pytest.mark.parametrize("name", CASES)
def test_known_work_is_found_and_the_recommended_split_is_the_best_of_all_simulated(simulation, memory_folder, name):
    case = CASES[name]
    done = {k: run_split(simulation, memory_folder, case, k, case.members - k) for k in range(1, case.members)}
    best = max(speed for _, speed in done.values())
    for samplers, (history, speed) in done.items():
        trainers = case.members - samplers
        assert speed <= 1.001 * bound(case.work, case.wanted, samplers, trainers), "more than can be"
        told = account(history, samplers, trainers, samplers * case.places)
        assert told is not None and (told["adapters"], told["under_way"]) == (case.adapters, case.wanted.under_way)
        assert told["sampler_seconds"] == pytest.approx(case.work.sampler_seconds, rel=0.01)
        assert told["trainer_seconds"] == pytest.approx(case.training, rel=1e-6)
        assert told["sync_seconds"] == pytest.approx(case.work.sync, rel=0.01)
        assert told["steps_per_second"] == pytest.approx(speed)
        assert told["bound"] == pytest.approx(bound(case.work, case.wanted, samplers, trainers), rel=0.05)
        spent = case.training * case.adapters * case.steps / (history.seconds * trainers)
        assert told["trainers_busy"] == pytest.approx(spent) and told["trainers_busy"] <= 1
        asked = told["recommended"]
        assert asked["samplers"] + asked["trainers"] == case.members
        assert done[asked["samplers"]][1] >= 0.97 * best, {k: speed for k, (_, speed) in done.items()}


def test_what_is_done_comes_close_to_what_is_possible(simulation, memory_folder):
    """Where launches are of one adapter each. The rest is the beginning, the end, and waiting for the trainer."""
    case = CASES["both are"]
    for samplers in range(1, case.members):
        _, speed = run_split(simulation, memory_folder, case, samplers, case.members - samplers)
        assert speed >= 0.95 * bound(case.work, case.wanted, samplers, case.members - samplers)


def test_launches_of_on_policy_adapters_are_neither_a_barrier_for_all_nor_one_by_one(simulation, memory_folder):
    """One sampler and one trainer. Eight adapters as a 4B base was measured on two H200s: a rollout of R(n) = 0.47 + 0.085 n s,
    launches of 0.055 + 0.133 k s. And sixteen where launches are the work."""
    as_measured = Case(0.235, 0.085 / 32, 0.133, 0.02, adapters=8, places=256, launch=0.055, steps=10)
    _, speed = run_split(simulation, memory_folder / "a", as_measured, 1, 1, batches=100)
    _, one_by_one = run_split(simulation, memory_folder / "b", as_measured, 1, 1, batches=1)
    assert speed >= 1.08 * one_by_one
    assert speed >= 0.83 * bound(as_measured.work, as_measured.wanted, 1, 1)
    launches_cost = Case(0.27, 0.05 / 32, 0.03, 0.1, adapters=16, places=256, launch=0.3)
    _, speed = run_split(simulation, memory_folder / "c", launches_cost, 1, 1, batches=100)
    _, one_by_one = run_split(simulation, memory_folder / "d", launches_cost, 1, 1, batches=1)
    assert speed >= 2.75 * one_by_one


def random_work(chance: random.Random) -> tuple[Work, Wanted]:
    seconds = [10 ** chance.uniform(-2, 1) for _ in range(4)]
    work = Work(seconds[0], seconds[1], chance.uniform(0.3, 8), seconds[2], seconds[3])
    adapters = chance.randint(1, 40)
    return work, Wanted(adapters, adapters * chance.randint(1, 3))


@pytest.mark.parametrize("seed", range(200))
def test_the_bound_keeps_each_of_its_limits_and_more_of_anything_never_lowers_it(seed):
    chance = random.Random(seed)
    work, wanted = random_work(chance)
    samplers, trainers = chance.randint(1, 9), chance.randint(1, 9)
    most = bound(work, wanted, samplers, trainers)
    launch = work.training / max(trainers // wanted.adapters, 1)
    assert (
        0
        < most
        <= 1.000001
        * min(
            wanted.under_way / (work.latency + launch + work.sync),
            samplers / work.sampler_seconds,
            trainers / work.trainer_seconds,
            wanted.adapters / (launch + work.sync),
        )
    )
    assert bound(work, wanted, samplers + 1, trainers) >= 0.999999 * most
    assert bound(work, wanted, samplers, trainers + 1) >= 0.999999 * most
    staler = Wanted(wanted.adapters, wanted.under_way + wanted.adapters)
    assert bound(work, staler, samplers, trainers) >= 0.999999 * most


@pytest.mark.parametrize("seed", range(50))
def test_the_bound_is_what_little_and_the_rollout_time_agree_on(seed):
    """Where neither places nor trainers are short: the adapters in rollout, and elsewhere, are all there are."""
    chance = random.Random(seed)
    a, b, training, sync = (10 ** chance.uniform(-2, 1) for _ in range(4))
    samplers, under_way = chance.randint(1, 9), chance.randint(1, 100)
    speed = bound(Work(a, b, 1e9, training, sync), Wanted(10**6, under_way), samplers, 10**6)
    in_rollout = under_way - speed * (training + sync)
    assert in_rollout == pytest.approx(speed * (a + b * in_rollout / samplers), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(50))
def test_no_split_of_the_same_processes_has_a_higher_bound_than_the_recommended(seed):
    chance = random.Random(seed)
    work, wanted = random_work(chance)
    members = chance.randint(2, 16)
    every = splits(work, wanted, members)
    assert [(split.samplers, split.trainers) for split in every] == [(k, members - k) for k in range(1, members)]
    asked = recommend(work, wanted, members)
    assert asked in every and asked.bound >= 0.999 * max(split.bound for split in every)


@pytest.mark.parametrize("seed", range(50))
def test_no_split_takes_more_cards_than_there_are_or_leaves_a_process_that_they_would_hold(seed):
    chance = random.Random(seed)
    work, wanted = random_work(chance)
    of_each = (chance.randint(1, 4), chance.randint(1, 4))
    cards = sum(of_each) + chance.randint(0, 12)
    every = splits(work, wanted, cards, of_each)
    assert every and recommend(work, wanted, cards, of_each) in every
    for split in every:
        used = split.samplers * of_each[0] + split.trainers * of_each[1]
        assert cards - of_each[1] < used <= cards and split.samplers >= 1 and split.trainers >= 1
    assert [split.samplers for split in every] == list(range(1, (cards - of_each[1]) // of_each[0] + 1))


def test_of_splits_that_can_do_the_same_the_one_with_most_to_spare_is_recommended():
    work, wanted = Work(latency=100.0, marginal=0.1, room=100.0, training=0.1, sync=0.1), Wanted(4, 4)
    assert recommend(work, wanted, 9) == Split(8, 1, pytest.approx(4 / 100, rel=0.01))
    assert recommend(Work(1.0, 1e-6, 1.0, 1.0, 0.0), Wanted(2, 2), 4).samplers == 2


def span(start: float, end: float, rollouts: int = 4, tokens: int = 40, sampler: int = 0) -> GroupSpan:
    return GroupSpan("a", start, end, rollouts, tokens, False, sampler)


def test_where_the_load_never_changed_all_is_put_down_to_the_load():
    first, more = fit([span(10.0 * i, 10.0 * i + 10.0) for i in range(5)])
    assert first == 0.0 and 10 * more * 4 == pytest.approx(10.0)


@pytest.mark.parametrize("seed", range(30))
def test_neither_part_of_a_samplers_time_is_negative(seed):
    chance = random.Random(seed)
    groups = []
    for _ in range(40):
        start = chance.uniform(0, 50)
        groups.append(
            span(start, start + chance.uniform(0, 20), chance.randint(1, 8), chance.randint(0, 100), chance.randint(0, 2))
        )
    first, more = fit(groups)
    assert first >= 0 and more >= 0 and first + more > 0


def test_a_pools_busy_share_is_a_mean_over_its_processes_in_which_nothing_counts_twice():
    spans = {0: [(0.0, 4.0), (1.0, 3.0), (3.5, 6.0), (8.0, 9.0)], 2: [(5.0, 5.0)]}
    assert busy(spans, 1, 10.0) == pytest.approx(0.7)
    assert busy(spans, 4, 10.0) == pytest.approx(0.7 / 4), "those that never had anything to do count too"


def test_only_the_newest_session_counts(simulation, memory_folder):
    case, slow = CASES["eight processes"], Case(3.0, 3.0, 20.0, 2.0, adapters=2, members=8)
    run_split(simulation, memory_folder, slow, 3, 5)
    events = [json.loads(line) for line in (memory_folder / "3-5" / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(memory_folder / "3-5" / "run")  # another run, though in the same files
    history, _ = run_split(simulation, memory_folder, case, 3, 5)
    assert len(history.sessions) == 2 and len(history.groups) > len(events) / 10
    told = account(history, 3, 5, 3 * case.places)
    assert told is not None and told["trainer_seconds"] == pytest.approx(case.training, rel=1e-6)
    assert told["sampler_seconds"] == pytest.approx(case.work.sampler_seconds, rel=0.01)
    assert told["adapters"] == case.adapters


def test_a_run_without_a_step_has_no_account(tmp_path):
    assert account(History.read(tmp_path), 1, 1, 64) is None
