"""Groups to one optimizer step: what the trainer takes, and what the step is told to have been.

T tokens of n rows; one row is one rollout. A token has a loss where the policy sampled it (versions != UNSAMPLED).

Rows without an advantage are left out of the packed tokens where they could not move a weight: without a KL term every loss of
actors/loss.py vanishes with the advantage, so the row's gradient is exactly zero. They stay in the denominators (loss_tokens,
loss_rows), so leaving them out changes the cost of the step and not the step.

A step in which no row has an advantage is still taken, with T = 0. It is the same step as with the rows in: the gradient is
zero, AdamW's moments decay, momentum and weight decay move the weights as they would have, the step counter of bias correction
advances. To skip it instead would stall the version (places would come back without one) and make the optimizer's trajectory
depend on which rows we chose to leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weft.configs.schema import AdapterConfig
from weft.pipeline.advantage import advantages
from weft.pipeline.events import Transcript
from weft.transport.errors import AdapterFault
from weft.transport.messages import UNSAMPLED, AdapterRef, Array, Group, Sample, TrainBatch


@dataclass(frozen=True)
class RolloutFigures:
    """Means over the rollouts of some groups; environment: of its own metrics, over the rollouts that have them."""

    reward: float
    reward_std: float
    rollouts: int
    turns: float
    truncated: float
    tokens_sampled: int
    environment: Mapping[str, float]


@dataclass(frozen=True)
class Ready:
    """All that one step needs. ages: the staleness of each group, none beyond the bound; token_ages: counted in the batch;
    transcripts: of its rollouts that came with texts."""

    batch: TrainBatch
    figures: RolloutFigures
    ages: tuple[int, ...]
    token_ages: Mapping[int, int]
    transcripts: tuple[Transcript, ...]

    @property
    def no_signal(self) -> float:
        """Share of the groups of whose rollouts none has an advantage, counted in what was sent. DAPO (Yu et al. 2025) samples
        others in their place; here they are told of and no more."""
        signal = np.unique(self.batch.groups[self.batch.advantages != 0])
        return (len(self.ages) - len(signal)) / len(self.ages)


def make_batch(config: AdapterConfig, ref: AdapterRef, groups: Sequence[Group]) -> TrainBatch:
    """Pack the rows of `groups` (in their order) for one step from version `ref`.

    Advantages: loss.estimator of the rewards; under cross-entropy the reward itself is the row's weight (RAFT, Dong et al.
    2023). Raises AdapterFault for a reward that is not finite.
    """
    rewards = np.array([[sample.reward for sample in group.samples] for group in groups], dtype=np.float64)
    if not np.isfinite(rewards).all():
        group, sample = np.argwhere(~np.isfinite(rewards))[0]
        value, prompt = rewards[group, sample], groups[group].prompt_index
        raise AdapterFault(f"{config.name}: a rollout of prompt {prompt} has the reward {value}", "ValueError")
    weights = rewards if config.loss.name == "cross_entropy" else advantages(config.loss.estimator, rewards)
    keep_all = config.loss.kl_coefficient > 0
    rows = [
        (sample, weights[g, i], g)
        for g, group in enumerate(groups)
        for i, sample in enumerate(group.samples)
        if keep_all or weights[g, i] != 0
    ]
    everything = [sample for group in groups for sample in group.samples]
    versions = _packed([sample.versions for sample, _, _ in rows], np.int32)
    return TrainBatch(
        ref=ref,
        tokens=_packed([sample.tokens for sample, _, _ in rows], np.int32),
        offsets=np.cumsum([0, *(len(sample.tokens) for sample, _, _ in rows)], dtype=np.int32),
        mask=versions != UNSAMPLED,
        sampler_logprobs=_packed([sample.logprobs for sample, _, _ in rows], np.float32),
        versions=versions,
        advantages=np.array([weight for _, weight, _ in rows], dtype=np.float32),
        groups=np.array([group for _, _, group in rows], dtype=np.int32),
        loss_tokens=sum(sampled_tokens(sample) for sample in everything),
        loss_rows=len(everything),
    )


def sampled_tokens(sample: Sample) -> int:
    """How many of its tokens the policy sampled."""
    return int((sample.versions != UNSAMPLED).sum())


def token_ages(batch: TrainBatch) -> dict[int, int]:
    """How many of its tokens were sampled how many versions before the one that they train: what was sent, as it was sent."""
    ages, counts = np.unique(batch.ref.version - batch.versions[batch.mask], return_counts=True)
    return dict(zip(ages.tolist(), counts.tolist(), strict=True))


def count_late(ages: Mapping[int, int], bound: int) -> int:
    """Tokens staler than `bound`, or from a version that was still to come."""
    return sum(count for age, count in ages.items() if not 0 <= age <= bound)


def figures(groups: Sequence[Group]) -> RolloutFigures:
    """What the rollouts of `groups` were like."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = np.array([sample.reward for sample in samples], dtype=np.float64)
    own: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.metrics.items():
            own.setdefault(name, []).append(float(value))
    return RolloutFigures(
        reward=float(rewards.mean()),
        reward_std=float(rewards.std()),
        rollouts=len(samples),
        turns=float(np.mean([sample.turns for sample in samples])),
        truncated=float(np.mean([sample.truncated for sample in samples])),
        tokens_sampled=sum(sampled_tokens(sample) for sample in samples),
        environment={name: float(np.mean(values)) for name, values in own.items()},
    )


def transcripts(groups: Sequence[Group]) -> tuple[Transcript, ...]:
    """The rollouts that came with texts; of one group the worst rewarded first."""
    told = [(group, sample) for group in groups for sample in sorted(group.samples, key=_reward) if sample.messages]
    return tuple(
        Transcript(
            prompt_index=group.prompt_index,
            versions=tuple(np.unique(sample.versions[sample.versions != UNSAMPLED]).tolist()),
            reward=sample.reward,
            tokens=sampled_tokens(sample),
            turns=sample.turns,
            truncated=sample.truncated,
            prompt=group.prompt,
            completion=sample.messages,
        )
        for group, sample in told
    )


def _reward(sample: Sample) -> float:
    return sample.reward


def _packed(arrays: Sequence[Array], dtype: type[np.generic]) -> Array:
    return np.concatenate([np.empty(0, dtype=dtype), *(array.astype(dtype, copy=False) for array in arrays)])
