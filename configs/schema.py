"""Every setting of weft: frozen dataclasses, one per component; a component receives its own and no more.

Validation is in `__post_init__`; a message holds the setting, its value and the rule. Derived values are
properties with their formula. `build.build` makes these from the mappings that Hydra composes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_LINEAR = "all-linear"
MAX_RANK = 512
MAX_NAME = 128  # characters of an adapter's name, which is part of file names
SCHEDULES = ("constant", "linear", "cosine")
LOSSES = ("importance_sampling", "ppo", "grpo", "dr_grpo", "cispo", "gspo", "dppo", "decoupled_ppo", "cross_entropy")
ADVANTAGES = ("auto", "grpo", "dr_grpo", "rloo", "reinforce")
NORMALIZATIONS = ("auto", "token", "sequence", "constant")
CORRECTIONS = ("none", "tis", "icepop")
ROLLOUT_VERSIONS = ("pinned", "between_turns")
DTYPES = ("float32", "bfloat16", "bfloat16+fp8")
SYNC_BACKENDS = ("gloo", "nccl", "nccl-or-gloo")


def _check(rule: bool, name: str, value: object, text: str) -> None:
    if not rule:
        raise ValueError(f"{name}={value!r}: must be {text}")


def _one_of(name: str, value: str, known: Collection[str]) -> None:
    _check(value in known, name, value, "one of " + ", ".join(known))


@dataclass(frozen=True)
class LoraConfig:
    """The shape of one adapter (LoRA, Hu et al. 2021): delta W = alpha / rank * B A."""

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)  # "all-linear", or Hugging Face names such as q_proj
    exclude_modules: tuple[str, ...] = ()
    warm_start: str | None = None  # a PEFT folder of the same shape

    def __post_init__(self) -> None:
        _check(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"from 1 to {MAX_RANK}")
        _check(self.alpha > 0, "alpha", self.alpha, "above 0")
        _check(len(self.target_modules) > 0, "target_modules", self.target_modules, "a list of at least one name")

    @property
    def scale(self) -> float:
        """alpha / rank"""
        return self.alpha / self.rank


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) of one adapter, with its own schedule and clip."""

    learning_rate: float = 1e-4
    schedule: str = "constant"  # after warm-up: constant, linear or cosine to 0 over num_steps
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check(self.learning_rate >= 0, "learning_rate", self.learning_rate, "at least 0")
        _one_of("schedule", self.schedule, SCHEDULES)
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        _check(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to below 1")
        _check(self.eps > 0, "eps", self.eps, "above 0")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")


@dataclass(frozen=True)
class LossConfig:
    """What one adapter minimises. The formulas and their sources are in actors/loss.py and pipeline/advantage.py."""

    name: str = "grpo"
    advantage: str = "auto"
    normalization: str = "auto"  # token: / loss tokens; sequence: mean of row means; constant: / (rows * max_tokens)
    clip_low: float = 0.2  # the ratio is kept above 1 - clip_low ...
    clip_high: float = 0.2  # ... and below 1 + clip_high
    kl_coefficient: float = 0.0  # weight of the KL divergence to the base model
    correction: str = "none"  # for the mismatch of sampler and trainer: tis truncates the weight, icepop masks the token
    correction_cap: float = 2.0

    def __post_init__(self) -> None:
        _one_of("name", self.name, LOSSES)
        _one_of("advantage", self.advantage, ADVANTAGES)
        _one_of("normalization", self.normalization, NORMALIZATIONS)
        _check(0 < self.clip_low <= 1, "clip_low", self.clip_low, "above 0 and at most 1")
        _check(self.clip_high > 0, "clip_high", self.clip_high, "above 0")
        _check(self.kl_coefficient >= 0, "kl_coefficient", self.kl_coefficient, "at least 0")
        _one_of("correction", self.correction, CORRECTIONS)
        _check(self.correction_cap >= 1, "correction_cap", self.correction_cap, "at least 1")
        uncorrected = self.correction == "none" or self.name != "cross_entropy"
        _check(uncorrected, "correction", self.correction, "none with name=cross_entropy, which has no ratio to correct")
        weighed = self.advantage == "auto" or self.name != "cross_entropy"
        _check(weighed, "advantage", self.advantage, "auto with name=cross_entropy, whose rows weigh what their reward is")

    @property
    def estimator(self) -> str:
        """advantage, where auto is the loss's own: dr_grpo for dr_grpo, grpo for the others."""
        own = "dr_grpo" if self.name == "dr_grpo" else "grpo"
        return own if self.advantage == "auto" else self.advantage

    @property
    def denominator(self) -> str:
        """normalization, where auto is the loss's own: constant for dr_grpo, sequence for gspo, token for the others."""
        own = {"dr_grpo": "constant", "gspo": "sequence"}
        return own.get(self.name, "token") if self.normalization == "auto" else self.normalization


@dataclass(frozen=True)
class SamplingConfig:
    """How one adapter's rollouts are drawn. The sampler's log-probabilities are of the distribution after temperature, top-p
    and top-k; the trainer's know the temperature alone, so with top-p or top-k a ratio is below 1 before any step is taken."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    max_tokens: int = 128  # new tokens a turn
    stop: tuple[str, ...] = ()  # texts that end a turn; the environment reads what stands before, the model learns both
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0  # with the adapter's name, the prompt's index and epoch, and the sample's, seeds each rollout

    def __post_init__(self) -> None:
        # vLLM refuses what is hotter, and samples what is colder at 0.01 without saying so to the trainer
        _check(0.01 <= self.temperature <= 2, "temperature", self.temperature, "from 0.01 to 2")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.top_k == -1 or self.top_k > 0, "top_k", self.top_k, "-1 (off) or above 0")
        _check(self.max_tokens > 0, "max_tokens", self.max_tokens, "above 0")
        _check(all(self.stop), "stop", self.stop, "texts that are not empty")
        _check(all(token >= 0 for token in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids from 0")


@dataclass(frozen=True)
class EnvironmentConfig:
    """The task: a built-in name (calculator, reasoning_gym, jsonl) or the dotted path of a class of the user's."""

    target: str = "calculator"
    settings: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the class
    max_turns: int = 8

    def __post_init__(self) -> None:
        _check(bool(self.target), "target", self.target, "a built-in name or a dotted path")
        _check(self.max_turns > 0, "max_turns", self.max_turns, "above 0")


@dataclass(frozen=True)
class AdapterConfig:
    """One experiment: one LoRA policy, its task, its algorithm and its staleness bound."""

    name: str
    num_steps: int = 30
    batch_size: int = 64  # rollouts an optimizer step
    group_size: int = 8  # rollouts of one prompt
    max_staleness: int = 1  # optimizer steps between the oldest token sampled and the step that trains it, at most
    rollout_version: str = "pinned"  # pinned: the version a rollout starts with; between_turns: the newest at each turn
    eval_prompts: int = 64  # held-out prompts, sampled before the first and after the last step; 0: no evaluation
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        plain = self.name.isascii() and all(c.isalnum() or c in "._-" for c in self.name) and self.name[:1].isalnum()
        rule = f"letters a to z, digits, '.', '_' and '-', starting with a letter or digit, at most {MAX_NAME} in all"
        _check(plain and len(self.name) <= MAX_NAME, "name", self.name, rule)
        _check(self.num_steps >= 0, "num_steps", self.num_steps, "at least 0")
        _check(self.batch_size > 0, "batch_size", self.batch_size, "above 0")
        _check(self.group_size > 0, "group_size", self.group_size, "above 0")
        fits = self.batch_size % self.group_size == 0
        _check(fits, "batch_size", self.batch_size, f"a multiple of group_size={self.group_size}")
        _check(self.max_staleness >= 0, "max_staleness", self.max_staleness, "at least 0")
        _one_of("rollout_version", self.rollout_version, ROLLOUT_VERSIONS)
        _check(self.eval_prompts >= 0, "eval_prompts", self.eval_prompts, "at least 0")
        if self.loss.name != "cross_entropy":  # one reward alone is its own mean
            compared = "batch_size" if self.loss.estimator == "reinforce" else "group_size"
            number = getattr(self, compared)
            _check(number > 1, compared, number, f"at least 2 with loss.advantage={self.loss.advantage}")

    @property
    def groups_per_step(self) -> int:
        """batch_size / group_size: the P of the staleness proof."""
        return self.batch_size // self.group_size

    @property
    def live_versions(self) -> int:
        """max_staleness + 2: those that its rollouts may still lease, and the next one while it is being installed."""
        return self.max_staleness + 2


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base: a Hugging Face folder, or the name of a base that ships with weft."""

    path: str = "tiny"
    dtype: str = "float32"  # bfloat16+fp8: trainers multiply by the base in FP8, faster and less exact; Hopper GPUs or later

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)

    @property
    def tensors(self) -> str:
        """dtype of weights and activations: what stands before its +"""
        return self.dtype.partition("+")[0]

    @property
    def base_precision(self) -> str:
        """full, or fp8: what stands behind the + of dtype."""
        return self.dtype.partition("+")[2] or "full"


@dataclass(frozen=True)
class SamplerConfig:
    """One vLLM sampler."""

    max_lora_rank: int | None = None  # None: the smallest that vLLM allows and that holds every adapter
    max_num_seqs: int = 128
    max_model_len: int = 512
    kv_cache_gib: float = 1.0  # CPU: the whole cache; GPU: see gpu_memory_utilization
    gpu_memory_utilization: float = 0.85

    def __post_init__(self) -> None:
        for name in ("max_lora_rank", "max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            _check(value is None or value > 0, name, value, "above 0")
        _check(self.kv_cache_gib > 0, "kv_cache_gib", self.kv_cache_gib, "above 0")
        share = self.gpu_memory_utilization
        _check(0 < share <= 1, "gpu_memory_utilization", share, "above 0 and at most 1")


@dataclass(frozen=True)
class TrainerConfig:
    """One multi-LoRA trainer."""

    token_budget: int = 32768  # packed tokens a launch, over all adapters that share it
    device_adapters: int = 64  # adapters held on the device; more wait in pinned host memory ...
    host_adapters: int = 1024  # ... and beyond these, on disk
    num_threads: int = 1  # CPU threads of the trainer's arithmetic

    def __post_init__(self) -> None:
        for name in ("token_budget", "device_adapters", "host_adapters", "num_threads"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")


@dataclass(frozen=True)
class SyncConfig:
    """Parameter sync: the backend of the broadcast and the time after which a sync has failed."""

    backend: str = "gloo"  # nccl: between GPUs; gloo: through the host; nccl-or-gloo: where NCCL fails again and again, gloo
    deadline_s: float = 30.0

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, SYNC_BACKENDS)
        _check(self.deadline_s > 0, "deadline_s", self.deadline_s, "above 0")


@dataclass(frozen=True)
class ClusterConfig:
    """What the pools are made of, and Ray, whose cluster is this machine and binds loopback alone."""

    samplers: int = 1
    trainers: int = 1
    gpus_per_sampler: float = 0  # below 1: this share of one card, which others may have the rest of; above: tensor parallel
    gpus_per_trainer: float = 0  # at most 1
    dashboard_port: int = 8265
    start_deadline_s: float = 180.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)

    def __post_init__(self) -> None:
        _check(self.samplers > 0, "samplers", self.samplers, "above 0")
        _check(self.trainers > 0, "trainers", self.trainers, "above 0")
        for name in ("gpus_per_sampler", "gpus_per_trainer"):
            value = getattr(self, name)
            _check(0 <= value < 1 or value == int(value) > 0, name, value, "a whole number, or a share of one card from 0 to 1")
        _check(self.gpus_per_trainer <= 1, "gpus_per_trainer", self.gpus_per_trainer, "at most 1: more trainers use more cards")
        _check(0 <= self.dashboard_port < 65536, "dashboard_port", self.dashboard_port, "from 0 to 65535; 0 is any free port")
        _check(self.start_deadline_s > 0, "start_deadline_s", self.start_deadline_s, "above 0")

    @property
    def tensor_parallel(self) -> int:
        """Cards that the model of one sampler is split over: gpus_per_sampler, and 1 where that is less."""
        return max(1, int(self.gpus_per_sampler))

    @property
    def gpus(self) -> float:
        """samplers * gpus_per_sampler + trainers * gpus_per_trainer"""
        return self.samplers * self.gpus_per_sampler + self.trainers * self.gpus_per_trainer


@dataclass(frozen=True)
class RunConfig:
    """One run: where it writes, and how often it makes itself safe."""

    dir: str = "outputs/weft"
    fresh: bool = False  # True: an earlier run in `dir` is moved aside, never resumed
    checkpoint_every: int = 5  # optimizer steps of an adapter between its checkpoints
    table: str = "auto"  # the live table: auto (if there is a terminal), live, plain

    def __post_init__(self) -> None:
        _check(self.checkpoint_every > 0, "checkpoint_every", self.checkpoint_every, "above 0")
        _one_of("table", self.table, ("auto", "live", "plain"))


@dataclass(frozen=True)
class Config:
    """The whole of one run. `adapters` are complete: template, every and sweep are folded in by `expand`."""

    run: RunConfig
    model: ModelConfig
    cluster: ClusterConfig
    adapters: tuple[AdapterConfig, ...]

    def __post_init__(self) -> None:
        names = [adapter.name for adapter in self.adapters]
        for name in names:
            _check(names.count(name) == 1, "adapters", name, "of distinct names: this one is there twice")
        _check(bool(names), "adapters", names, "at least one adapter")
        on_gpu = self.cluster.gpus_per_trainer > 0
        fits = on_gpu or self.model.base_precision == "full"
        _check(fits, "model.dtype", self.model.dtype, f"{self.model.tensors} with cluster.gpus_per_trainer=0: FP8 needs a GPU")
        limit = self.cluster.sampler.max_lora_rank
        for adapter in self.adapters:
            name, rank = f"adapters.{adapter.name}.lora.rank", adapter.lora.rank
            _check(limit is None or rank <= limit, name, rank, f"at most cluster.sampler.max_lora_rank={limit}")
