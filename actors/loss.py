"""What one adapter minimises, on packed tokens. Every loss here is minus the objective of its paper.

P loss tokens of n whole rows of one adapter; all fp32. Written below: p the trainer's log-probability of the token, q the
sampler's, r = exp(p - q), A the advantage, sg() a stopped gradient, L, H = clip_low, clip_high.

The old policy of these papers is the one that sampled. Each batch is trained by one optimizer step, so a ratio is not 1 for two
reasons only: the weights are newer than the tokens (staleness), or sampler and trainer compute differently (mismatch).
The token means of a loss are over denominators of the whole step: micro-batches and rows left out change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.configs.schema import LossConfig


@dataclass(frozen=True)
class LossTokens:
    """The loss tokens of one adapter in one launch, row after row."""

    logprobs: Tensor  # [P], with gradient
    sampler_logprobs: Tensor  # [P]
    advantages: Tensor  # [P]
    rows: Tensor  # int64 [P], from 0
    row_tokens: Tensor  # [n] loss tokens of each row, all of which are here
    staleness: Tensor  # [P] version that trains minus version that sampled
    base_logprobs: Tensor | None = None  # [P], when kl_coefficient > 0


@dataclass(frozen=True)
class Denominators:
    """Of the whole optimizer step, rows left out for their advantage of 0 included."""

    tokens: int
    rows: int
    max_tokens: int


@dataclass(frozen=True)
class LossResult:
    """loss: a scalar, with gradient. The others are fp32 [P] without: r (None for cross_entropy), 1.0 where clipping took the
    gradient or bounded the weight, 1.0 where the correction truncated or masked, and the KL estimate (None when it is off)."""

    loss: Tensor
    ratio: Tensor | None
    clipped: Tensor
    corrected: Tensor
    kl: Tensor | None


@dataclass(frozen=True)
class _Surrogate:
    values: Tensor  # [P], with gradient
    clipped: Tensor  # bool [P]
    corrected: Tensor  # bool [P]


def adapter_loss(config: LossConfig, tokens: LossTokens, denominators: Denominators) -> LossResult:
    """The loss of one adapter in one launch; sums over launches to that of the step.

    With v the value of a token: `token` sum(v) / tokens; `sequence` mean over rows of the row's mean of v; `constant`
    sum(v) / (rows * max_tokens), the unbiased one of Dr. GRPO (Liu et al. 2025), whose length is a constant of the task.
    To each v, kl_coefficient times `kl_to_base` is added, after the correction has masked.
    """
    surrogate = _SURROGATES[config.name](config, tokens)
    values, kl, ratio = surrogate.values, None, None
    if config.correction == "icepop":
        values = values.masked_fill(surrogate.corrected, 0.0)
    if config.kl_coefficient > 0:
        assert tokens.base_logprobs is not None, "kl_coefficient > 0 needs the base's log-probabilities"
        divergence = kl_to_base(tokens.logprobs, tokens.base_logprobs)
        values, kl = values + config.kl_coefficient * divergence, divergence.detach()
    if config.name != "cross_entropy":
        ratio = (tokens.logprobs.detach() - tokens.sampler_logprobs).exp()
    loss = _normalised(config, values, tokens, denominators)
    return LossResult(loss, ratio, surrogate.clipped.float(), surrogate.corrected.float(), kl)


def _normalised(config: LossConfig, values: Tensor, tokens: LossTokens, denominators: Denominators) -> Tensor:
    rows = max(denominators.rows, 1)
    if config.denominator == "token":
        return values.sum() / max(denominators.tokens, 1)
    if config.denominator == "sequence":
        return (values / tokens.row_tokens[tokens.rows]).sum() / rows
    return values.sum() / (rows * denominators.max_tokens)


def kl_to_base(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """k3 of Schulman, "Approximating KL Divergence" (2020): exp(b - p) - (b - p) - 1, at least 0, an unbiased estimate of
    KL(policy || base) on the policy's own samples. Its gradient, through p alone, is on average that of KL(base || policy),
    as in GRPO (Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"). Left out: the importance
    weight that stale tokens would need, as in GRPO too."""
    log_ratio = base_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def correct(config: LossConfig, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The corrections for mismatch, on log r of any shape: the corrected log r, and a bool of where it was corrected.

    tis: truncated importance sampling (Ionides 2008; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"): the value of r is min(r, cap), its gradient that value times the gradient of p.
    icepop: IcePop (Ling Team 2025, "Every Step Evolves"): outside [1 / cap, cap] the token (for gspo, the row) is masked: its
    r is set to 1 here, without gradient, and its value to 0 in `adapter_loss`.
    Both papers weigh a PPO ratio, of trainer over trainer, by that of trainer over sampler. The first is 1 at the only step
    that a batch gets, so their product is our r, and the clip of a loss binds on it as well.
    """
    bound = math.log(config.correction_cap)
    if config.correction == "tis":
        return log_ratio + (log_ratio.clamp(max=bound) - log_ratio).detach(), log_ratio.detach() > bound
    if config.correction == "icepop":
        outside = log_ratio.detach().abs() > bound
        return log_ratio.masked_fill(outside, 0.0), outside
    return log_ratio, torch.zeros_like(log_ratio, dtype=torch.bool)


def importance_sampling(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-r A: the policy gradient of stale samples, token by token (Tinker's loss of this name). Left out: any trust region, and
    the product of ratios along the row that an exact correction would take (its variance explodes)."""
    log_ratio, corrected = correct(config, tokens.logprobs - tokens.sampler_logprobs)
    return _Surrogate(-log_ratio.exp() * tokens.advantages, torch.zeros_like(corrected), corrected)


def ppo(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-min(r A, clip(r, 1 - L, 1 + H) A): PPO (Schulman et al. 2017), with the separate upper bound of DAPO (Yu et al. 2025).
    Left out: value function and entropy bonus.

    grpo (Shao et al. 2024, DeepSeekMath) and dr_grpo (Liu et al. 2025, "Understanding R1-Zero-Like Training") have this very
    surrogate. GRPO differs by its advantages, its KL term and its mean over each row, for which `auto` takes the token mean of
    DAPO (`sequence` is the paper's); Dr. GRPO by advantages without standard deviation and by the constant normalization, both
    of which `auto` gives it.
    """
    log_ratio, corrected = correct(config, tokens.logprobs - tokens.sampler_logprobs)
    values, clipped = _clip(config, log_ratio.exp(), tokens.advantages)
    return _Surrogate(values, clipped, corrected)


def cispo(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-sg(clip(r, 1 - L, 1 + H)) A p: CISPO (MiniMax 2025, MiniMax-M1): the weight is clipped, no token loses its gradient.
    The paper leaves the lower side open: clip_low = 1 does."""
    log_ratio, corrected = correct(config, tokens.logprobs - tokens.sampler_logprobs)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return _Surrogate(-weight * tokens.advantages * tokens.logprobs, weight != ratio, corrected)


def gspo(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-min(s A, clip(s, 1 - L, 1 + H) A), s = exp(mean over the row of p - q): GSPO (Zheng et al. 2025).
    Each token of a row carries the row's value, so the `sequence` normalization, which `auto` gives it, is the paper's. A
    correction acts on s. The paper's bounds are 3e-4 and 4e-4, far below PPO's, because s is a geometric mean."""
    log_ratio = tokens.logprobs - tokens.sampler_logprobs
    row_sums = torch.zeros_like(tokens.row_tokens).index_add(0, tokens.rows, log_ratio)
    log_ratio, corrected = correct(config, (row_sums / tokens.row_tokens.clamp(min=1))[tokens.rows])
    values, clipped = _clip(config, log_ratio.exp(), tokens.advantages)
    return _Surrogate(values, clipped, corrected)


def dppo(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-M r A, M = 0 where A > 0 and e^p - e^q > H, or A < 0 and e^q - e^p > L, else 1: DPPO with the binary total variation
    (Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning"): the trust region is in probability, not in
    ratio, so rare tokens are free to move. Left out: the top-k and the KL forms of the divergence."""
    log_ratio, corrected = correct(config, tokens.logprobs - tokens.sampler_logprobs)
    moved = tokens.logprobs.detach().exp() - tokens.sampler_logprobs.exp()
    up, down = (tokens.advantages > 0) & (moved > config.clip_high), (tokens.advantages < 0) & (-moved > config.clip_low)
    masked = up | down
    return _Surrogate((-log_ratio.exp() * tokens.advantages).masked_fill(masked, 0.0), masked, corrected)


def decoupled_ppo(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-w min(u A, clip(u, 1 - L, 1 + H) A), u = exp(p - c), w = sg(exp(c - q)): decoupled PPO (Hilton et al. 2022; AReaL, Fu et
    al. 2025). The clip holds the policy near a proximal one, c, and not near the one that sampled; w is the importance weight.

    c is the version before the one that trains, by AReaL's log-linear interpolation (A-3PO): a token s versions old has
    c = q + (s - 1) / s * sg(p - q), which is q at s = 1; at s = 0, c = sg(p). Left out: the second forward that would compute
    c. A correction acts on w (AReaL masks above a cap; icepop masks below its inverse too).
    """
    stale = tokens.staleness.clamp(min=0)
    share = torch.where(stale > 0, (stale - 1) / stale.clamp(min=1), 1.0)
    behaviour = share * (tokens.logprobs.detach() - tokens.sampler_logprobs)  # c - q
    log_weight, corrected = correct(config, behaviour)
    log_ratio = tokens.logprobs - tokens.sampler_logprobs - behaviour
    values, clipped = _clip(config, log_ratio.exp(), tokens.advantages)
    return _Surrogate(log_weight.exp() * values, clipped, corrected)


def cross_entropy(config: LossConfig, tokens: LossTokens) -> _Surrogate:
    """-A p, A the weight of the row: 1 in a supervised step, the reward on the policy's own samples (RAFT, Dong et al. 2023).
    The sampler's log-probabilities are not read."""
    none = torch.zeros_like(tokens.logprobs, dtype=torch.bool)
    return _Surrogate(-tokens.advantages * tokens.logprobs, none, none)


def _clip(config: LossConfig, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), and where the clip took the gradient."""
    free, bounded = ratio * advantages, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    return -torch.minimum(free, bounded), (bounded < free).detach()


_SURROGATES: dict[str, Callable[[LossConfig, LossTokens], _Surrogate]] = {
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "grpo": ppo,
    "dr_grpo": ppo,
    "cispo": cispo,
    "gspo": gspo,
    "dppo": dppo,
    "decoupled_ppo": decoupled_ppo,
    "cross_entropy": cross_entropy,
}
