"""What has happened: passes events to the observers, and keeps the few things that statistics are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from weft.pipeline.adapter import Adapter
from weft.pipeline.batch import Ready, sampled_tokens
from weft.pipeline.evaluate import Evaluation
from weft.pipeline.events import (
    AdapterFailed,
    Evaluated,
    Event,
    GroupSampled,
    LaunchEnded,
    Observer,
    Phase,
    PhaseChanged,
    RolloutsChanged,
    SampleTold,
    StepTaken,
    Synced,
    Transcript,
    Warned,
)
from weft.pipeline.schedule import Stepped
from weft.pipeline.staleness import oldest_version
from weft.transport.messages import Distributed, Group

MAX_WARNINGS = 1_000


class Journal:
    """One run's. `now` is seconds since it began."""

    def __init__(self, observers: Sequence[Observer], clock: Callable[[], float]) -> None:
        self._observers = tuple(observers)
        self._clock = clock
        self._began = clock()
        self._warnings: deque[str] = deque(maxlen=MAX_WARNINGS)

    def now(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    def tell(self, event: Event) -> None:
        """Pass `event` to every observer."""
        for observer in self._observers:
            observer(event)

    def enter(self, adapter: Adapter, phase: Phase) -> None:
        """Move the adapter on to `phase`, and say so."""
        adapter.enter(phase)
        self.note_phase(adapter)

    def note_phase(self, adapter: Adapter) -> None:
        """Say which phase the adapter is in."""
        self.tell(PhaseChanged(self.now(), adapter.name, adapter.phase, adapter.ref.lineage, adapter.version))

    def warn(self, adapter: str, message: str) -> None:
        """Say what the user should know."""
        self._warnings.append(f"{adapter}: {message}" if adapter else message)
        self.tell(Warned(self.now(), adapter, message))

    def warn_once(self, adapter: str, message: str) -> None:
        """Say it, unless it was said."""
        if (f"{adapter}: {message}" if adapter else message) not in self._warnings:
            self.warn(adapter, message)

    def launch_ended(self, trainer: int, seconds: float, tokens: Mapping[str, int]) -> None:
        """Say that a trainer launch ended."""
        self.tell(LaunchEnded(self.now(), seconds, tokens, trainer))

    def rollouts_changed(self, name: str, in_flight: int, total: int) -> None:
        """Say how many rollouts are on the samplers."""
        self.tell(RolloutsChanged(self.now(), name, in_flight, total))

    def synced(self, adapter: Adapter, began: float, done: Distributed) -> float:
        """Say that the adapter's version is installed; returns the seconds that took since `began`."""
        ref, now = adapter.ref, self.now()
        parts = (now - began, done.broadcast_seconds, done.install_seconds)
        self.tell(Synced(now, ref.name, ref.lineage, ref.version, *parts))
        return now - began

    def group_sampled(self, adapter: Adapter, group: Group, began: float, held_out: bool) -> None:
        """Say that a group left its sampler."""
        tokens = sum(sampled_tokens(sample) for sample in group.samples)
        version, rollouts = oldest_version(group), len(group.samples)
        self.tell(GroupSampled(self.now(), adapter.name, version, began, group.sampler, rollouts, tokens, held_out))

    def evaluated(self, adapter: Adapter, result: Evaluation, final: bool) -> None:
        """Say how an evaluation went."""
        own = result.figures
        self.tell(Evaluated(self.now(), adapter.name, adapter.version, final, own.reward, result.prompts, own.environment))
        self._told(adapter, result.transcripts, held_out=True)

    def failed(self, adapter: Adapter, reason: str) -> None:
        """Say that the adapter's own fault ended it."""
        self.tell(AdapterFailed(self.now(), adapter.name, reason, adapter.traceback))

    def step_taken(self, adapter: Adapter, ready: Ready, waited: float, step: Stepped, sync_seconds: float) -> None:
        """Say that a step of `adapter` is taken and installed. waited: seconds for its groups."""
        rollouts = ready.figures
        self.tell(
            StepTaken(
                time=self.now(),
                adapter=adapter.name,
                lineage=adapter.ref.lineage,
                version=adapter.version,
                num_steps=adapter.config.num_steps,
                reward=rollouts.reward,
                reward_std=rollouts.reward_std,
                no_signal=ready.no_signal,
                staleness=ready.ages,
                token_ages=ready.token_ages,
                max_staleness=adapter.config.max_staleness,
                rollouts=rollouts.rollouts,
                turns=rollouts.turns,
                truncated=rollouts.truncated,
                tokens_sampled=rollouts.tokens_sampled,
                tokens_trained=step.result.tokens,
                rollout_seconds=waited,
                queue_seconds=step.queue_seconds,
                train_seconds=step.train_seconds,
                sync_seconds=sync_seconds,
                metrics=dict(step.result.metrics),
                environment=rollouts.environment,
            )
        )
        self._told(adapter, ready.transcripts, held_out=False)

    def warnings(self) -> tuple[str, ...]:
        """All that was warned of."""
        return tuple(self._warnings)

    def _told(self, adapter: Adapter, transcripts: Sequence[Transcript], held_out: bool) -> None:
        for transcript in transcripts:
            self.tell(SampleTold(self.now(), adapter.name, adapter.ref.lineage, adapter.version, held_out, transcript))
