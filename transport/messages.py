"""Every type that crosses a process boundary, on one screen. Arrays travel as raw frames beside the header (codec.py).

A request names its reply in its docstring. `Done` is the reply that says no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
UNSAMPLED = -1  # in `Sample.versions`: a prompt or tool token, which no version sampled


@dataclass(frozen=True)
class AdapterRef:
    """(name, lineage, version) names one set of weights for ever."""

    name: str
    lineage: int
    version: int

    def __str__(self) -> str:
        return f"{self.name}/{self.lineage}/{self.version}"


# ---- what a sampler makes and a trainer takes: T tokens of one trajectory, all turns ----


@dataclass(frozen=True)
class Sample:
    """One rollout. tokens int32 [T]; versions int32 [T], UNSAMPLED where the policy did not sample (prompt, tool output);
    logprobs float32 [T], of the distribution sampled from, 0 where unsampled."""

    tokens: Array
    versions: Array
    logprobs: Array
    reward: float
    turns: int = 1
    truncated: bool = False  # a turn ended at max_tokens or at the model's length
    metrics: Mapping[str, float] = field(default_factory=dict)  # the environment's own
    messages: tuple[Mapping[str, str], ...] = ()  # for people, since the prompt (actors/transcript.py); Rollout.texts: of whom


@dataclass(frozen=True)
class Group:
    """The siblings of one prompt, sampled under `ref` (the oldest version among them)."""

    ref: AdapterRef
    prompt_index: int
    samples: tuple[Sample, ...]
    sampler: int = 0
    prompt: tuple[Mapping[str, str], ...] = ()  # its messages, with Rollout.texts


@dataclass(frozen=True)
class TrainBatch:
    """One adapter's optimizer step, packed: T tokens of n rows, no padding. tokens int32 [T]; offsets int32 [n + 1] (row i is
    offsets[i]:offsets[i+1]); mask bool [T] (this token was sampled and has a loss); sampler_logprobs float32 [T]; versions
    int32 [T]; advantages float32 [n]; groups int32 [n] (siblings share one)."""

    ref: AdapterRef
    tokens: Array
    offsets: Array
    mask: Array
    sampler_logprobs: Array
    versions: Array
    advantages: Array
    groups: Array
    loss_tokens: int  # the denominators of the whole step: ...
    loss_rows: int  # ... rows left out (advantage 0) still count in both


@dataclass(frozen=True)
class SlabHandle:
    """Where one adapter's weights can be had: `path` of a shared-memory file on `host`, or the bytes themselves in `data`."""

    ref: AdapterRef
    nbytes: int
    dtype: str
    rank: int
    scale: float
    modules: tuple[str, ...]  # Hugging Face names in slab order (actors/lora.py: SlabLayout)
    canary_logprob: float | None  # the trainer's, of the canary tokens under these weights; None: it comes as `Canary`
    base_logprob: float  # ... and under the base alone
    host: str = ""
    path: str = ""
    on_device: bool = False  # the file says where on a GPU they are (actors/slab_ipc.py)
    data: Array | None = None  # uint8 [nbytes]
    checksum: int = 0  # actors/checksum.py; 0: not known
    canary_noise: float = 0.0  # as in Canary
    audited: bool = True  # new rollouts wait for its canary; else for the proof of its bytes alone


# ---- requests to any actor ----


@dataclass(frozen=True)
class Done:
    """It is done."""


@dataclass(frozen=True)
class GetStatistics:
    """-> the actor's own statistics."""


@dataclass(frozen=True)
class AddAdapter:
    """-> AdapterAdded. config: AdapterConfig as a mapping. Idempotent: the same adapter again changes nothing."""

    config: Mapping[str, Any]
    lineage: int = 0


@dataclass(frozen=True)
class AdapterAdded:
    """num_prompts: training prompts of its environment, None if endless (samplers)."""

    num_prompts: int | None = None


@dataclass(frozen=True)
class DropAdapter:
    """-> Done. Everything held for this adapter goes; leased versions go when their leases end."""

    name: str


# ---- requests to a sampler ----


@dataclass(frozen=True)
class Rollout:
    """-> Group of one prompt's rollouts under `ref`, or, once that is retired, under the newest of its lineage that is here."""

    ref: AdapterRef
    prompt_index: int
    group_size: int
    held_out: bool = False
    epoch: int = 0  # how often its adapter had this prompt before: each time is drawn anew
    texts: bool = False  # with the messages of the prompt, of the best rewarded sample and of the worst; else of none


@dataclass(frozen=True)
class Receive:
    """-> Done, once the worker waits for it. Broadcast number `sequence` of group `epoch` brings this slab to this sampler."""

    handle: SlabHandle
    store: str  # host:port of the rendezvous store
    epoch: str
    rank: int  # of the engine's first worker; the others follow
    world_size: int
    backend: str
    deadline_s: float
    sequence: int = 0


@dataclass(frozen=True)
class Install:
    """-> Done, when new rollouts may name it: applied, its bytes proven, and its canary where it is audited."""

    ref: AdapterRef


@dataclass(frozen=True)
class Canary:
    """-> Done, of a sampler, whose Install waits for it, and of a relay, which tells the samplers: the trainer's."""

    ref: AdapterRef
    logprob: float
    noise: float = 0.0  # what rounding does to it, in nats, where it was asked to look closely (actors/canary.py)


@dataclass(frozen=True)
class Retire:
    """-> Done. No new rollout will name this version; it goes when its last lease ends."""

    ref: AdapterRef


@dataclass(frozen=True)
class SamplerStatistics:
    pid: int
    engine_pid: int
    live_versions: tuple[str, ...]
    rollouts_in_flight: int
    tokens_sampled: int
    installs: int
    busy_seconds: float
    prompt_tokens: int = 0  # of all turns ...
    cached_tokens: int = 0  # ... and of these, what the engine's prefix cache had


# ---- requests to a trainer ----


@dataclass(frozen=True)
class TrainStep:
    """-> StepResults. One fused forward and backward over all batches, then one optimizer step each."""

    batches: tuple[TrainBatch, ...]


@dataclass(frozen=True)
class TrainShare:
    """-> StepResults of one. As TrainStep, for rows of a batch whose others are with other trainers: their gradients are added
    up before each of them steps. rank, world_size: in the group `epoch`; all of them get the message."""

    batch: TrainBatch
    store: str  # host:port of the rendezvous store
    epoch: str
    rank: int
    world_size: int
    backend: str
    deadline_s: float


@dataclass(frozen=True)
class EndShare:
    """-> Done, at once: whoever waits in this group waits no more."""

    epoch: str


@dataclass(frozen=True)
class ForwardBackward:
    """-> StepResults. Adds to the gradients of these adapters; no weight changes."""

    batches: tuple[TrainBatch, ...]


@dataclass(frozen=True)
class OptimStep:
    """-> StepResults. Clips, steps and zeroes the gradients of the named adapters."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class StepResult:
    """metrics: loss, grad_norm, logprob_diff (mean |trainer - sampler| over tokens of this very version), kl, ratio ...
    fault: why the step was not taken (a loss or gradient that is not finite); the weights are unchanged then."""

    ref: AdapterRef
    tokens: int
    metrics: Mapping[str, float]
    fault: str = ""
    slab: SlabHandle | None = None  # of the new version, where it can be had already


@dataclass(frozen=True)
class StepResults:
    results: tuple[StepResult, ...]
    seconds: float
    trainer: int = 0  # which made them; its pool says so
    shares: tuple[tuple[int, Mapping[str, int]], ...] = ()  # of several trainers: each one's number, and tokens by adapter


@dataclass(frozen=True)
class Score:
    """-> Scores. The trainer's log-probabilities of every masked token; nothing changes."""

    batch: TrainBatch


@dataclass(frozen=True)
class Scores:
    """logprobs, base_logprobs float32 [T], 0 where unmasked."""

    logprobs: Array
    base_logprobs: Array


@dataclass(frozen=True)
class Publish:
    """-> SlabHandle of the adapter's weights as they are now, whose version must be `ref`."""

    ref: AdapterRef


@dataclass(frozen=True)
class AskCanary:
    """-> Canary of the adapter's weights as they are now, whose version must be `ref`. closely: and its noise."""

    ref: AdapterRef
    closely: bool = False


@dataclass(frozen=True)
class Save:
    """-> Saved. Writes masters, moments, step and random state of one adapter into `folder`."""

    ref: AdapterRef
    folder: str


@dataclass(frozen=True)
class Saved:
    """checksums: file name -> SHA-256 of it, hexadecimal."""

    checksums: Mapping[str, str]


@dataclass(frozen=True)
class Load:
    """-> Done. Replaces one adapter's state by what `Save` wrote, as `ref` (whose lineage is new)."""

    ref: AdapterRef
    folder: str


@dataclass(frozen=True)
class Export:
    """-> Done. Writes a PEFT folder (adapter_config.json, adapter_model.safetensors)."""

    ref: AdapterRef
    folder: str


@dataclass(frozen=True)
class TrainerStatistics:
    pid: int
    adapters: Mapping[str, int]  # adapters by tier: device, host, disk
    steps: int
    tokens_trained: int
    busy_seconds: float


# ---- requests to a parameter sync ----


@dataclass(frozen=True)
class Distribute:
    """-> Distributed, when every named sampler has installed it. Takes the slab over: the trainer may go on."""

    handle: SlabHandle
    samplers: tuple[int, ...]
    supersedes: AdapterRef | None = None  # retired on the same samplers once this one is installed


@dataclass(frozen=True)
class AwaitSent:
    """-> Done, when the slab of this version has been broadcast: what is left are installs, and what they wait for."""

    ref: AdapterRef


@dataclass(frozen=True)
class Distributed:
    seconds: float  # from the request to the last acknowledgement
    broadcast_seconds: float
    install_seconds: float
    notice: str = ""  # of a change that the user should know of, once


@dataclass(frozen=True)
class JoinSampler:
    """-> Done, when this sampler answers; it holds nothing yet. A new endpoint replaces the old. workers: its engine's."""

    sampler: int
    endpoint: str
    workers: int = 1


@dataclass(frozen=True)
class Serve:
    """-> Done, when this sampler has the newest version of this adapter that the relay holds."""

    sampler: int
    name: str


@dataclass(frozen=True)
class Withdraw:
    """-> Done, when this sampler, which serves the adapter no more, has retired this version."""

    sampler: int
    ref: AdapterRef


@dataclass(frozen=True)
class LeaveSampler:
    """-> Done. Groups with this sampler are dissolved; waits for it end."""

    sampler: int


@dataclass(frozen=True)
class SyncStatistics:
    pid: int
    held: tuple[str, ...]  # refs of the newest versions
    distributed: int
    epoch: int
    bytes_sent: int
    backend: str = "gloo"  # in use now: gloo goes through the host
