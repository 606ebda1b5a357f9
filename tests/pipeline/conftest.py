"""A seeded run in simulated time: the events and statistics that the face of weft is tested on, without any pool behind them.

Eight adapters share `capacity` groups of samplers and one trainer, which takes all that are ready; bounds are held by places,
as the real gate does.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from weft.pipeline.events import (
    AdapterFailed,
    AdapterStatistics,
    CheckpointWritten,
    Evaluated,
    Event,
    GroupSampled,
    LaunchEnded,
    Phase,
    PhaseChanged,
    PipelineStatistics,
    PoolStatistics,
    StepTaken,
    Warned,
)

NAMES = (
    "calculator-grpo",
    "calculator-ppo",
    "calculator-rank-32",
    "sorting",
    "chain-sum",
    "leg-counting",
    "letters",
    "spelling",
)
GROUPS, ROLLOUTS = 4, 8  # groups a step, rollouts a group


@dataclass
class Tracked:
    """One simulated adapter."""

    name: str
    bound: int
    num_steps: int
    base: float
    speed: float  # seconds a group takes
    phase: Phase = Phase.JOINING
    version: int = 0
    places: int = 0
    dispatched: int = 0
    done: deque[int] = field(default_factory=deque)  # oldest version of each finished group
    since: float = 0.0  # when its phase began
    sampled_for: float = 0.0  # seconds it waited for the groups of its next step
    rewards: list[float] = field(default_factory=list)
    seen: int = 0
    eval_base: float | None = None
    eval_final: float | None = None
    sampled: int = 0
    trained: int = 0
    traceback: str = ""


class SyntheticRun:
    """`events()` yields them in order of time; `statistics()` is of the moment reached."""

    def __init__(
        self, seed: int = 0, names: tuple[str, ...] = NAMES, num_steps: int = 30, capacity: int = 12, fail: str = ""
    ) -> None:
        self.random = random.Random(seed)
        self.capacity, self.fail = capacity, fail
        self.now, self.running, self.trainer_free = 0.0, 0, True
        self.sampler_busy = self.sampler_load = self.trainer_busy = 0.0
        self.waiting: deque[Tracked] = deque()
        self.ready: list[Tracked] = []
        self.later: list[tuple[float, int, Callable[[], Iterator[Event]]]] = []
        self.count = 0
        self.adapters = {
            name: Tracked(name, i % 3, num_steps, self.random.uniform(0.2, 0.5), self.random.uniform(0.8, 2.2))
            for i, name in enumerate(names)
        }

    def events(self) -> Iterator[Event]:
        yield Warned(0.0, "", "2 cores: the samplers share them with the trainer")
        for adapter in self.adapters.values():
            yield from self._phase(adapter, Phase.JOINING)
            self._at(1.0, lambda a=adapter: self._evaluate(a, final=False))
        while self.later:
            time, _, action = heapq.heappop(self.later)
            step = time - self.now
            self.sampler_busy += step if self.running else 0.0
            self.sampler_load += step * self.running / self.capacity
            self.now = time
            yield from action()

    def statistics(self) -> PipelineStatistics:
        elapsed = max(self.now, 1e-9)
        busy = self.trainer_busy
        return PipelineStatistics(
            time=self.now,
            adapters={adapter.name: self._adapter(adapter) for adapter in self.adapters.values()},
            samplers=PoolStatistics(
                self.capacity * ROLLOUTS,
                self.running * ROLLOUTS,
                len(self.waiting),
                self.sampler_load / elapsed,
                self.sampler_busy / elapsed,
                self.sampler_busy,
            ),
            trainers=PoolStatistics(1, int(not self.trainer_free), len(self.ready), busy / elapsed, busy / elapsed, busy),
        )

    def _adapter(self, a: Tracked) -> AdapterStatistics:
        return AdapterStatistics(
            name=a.name,
            phase=a.phase,
            lineage=0,
            version=a.version,
            installed=a.version,
            num_steps=a.num_steps,
            reward=a.rewards[-1] if a.rewards else None,
            rewards=tuple(a.rewards),
            staleness=min(a.seen, a.bound),
            max_staleness=a.bound,
            max_staleness_seen=a.seen,
            staleness_violations=0,
            groups_in_flight=(a.bound + 1) * GROUPS - a.places,
            rollouts_in_flight=max(a.dispatched - len(a.done), 0) * ROLLOUTS,
            tokens_sampled=a.sampled,
            tokens_trained=a.trained,
            eval_base=a.eval_base,
            eval_final=a.eval_final,
            joined=0.0,
            ended=self.now if a.phase.ended else None,
            rollbacks=0,
            peft_path=f"adapters/{a.name}" if a.phase is Phase.FINISHED else "",
            traceback=a.traceback,
        )

    def _at(self, delay: float, action: Callable[[], Iterator[Event]]) -> None:
        self.count += 1
        heapq.heappush(self.later, (self.now + delay, self.count, action))

    def _phase(self, adapter: Tracked, phase: Phase) -> Iterator[Event]:
        adapter.phase, adapter.since = phase, self.now
        yield PhaseChanged(self.now, adapter.name, phase)

    def _success(self, adapter: Tracked) -> float:
        progress = 1 / (1 + math.exp(-(adapter.version / adapter.num_steps - 0.35) * 9))
        return adapter.base + (0.97 - adapter.base) * progress

    def _evaluate(self, a: Tracked, final: bool) -> Iterator[Event]:
        yield from self._phase(a, Phase.EVALUATING)
        self._at(a.speed, lambda: self._evaluated(a, final))

    def _evaluated(self, a: Tracked, final: bool) -> Iterator[Event]:
        reward = round(self._success(a) * 64) / 64
        yield Evaluated(self.now, a.name, a.version, final, reward, 64)
        if final:
            a.eval_final = reward
            yield from self._phase(a, Phase.EXPORTING)
            yield from self._phase(a, Phase.FINISHED)
            return
        a.eval_base = reward
        a.places = (a.bound + 1) * GROUPS
        yield from self._phase(a, Phase.SAMPLING)
        yield from self._dispatch()

    def _dispatch(self) -> Iterator[Event]:
        for a in self.adapters.values():
            while a.places and not a.phase.ended and a.version < a.num_steps:
                a.places -= 1
                self.waiting.append(a)
        while self.waiting and self.running < self.capacity:
            a = self.waiting.popleft()
            self.running += 1
            a.dispatched += 1
            self._at(a.speed * self.random.uniform(0.8, 1.4), lambda a=a, v=a.version, t=self.now: self._sampled(a, v, t))
        yield from ()

    def _sampled(self, a: Tracked, version: int, start: float) -> Iterator[Event]:
        self.running -= 1
        a.dispatched -= 1
        a.done.append(version)
        yield GroupSampled(self.now, a.name, version, start, 0, ROLLOUTS, self.random.randint(200, 400), False)
        yield from self._ready(a)
        yield from self._dispatch()

    def _ready(self, a: Tracked) -> Iterator[Event]:
        if a.phase is Phase.SAMPLING and len(a.done) >= GROUPS:
            a.sampled_for = self.now - a.since
            yield from self._phase(a, Phase.QUEUED)
            self.ready.append(a)
            yield from self._launch()

    def _launch(self) -> Iterator[Event]:
        if not self.trainer_free or not self.ready:
            return
        batch, self.ready, self.trainer_free = self.ready, [], False
        seconds = 0.15 + 0.18 * len(batch)
        queued = {a.name: self.now - a.since for a in batch}
        for a in batch:
            yield from self._phase(a, Phase.TRAINING)
        self._at(seconds, lambda: self._trained(batch, seconds, queued))

    def _trained(self, batch: list[Tracked], seconds: float, queued: dict[str, float]) -> Iterator[Event]:
        self.trainer_free = True
        self.trainer_busy += seconds
        tokens = {a.name: self.random.randint(1500, 3000) for a in batch}
        yield LaunchEnded(self.now, seconds, tokens)
        for a in batch:
            if a.name == self.fail and a.version == a.num_steps // 2:
                a.traceback = (
                    'Traceback (most recent call last):\n  File "reward.py", line 3\nZeroDivisionError: division by zero'
                )
                yield AdapterFailed(self.now, a.name, "ZeroDivisionError: division by zero", a.traceback)
                yield from self._phase(a, Phase.FAILED)
                continue
            yield from self._phase(a, Phase.SYNCING)
            sync = self.random.uniform(0.03, 0.12)
            self._at(sync, lambda a=a, s=sync: self._installed(a, tokens[a.name], queued[a.name], seconds, s))
        yield from self._launch()

    def _installed(self, a: Tracked, tokens: int, queue: float, train: float, sync: float) -> Iterator[Event]:
        staleness = tuple(a.version - a.done.popleft() for _ in range(GROUPS))
        reward = min(max(self._success(a) + self.random.gauss(0, 0.05), 0), 1)
        a.version += 1
        a.places += GROUPS
        a.rewards.append(reward)
        a.seen = max(a.seen, *staleness)
        sampled = self.random.randint(1000, 1500)
        a.sampled, a.trained = a.sampled + sampled, a.trained + tokens
        metrics = {
            "loss": self.random.gauss(0, 0.02),
            "grad_norm": self.random.uniform(0.2, 0.9),
            "logprob_diff": self.random.uniform(1e-5, 5e-5),
            "kl": a.version * 2e-3,
            "entropy": 0.9 - 0.02 * a.version,
        }
        yield StepTaken(
            self.now, a.name, 0, a.version, a.num_steps, reward, 0.4, staleness, a.bound, GROUPS * ROLLOUTS, 1.5, 0.02,
            sampled, tokens, a.sampled_for, queue, train, sync, metrics, {"turns": 1.5},
        )  # fmt: skip
        if a.version % 5 == 0:
            yield CheckpointWritten(self.now, a.name, 0, a.version, f"checkpoints/{a.name}/{a.version}", 0.01)
        if a.version == a.num_steps:
            yield from self._evaluate(a, final=True)
            return
        yield from self._phase(a, Phase.SAMPLING)
        yield from self._dispatch()
        yield from self._ready(a)


@pytest.fixture(scope="session")
def synthetic_run() -> type[SyntheticRun]:
    """The class: a test makes the run it needs."""
    return SyntheticRun


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder where `fsync` costs nothing, if the machine has one: for tests that are not about the disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="weft-test-") as folder:
        yield Path(folder)
