"""The pipeline's world in virtual time: an event loop whose clock jumps, and three pools that sleep, die and check the laws.

A deadlock (nobody can go on and no timer is set) raises Deadlock at once. The pools assert what must hold: no token
is older than its adapter's bound (law 1, computed here anew), a name means one set of weights (law 2), a rollout names only a
version that its sampler has installed (law 3), a launch is alone and takes each adapter's very next step, nothing in flight
exceeds its bound (law 10), no engine holds more versions than it has places for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import selectors
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from weft.actors.affinity import Affinity, Seat, engine_places
from weft.actors.transcript import told
from weft.configs.schema import AdapterConfig, LossConfig, RunConfig, TrainerConfig
from weft.pipeline.events import Event, PipelineStatistics
from weft.pipeline.interfaces import Pools
from weft.pipeline.run import Pipeline
from weft.transport import messages
from weft.transport.errors import AdapterFault, PeerDiedError
from weft.transport.messages import UNSAMPLED, AdapterRef, Group, Sample, TrainBatch

T = TypeVar("T")


class Deadlock(AssertionError):
    """Nobody can go on."""


class _JumpingSelector(selectors.SelectSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("; ".join(sorted(str(task.get_coro()) for task in asyncio.all_tasks(asyncio.get_running_loop()))))
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Virtual time; what goes to a thread elsewhere is done at once here."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def run_in_executor(self, executor: Executor | None, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:  # type: ignore[override]
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 as a thread would hand it over
            done.set_exception(error)
        return done


def run_virtual(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main()` to its end in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main())
    except Deadlock:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        raise
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@dataclass
class World:
    """What the simulated pools share, and what they saw."""

    random: random.Random
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    samplers: int = 1
    capacity: int = 16  # of each sampler
    live_versions: tuple[int, ...] = (100,) * 10  # that the engines are sized for
    rollout_seconds: float = 1.0
    train_seconds: float = 1.0
    sync_seconds: float = 0.1
    spread: bool = True  # False: every duration is its mean
    restart_seconds: float = 3.0
    count_places: bool = True
    acknowledged: set[AdapterRef] = field(default_factory=set)
    running: Counter[str] = field(default_factory=Counter)  # groups on the samplers
    rollouts: Counter[int] = field(default_factory=Counter)  # by sampler
    served: Counter[tuple[str, int]] = field(default_factory=Counter)  # groups, by adapter and sampler
    syncs: list[int] = field(default_factory=list)  # of each publish: samplers that it went to
    trained: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)  # prompts of each step, by version
    ages: dict[str, list[int]] = field(default_factory=dict)
    launches: list[tuple[str, ...]] = field(default_factory=list)
    expected: dict[str, int] = field(default_factory=dict)  # adapters, as the trainers were told when each came last
    names: dict[AdapterRef, str] = field(default_factory=dict)  # law 2: what each name once meant
    texts: list[tuple[str, int, bool]] = field(default_factory=list)  # adapter, prompt and held_out of groups with texts
    reward: Callable[[str, int], float] | None = None  # None: any from 0 to 1
    loss_fault: Callable[[AdapterRef], bool] = lambda ref: False

    def duration(self, mean: float) -> float:
        """Exponential with this mean, or just that."""
        return mean * self.random.expovariate(1.0) if self.spread else mean

    def rewarded(self, name: str, prompt_index: int) -> float:
        """The reward of one rollout."""
        return self.random.random() if self.reward is None else self.reward(name, prompt_index)

    async def pause(self, mean: float) -> None:
        """Take `mean` seconds on average."""
        await asyncio.sleep(self.duration(mean))


class Process:
    """Something that dies: calls in flight raise PeerDiedError, and it is back after a while, empty."""

    def __init__(
        self, world: World, lost: Callable[[], None] = lambda: None, back: Callable[[], None] = lambda: None
    ) -> None:
        self.world = world
        self.lost, self.back = lost, back
        self.deaths = 0
        self.died: list[asyncio.Event] = [asyncio.Event()]  # of each life
        self.ready = asyncio.Event()
        self.ready.set()
        self._calls: dict[asyncio.Future[None], None] = {}  # in order: a set's would be that of their addresses

    async def work(self, mean: float) -> None:
        """Be busy; raises PeerDiedError if it dies meanwhile or is dead."""
        if not self.ready.is_set():
            raise PeerDiedError(self.why(self.deaths - 1))
        died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls[died] = None
        try:
            async with asyncio.timeout(self.world.duration(mean)):
                await died
        except TimeoutError:
            pass
        finally:
            del self._calls[died]

    def why(self, life: int) -> str:
        """It died in this life of it."""
        return f"killed in life {life}"

    async def die(self) -> None:
        """Die, and come back later."""
        if not self.ready.is_set():
            return
        why = self.why(self.deaths)
        self.died[-1].set()
        self.died.append(asyncio.Event())
        self.deaths += 1
        self.ready.clear()
        self.lost()
        for call in self._calls:
            if not call.done():
                call.set_exception(PeerDiedError(why))
        await self.world.pause(self.world.restart_seconds)
        self.back()
        self.ready.set()


class SimulatedSamplers:
    """Samplers of one process each, under the real policy of who lives where."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.added: set[str] = set()
        self.places, spare = engine_places(world.live_versions, world.samplers)
        clock = asyncio.get_running_loop().time
        self.affinity = Affinity(world.samplers, world.capacity, self.places, spare, clock)
        self.processes = [
            Process(world, lambda k=k: self.lost(k), lambda k=k: self.come(k))  # type: ignore[misc]
            for k in range(world.samplers)
        ]
        self.process = self.processes[0]
        self.held: list[dict[str, AdapterRef]] = [{} for _ in self.processes]
        self.somebody = asyncio.Event()  # is there
        for k in range(world.samplers):
            self.come(k)

    @property
    def capacity(self) -> int:
        return self.affinity.capacity

    def come(self, sampler: int) -> None:
        self.affinity.up(sampler)
        self.somebody.set()

    def lost(self, sampler: int) -> None:
        self.affinity.down(sampler)
        self.held[sampler].clear()
        if not any(process.ready.is_set() for process in self.processes):
            self.somebody.clear()

    def welcome(self, name: str) -> int:
        return self.affinity.welcome(name)

    def seat(self, name: str, rollouts: int) -> Seat:
        seat = self.affinity.seat(name, rollouts)
        self.check_places()
        return seat

    def leave(self, seat: Seat) -> None:
        self.affinity.leave(seat)

    async def wait_ready(self) -> None:
        for process in self.processes:
            await process.ready.wait()

    async def add(self, config: AdapterConfig, lineage: int) -> int | None:
        assert not self.affinity.add(config.name, (config.max_staleness + 1) * config.batch_size, config.live_versions)
        self.world.configs[config.name] = config
        self.added.add(config.name)
        await asyncio.sleep(0)
        return None

    async def drop(self, name: str) -> None:
        self.added.discard(name)
        self.affinity.drop(name)
        for held in self.held:
            held.pop(name, None)
        self.world.acknowledged = {ref for ref in self.world.acknowledged if ref.name != name}

    async def rollout(
        self,
        ref: AdapterRef,
        prompt_index: int,
        group_size: int,
        held_out: bool = False,
        seat: Seat | None = None,
        epoch: int = 0,
        texts: bool = False,
    ) -> Group:
        world, config = self.world, self.world.configs[ref.name]
        assert ref in world.acknowledged, f"law 3: {ref} is not installed"
        assert ref.name in self.added and seat is not None
        world.running[ref.name] += 1
        bound = max((config.max_staleness + 1) * config.groups_per_step, config.eval_prompts)
        assert world.running[ref.name] <= bound or not world.count_places, "law 10: more groups than places"
        try:
            while not self.processes[seat.sampler].ready.is_set() and not self.affinity.move(seat):
                await self.somebody.wait()
            if texts:
                world.texts.append((ref.name, prompt_index, held_out))
            return await self._sample(seat.sampler, ref, prompt_index, group_size, texts)
        finally:
            world.running[ref.name] -= 1

    async def _sample(self, sampler: int, ref: AdapterRef, prompt_index: int, group_size: int, texts: bool) -> Group:
        world = self.world
        world.rollouts[sampler] += group_size
        world.served[ref.name, sampler] += 1
        largest = max(config.group_size for config in world.configs.values())
        crowded = any(process.deaths for process in self.processes) and world.samplers > 1  # those of a dead one have moved in
        assert world.rollouts[sampler] < world.capacity + largest or crowded, "more than a group beyond a full sampler"
        try:
            while self.held[sampler].get(ref.name) != self.newest(ref.name):
                self.affinity.hold(ref.name, sampler)
                self.check_places()
                await self.processes[sampler].work(world.sync_seconds)
                self.held[sampler][ref.name] = self.newest(ref.name)
            there = self.held[sampler][ref.name]
            assert (there.lineage, there.version) >= (ref.lineage, ref.version), f"law 3: {sampler} has {there}, not {ref}"
            await self.processes[sampler].work(world.rollout_seconds)
        finally:
            world.rollouts[sampler] -= group_size
        try:
            rewards = [world.rewarded(ref.name, prompt_index) for _ in range(group_size)]
        except ArithmeticError as error:
            raise AdapterFault("the reward raised", type(error).__name__, "Traceback of the sampler") from None
        said = ({"role": "assistant", "content": json.dumps([ref.lineage, ref.version, prompt_index, rewards])},)
        samples = told([_sample(prompt_index, ref.version, reward, said) for reward in rewards], texts)
        asked = ({"role": "user", "content": f"{prompt_index}"},) if texts else ()
        return Group(ref, prompt_index, samples, sampler, asked)

    def newest(self, name: str) -> AdapterRef:
        """What its homes have acknowledged last."""
        return max((ref for ref in self.world.acknowledged if ref.name == name), key=lambda ref: (ref.lineage, ref.version))

    def install(self, ref: AdapterRef, samplers: dict[int, int]) -> None:
        """On these samplers, if they live in the same life still; and off those that serve it no more."""
        for sampler, deaths in samplers.items():
            if self.processes[sampler].ready.is_set() and self.processes[sampler].deaths == deaths:
                self.held[sampler][ref.name] = ref
        for sampler in self.affinity.leaving(ref.name):
            self.held[sampler].pop(ref.name, None)
            self.affinity.vacate(ref.name, sampler)
        self.check_places()

    def check_places(self) -> None:
        for sampler in range(self.world.samplers):
            holding = {name for name, adapter in self.affinity._adapters.items() if sampler in adapter.held}
            assert holding >= self.held[sampler].keys(), "the books know less than there is"
            assert sum(self.world.configs[name].live_versions for name in holding) <= self.places, "more versions than places"


def _sample(prompt_index: int, version: int, reward: float, said: tuple[dict[str, str], ...] = ()) -> Sample:
    versions = np.array([UNSAMPLED, version, version], dtype=np.int32)
    tokens = np.array([prompt_index, 1, 2], dtype=np.int32)  # a prompt token that names the prompt
    return Sample(tokens, versions, np.zeros(3, dtype=np.float32), reward, metrics={"length": 2.0}, messages=said)


@dataclass
class Weights:
    """A stand-in for one adapter's: `digest` says which steps made them."""

    lineage: int
    version: int
    digest: str


class SimulatedTrainers:
    """One trainer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process = Process(world)
        self.held: dict[str, tuple[int, Weights]] = {}  # with the life of the process in which it was added
        self.stepping = False
        self.expected = 1

    @property
    def capacity(self) -> int:
        return 1

    def expect(self, adapters: int) -> None:
        assert adapters >= 0
        self.expected = adapters

    def home(self, name: str) -> tuple[int]:
        return (self.held[name][0],)

    async def wait_ready(self) -> None:
        await self.process.ready.wait()

    async def add(self, config: AdapterConfig, lineage: int) -> None:
        self.world.expected[config.name] = self.expected
        await self.process.work(0.01)
        if not self._has(config.name):
            self.held[config.name] = (self.process.deaths, Weights(lineage, 0, ""))

    async def drop(self, name: str) -> None:
        assert not self.stepping or name not in self.world.launches[-1], "dropped under a launch"
        self.held.pop(name, None)

    async def move(self, ref: AdapterRef, busy: Collection[Any]) -> bool:
        return False

    async def wait_lost(self, name: str) -> str:
        life, _ = self.held[name]
        await self.process.died[life].wait()
        return self.process.why(life)

    async def step(self, batches: Sequence[TrainBatch]) -> messages.StepResults:
        assert len({self.home(batch.ref.name) for batch in batches}) == 1, "a launch on two processes"
        for batch in batches:
            self._weights(batch.ref)
        assert not self.stepping, "two launches at once"
        self.stepping = True
        self.world.launches.append(tuple(batch.ref.name for batch in batches))
        try:
            await self.process.work(self.world.train_seconds)
        finally:
            self.stepping = False
        return messages.StepResults(tuple(self._train(batch) for batch in batches), self.world.train_seconds)

    def _train(self, batch: TrainBatch) -> messages.StepResult:
        ref, config = batch.ref, self.world.configs[batch.ref.name]
        if self.world.loss_fault(ref):
            return messages.StepResult(ref, len(batch.tokens), {}, "the loss is nan")
        weights = self._weights(ref)
        prompts = tuple(int(token) for token in batch.tokens[batch.offsets[:-1]][:: config.group_size])
        oldest = int(batch.versions[batch.mask].min()) if batch.mask.any() else ref.version
        assert ref.version - oldest <= config.max_staleness, f"law 1: {ref} trains a token of version {oldest}"
        self.world.ages.setdefault(ref.name, []).append(ref.version - oldest)
        steps = self.world.trained.setdefault(ref.name, [])
        del steps[ref.version :]  # done again after a rollback
        steps.append(prompts)
        weights.version += 1
        weights.digest = hashlib.sha256(f"{weights.digest}{prompts}".encode()).hexdigest()
        return messages.StepResult(ref, len(batch.tokens), {"loss": 0.5})

    async def save(self, ref: AdapterRef, folder: str) -> messages.Saved:
        weights = self._weights(ref)
        await self.process.work(0.05)
        text = json.dumps({"version": weights.version, "digest": weights.digest})
        (Path(folder) / "weights.json").write_text(text)
        return messages.Saved({"weights.json": hashlib.sha256(text.encode()).hexdigest()})

    async def load(self, ref: AdapterRef, folder: str) -> None:
        await self.process.work(0.05)
        assert self._has(ref.name), "load before add"
        saved = json.loads((Path(folder) / "weights.json").read_text())
        assert saved["version"] == ref.version
        self.held[ref.name] = (self.process.deaths, Weights(ref.lineage, ref.version, saved["digest"]))

    async def export(self, ref: AdapterRef, folder: str) -> None:
        digest = self._weights(ref).digest
        await self.process.work(0.05)
        (Path(folder) / "adapter.json").write_text(json.dumps({"ref": str(ref), "digest": digest}))

    def weights(self, ref: AdapterRef) -> Weights:
        """For the parameter sync."""
        return self._weights(ref)

    def _has(self, name: str) -> bool:
        return name in self.held and self.held[name][0] == self.process.deaths

    def _weights(self, ref: AdapterRef) -> Weights:
        if not self._has(ref.name):
            raise PeerDiedError(self.process.why(self.held[ref.name][0]))
        weights = self.held[ref.name][1]
        assert (weights.lineage, weights.version) == (ref.lineage, ref.version), f"{ref} is not {weights}"
        return weights


class SimulatedSync:
    """Installs on several samplers, one after the other."""

    def __init__(self, world: World, samplers: SimulatedSamplers, trainers: SimulatedTrainers) -> None:
        self.world, self.samplers, self.trainers = world, samplers, trainers

    async def publish(self, ref: AdapterRef, supersedes: AdapterRef | None) -> messages.Distributed:
        digest = self.trainers.weights(ref).digest
        assert self.world.names.setdefault(ref, digest) == digest, f"law 2: {ref} named other weights before"
        assert supersedes is None or supersedes in self.world.acknowledged
        targets = {k: self.samplers.processes[k].deaths for k in self.samplers.affinity.targets(ref.name)}
        self.world.syncs.append(len(targets))
        await self.trainers.process.work(0.02)  # the slab
        await self.world.pause(self.world.sync_seconds)
        self.samplers.install(ref, targets)
        self.world.acknowledged.add(ref)
        if supersedes is not None:
            self.world.acknowledged.discard(supersedes)
        return messages.Distributed(0.0, 0.0, 0.0)


@dataclass
class Outcome:
    """One simulated run."""

    world: World
    statistics: PipelineStatistics
    events: list[Event]


class Simulation:
    """Pools and a pipeline in the running loop."""

    def __init__(self, world: World, folder: Path, token_budget: int = 10_000, checkpoint_every: int = 2) -> None:
        self.world = world
        self.events: list[Event] = []
        self.samplers = SimulatedSamplers(world)
        self.trainers = SimulatedTrainers(world)
        self.sync = SimulatedSync(world, self.samplers, self.trainers)
        pools = Pools(self.samplers, self.trainers, self.sync)
        settings = RunConfig(dir=str(folder), checkpoint_every=checkpoint_every)
        self.pipeline = Pipeline(settings, TrainerConfig(token_budget=token_budget), pools, [self.events.append])

    async def run(
        self, configs: Sequence[AdapterConfig], beside: Callable[[Simulation], Coroutine[Any, Any, None]] | None = None
    ) -> Outcome:
        """Run the pipeline, with `beside` beside it until it ends."""
        async with asyncio.TaskGroup() as tasks:
            disturbing = tasks.create_task(beside(self)) if beside else None
            statistics = await self.pipeline.run(configs)
            if disturbing:
                disturbing.cancel()
        return Outcome(self.world, statistics, self.events)


def adapter_config(name: str, **settings: Any) -> AdapterConfig:
    """A small one. The KL term keeps every row in its batch, so that the trainer sees every prompt."""
    known = {"num_steps": 6, "batch_size": 4, "group_size": 2, "max_staleness": 1, "eval_prompts": 0}
    return AdapterConfig(name=name, **{**known, "loss": LossConfig(kl_coefficient=0.1), **settings})


def simulate(
    world: World,
    folder: Path,
    configs: Sequence[AdapterConfig],
    beside: Callable[[Simulation], Coroutine[Any, Any, None]] | None = None,
    **settings: Any,
) -> Outcome:
    """One run in virtual time, from nothing or from what `folder` holds."""
    return run_virtual(lambda: _main(world, folder, configs, beside, settings))


async def _main(world: World, folder: Path, configs: Any, beside: Any, settings: dict[str, Any]) -> Outcome:
    return await Simulation(world, folder, **settings).run(configs, beside)


def random_world(seed: int) -> tuple[World, list[AdapterConfig]]:
    """A world and adapters as wild as the settings allow."""
    chance = random.Random(seed)
    configs = []
    for i in range(chance.randint(1, 6)):
        group_size, per_step = chance.randint(2, 4), chance.randint(1, 4)
        configs.append(
            adapter_config(
                f"a{i}",
                num_steps=chance.randint(1, 8),
                group_size=group_size,
                batch_size=group_size * per_step,
                max_staleness=chance.randint(0, 3),
                eval_prompts=chance.choice([0, 0, 5]),
            )
        )
    world = World(
        random.Random(seed + 1),
        live_versions=tuple(config.live_versions for config in configs),
        capacity=chance.randint(1, 24),
        rollout_seconds=10 ** chance.uniform(-1, 1),
        train_seconds=10 ** chance.uniform(-1, 1),
        sync_seconds=10 ** chance.uniform(-2, 0.5),
        restart_seconds=chance.uniform(0.1, 5),
    )
    world.samplers = chance.choice([1, 1, 2, 3, 5])
    return world, configs
