"""One adapter's life: its configuration, lineage, versions, phase and counters.

    JOINING ─> CHECKPOINTING(0) ─> SYNCING ─> EVALUATING ─> SAMPLING ─> QUEUED ─> TRAINING ─> SYNCING ─> SAMPLING ... EXPORTING
    any ─> ROLLING_BACK ─> JOINING (its trainer died: a new lineage from the last checkpoint)
    any ─> FAILED (a fault of its own)          EXPORTING ─> FINISHED or LEFT

Nothing here waits or calls a pool; run.py does, and writes what it learns into here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from weft.configs.schema import AdapterConfig
from weft.pipeline.events import AdapterStatistics, Phase
from weft.pipeline.staleness import StalenessGate
from weft.transport.messages import AdapterRef

_BREAKS = {Phase.ROLLING_BACK, Phase.FAILED}  # what may interrupt any phase that is not an end
LEGAL: dict[Phase, set[Phase]] = {
    Phase.JOINING: {Phase.CHECKPOINTING, Phase.SYNCING, Phase.FINISHED, *_BREAKS},
    Phase.CHECKPOINTING: {Phase.SYNCING, Phase.SAMPLING, Phase.EVALUATING, Phase.EXPORTING, *_BREAKS},
    Phase.SYNCING: {Phase.EVALUATING, Phase.SAMPLING, Phase.CHECKPOINTING, Phase.EXPORTING, *_BREAKS},
    Phase.EVALUATING: {Phase.EVALUATING, Phase.SAMPLING, Phase.CHECKPOINTING, Phase.EXPORTING, *_BREAKS},  # twice: of 0 steps
    Phase.SAMPLING: {Phase.QUEUED, Phase.CHECKPOINTING, Phase.EXPORTING, *_BREAKS},
    Phase.QUEUED: {Phase.TRAINING, *_BREAKS},
    Phase.TRAINING: {Phase.SYNCING, *_BREAKS},
    Phase.ROLLING_BACK: {Phase.JOINING, Phase.FAILED},
    Phase.EXPORTING: {Phase.FINISHED, Phase.LEFT, *_BREAKS},
    Phase.FINISHED: set(),
    Phase.FAILED: set(),
    Phase.LEFT: set(),
}


@dataclass(frozen=True)
class Progress:
    """What the pipeline's own part of a checkpoint holds: all that a resumed run and its summary need."""

    lineage: int = 0
    version: int = 0
    prompts: int = 0  # used up: version * groups_per_step
    rewards: tuple[float, ...] = ()  # mean of each step
    tokens_sampled: int = 0
    tokens_trained: int = 0
    max_staleness_seen: int = 0
    rollbacks: int = 0
    eval_base: float | None = None
    eval_final: float | None = None
    peft_path: str = ""


@dataclass(eq=False)
class Adapter:
    """One adapter. `run.py` moves it on; everybody else reads `statistics`."""

    config: AdapterConfig
    joined: float  # seconds since the pipeline began
    progress: Progress = field(default_factory=Progress)
    phase: Phase = Phase.JOINING
    installed: AdapterRef | None = None  # acknowledged by every sampler; new rollouts start with it
    gate: StalenessGate | None = None  # of this lineage
    checkpointed: int | None = None  # version of the newest checkpoint of this lineage
    staleness: int = 0  # of the newest step's stalest group
    late_tokens: int = 0  # counted in the batches as they were trained, since it joined
    deaths: int = 0  # of its trainer while that worked for it, since it last took a step
    leaving: bool = False
    fault: Exception | None = None  # why this lineage must end: its own AdapterFault, or its trainer's death
    faulted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())  # done with fault
    interrupted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    ended: float | None = None
    traceback: str = ""

    @property
    def name(self) -> str:
        """Its name, unique in the pipeline."""
        return self.config.name

    @property
    def version(self) -> int:
        """Optimizer steps completed."""
        return self.progress.version

    @property
    def ref(self) -> AdapterRef:
        """The weights as the trainer has them now."""
        return AdapterRef(self.name, self.progress.lineage, self.progress.version)

    def enter(self, phase: Phase) -> None:
        """Go on to `phase`; anything but a legal transition is a fault of ours."""
        assert phase in LEGAL[self.phase], f"{self.name}: {self.phase} -> {phase}"
        self.phase = phase

    def begin_lineage(self, progress: Progress) -> None:
        """From here on this is a new history, which begins at `progress`."""
        self.progress = progress
        self.gate = self.checkpointed = self.fault = None
        self.faulted, self.interrupted = (asyncio.get_running_loop().create_future() for _ in range(2))
        if self.leaving:
            self.interrupted.set_result(None)

    def interrupt(self, fault: Exception | None) -> None:
        """End its next wait for groups: with `fault`, which ends an evaluation too, or (None) because it is to leave. Never
        half-way through a step."""
        if fault is None:
            self.leaving = True
        elif self.fault is None:
            self.fault = fault
            self.faulted.set_result(None)
        if not self.interrupted.done():
            self.interrupted.set_result(None)

    def take_step(
        self, reward: float, tokens_sampled: int, tokens_trained: int, ages: Sequence[int], late_tokens: int = 0
    ) -> None:
        """One more optimizer step is completed. reward: its mean; ages: the staleness of each of its groups."""
        before = self.progress
        self.late_tokens += late_tokens
        self.deaths = 0
        self.staleness = max(ages)
        self.progress = replace(
            before,
            version=before.version + 1,
            prompts=before.prompts + self.config.groups_per_step,
            rewards=(*before.rewards, reward),
            tokens_sampled=before.tokens_sampled + tokens_sampled,
            tokens_trained=before.tokens_trained + tokens_trained,
            max_staleness_seen=max(before.max_staleness_seen, self.staleness),
        )

    def raise_fault(self) -> None:
        """Raise what `interrupt` was told, if anything."""
        if self.fault is not None:
            raise self.fault

    def statistics(self, rollouts_in_flight: int) -> AdapterStatistics:
        """This adapter now."""
        progress = self.progress
        return AdapterStatistics(
            name=self.name,
            phase=self.phase,
            lineage=progress.lineage,
            version=progress.version,
            installed=self.installed.version if self.installed else None,
            num_steps=self.config.num_steps,
            reward=progress.rewards[-1] if progress.rewards else None,
            rewards=progress.rewards,
            staleness=self.staleness,
            max_staleness=self.config.max_staleness,
            max_staleness_seen=progress.max_staleness_seen,
            staleness_violations=self.late_tokens,
            groups_in_flight=self.gate.statistics().taken if self.gate else 0,
            rollouts_in_flight=rollouts_in_flight,
            tokens_sampled=progress.tokens_sampled,
            tokens_trained=progress.tokens_trained,
            eval_base=progress.eval_base,
            eval_final=progress.eval_final,
            joined=self.joined,
            ended=self.ended,
            rollbacks=progress.rollbacks,
            peft_path=progress.peft_path,
            traceback=self.traceback,
        )
