"""What the pipeline tells whoever watches: typed events as they happen, and statistics whenever asked.

An observer is a plain function that takes an Event. It is called at once, in the pipeline's own thread and order, so it must
be quick and must not wait; what it raises ends the run (an observer is code of ours). `time` is seconds since the pipeline
began, of the pipeline's clock. Nothing here can change the pipeline.

    PhaseChanged        an adapter goes on to another phase           (the table, the timeline)
    RolloutsChanged     more or fewer of them are on the samplers     (the trace; in no file else, for there are many)
    GroupSampled        the siblings of one prompt are complete       (throughput of the samplers)
    LaunchEnded         one trainer launch, shared by some adapters   (throughput of the trainer)
    Synced              every sampler that needs a version has it     (the trace)
    StepTaken           one optimizer step, installed everywhere      (the JSONL line, TensorBoard, Prometheus)
    SampleTold          a rollout of a step or an evaluation, to read (samples.jsonl alone)
    Evaluated           held-out prompts, before or after training
    CheckpointWritten   a state that survives `kill -9`
    AdapterFailed       one adapter's own fault; the others go on
    MemberCounted       what one process of a pool counts of itself   (Prometheus, the summary); asked for, see members.py
    Warned              what the user should know and need not act on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What an adapter is about. Which may follow which is in adapter.py; the last three are ends."""

    JOINING = "joining"  # samplers and trainers are told of it; weights made or loaded
    EVALUATING = "evaluating"  # held-out prompts
    SAMPLING = "sampling"  # waits for the groups of its next step
    QUEUED = "queued"  # its batch waits for a place in a trainer launch
    TRAINING = "training"  # its batch is in a running launch
    SYNCING = "syncing"  # its new version is on the way to the samplers
    CHECKPOINTING = "checkpointing"
    ROLLING_BACK = "rolling back"  # its trainer died: waits for the new one
    EXPORTING = "exporting"  # writes the PEFT folder
    FINISHED = "finished"
    FAILED = "failed"
    LEFT = "left"

    @property
    def ended(self) -> bool:
        """Whether the adapter is done for good."""
        return self in (Phase.FINISHED, Phase.FAILED, Phase.LEFT)


@dataclass(frozen=True)
class PhaseChanged:
    """lineage, version: as the phase begins."""

    time: float
    adapter: str
    phase: Phase
    lineage: int = 0
    version: int = 0


@dataclass(frozen=True)
class RolloutsChanged:
    """in_flight: rollouts of this adapter on the samplers from now on; total: of all adapters."""

    time: float
    adapter: str
    in_flight: int
    total: int


@dataclass(frozen=True)
class GroupSampled:
    """One group left its sampler. start: when it was dispatched; tokens: sampled tokens of all its rollouts."""

    time: float
    adapter: str
    version: int  # the oldest that sampled any of it
    start: float
    sampler: int
    rollouts: int
    tokens: int
    held_out: bool


@dataclass(frozen=True)
class LaunchEnded:
    """One fused step of one trainer. seconds: from launch to reply; tokens: packed tokens by adapter."""

    time: float
    seconds: float
    tokens: Mapping[str, int]
    trainer: int = 0


@dataclass(frozen=True)
class Synced:
    """One version is installed. seconds: from publishing to the last acknowledgement; of that in the broadcast of the slab,
    and in the installs (the slowest sampler's)."""

    time: float
    adapter: str
    lineage: int
    version: int
    seconds: float
    broadcast_seconds: float
    install_seconds: float


@dataclass(frozen=True)
class StepTaken:
    """One optimizer step of one adapter, told when its new version is installed.

    metrics: the trainer's (loss, grad_norm, logprob_diff, ...). environment: means over rollouts of the environment's own.
    staleness: one number a group: the version trained minus the oldest version that sampled a token of it.
    token_ages: the same of every token that was trained: how many there were of each staleness.
    no_signal: share of the groups all of whose rollouts have the advantage 0: their rewards taught nothing.
    """

    time: float
    adapter: str
    lineage: int
    version: int  # after the step
    num_steps: int
    reward: float  # mean over the rollouts of the step
    reward_std: float
    staleness: tuple[int, ...]
    max_staleness: int  # the bound
    rollouts: int
    turns: float  # mean a rollout
    truncated: float  # share of the rollouts
    tokens_sampled: int  # by the policy, in the rollouts of this step
    tokens_trained: int  # packed: prompts included, rows without an advantage left out
    rollout_seconds: float  # waited for the groups
    queue_seconds: float  # waited for a place in a launch
    train_seconds: float  # of the launch, which other adapters may share
    sync_seconds: float  # from publishing to the last acknowledgement
    metrics: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, float] = field(default_factory=dict)
    token_ages: Mapping[int, int] = field(default_factory=dict)
    no_signal: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """reward: mean over `prompts` held-out prompts (a success rate where rewards are 0 and 1)."""

    time: float
    adapter: str
    version: int
    final: bool  # False: eval_base, before the first step; True: eval_final, after the last
    reward: float
    prompts: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Transcript:
    """One rollout as text: role and content of each message of the prompt, and of each one since (tool outputs too)."""

    prompt_index: int
    versions: tuple[int, ...]  # that sampled it, ascending
    reward: float
    tokens: int  # sampled
    turns: int
    truncated: bool  # a turn ended for want of tokens
    prompt: tuple[Mapping[str, str], ...]
    completion: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class SampleTold:
    """Told right after the StepTaken or Evaluated that it belongs to. version: as there."""

    time: float
    adapter: str
    lineage: int
    version: int
    held_out: bool
    transcript: Transcript


@dataclass(frozen=True)
class CheckpointWritten:
    time: float
    adapter: str
    lineage: int
    version: int
    path: str
    seconds: float


@dataclass(frozen=True)
class AdapterFailed:
    """reason: one line; traceback: the whole of it, from the process where it was raised."""

    time: float
    adapter: str
    reason: str
    traceback: str


@dataclass(frozen=True)
class MemberCounted:
    """One process of a pool (samplers, trainers, sync). numbers: since it began, so they start anew when it dies, but for
    `deaths`: of those that filled its place."""

    time: float
    pool: str
    member: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Warned:
    """adapter: empty when it concerns the run as a whole."""

    time: float
    adapter: str
    message: str


Event = (
    PhaseChanged
    | RolloutsChanged
    | GroupSampled
    | LaunchEnded
    | Synced
    | StepTaken
    | SampleTold
    | Evaluated
    | CheckpointWritten
    | AdapterFailed
    | MemberCounted
    | Warned
)
Observer = Callable[[Event], None]


@dataclass(frozen=True)
class Interval:
    """An adapter was in `phase` from `start` to `end` (seconds since the pipeline began; the newest one ends now)."""

    adapter: str
    phase: Phase
    start: float
    end: float


@dataclass(frozen=True)
class AdapterStatistics:
    """One adapter now; after the run, its entry of the summary."""

    name: str
    phase: Phase
    lineage: int
    version: int  # optimizer steps completed
    installed: int | None  # the version that new rollouts start with; None before the first is installed
    num_steps: int
    reward: float | None  # mean of the newest step; None before the first
    rewards: tuple[float, ...]  # mean of each step since version 0, resumed ones too
    staleness: int  # of the newest step's stalest group
    max_staleness: int  # the bound
    max_staleness_seen: int
    staleness_violations: int  # tokens trained beyond the bound, counted in the batches themselves
    groups_in_flight: int  # admitted by the gate, not yet released: at most (max_staleness + 1) * groups_per_step
    rollouts_in_flight: int  # on the samplers now
    tokens_sampled: int  # of the groups that were trained
    tokens_trained: int
    eval_base: float | None
    eval_final: float | None
    joined: float  # seconds since the pipeline began
    ended: float | None
    rollbacks: int
    peft_path: str = ""  # once exported
    traceback: str = ""  # of a failed one


@dataclass(frozen=True)
class PoolStatistics:
    """One pool now. Shares are of the time since the pipeline began.

    load: time integral of in_flight / capacity (at most 1 counts); busy: share of the time with anything in flight.
    """

    capacity: int  # samplers: rollouts; trainers: launches
    in_flight: int
    waiting: int  # samplers: groups waiting for a place; trainers: batches waiting for a launch
    load: float
    busy: float
    busy_seconds: float


@dataclass(frozen=True)
class PipelineStatistics:
    """Everything at one moment."""

    time: float  # seconds since the pipeline began
    adapters: Mapping[str, AdapterStatistics]
    samplers: PoolStatistics
    trainers: PoolStatistics
    warnings: tuple[str, ...] = ()

    @property
    def staleness_violations(self) -> int:
        """Sum over the adapters."""
        return sum(adapter.staleness_violations for adapter in self.adapters.values())
