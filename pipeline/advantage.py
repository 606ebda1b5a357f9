"""Rewards to advantages. P groups, G rollouts of one prompt (siblings) each; all functions float64 [P, G] -> [P, G].

A group whose rewards are all equal teaches nothing under a sibling baseline: its advantages are exactly 0, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rewards = NDArray[np.float64]
STD_FLOOR = 1e-6  # keeps GRPO finite where siblings nearly agree


def grpo(rewards: Rewards) -> Rewards:
    """(reward - mean) / std over the siblings (DeepSeekMath, Shao et al. 2024); std of the population."""
    spread: Rewards = rewards.std(axis=1, keepdims=True)
    return dr_grpo(rewards) / (spread + STD_FLOOR)


def dr_grpo(rewards: Rewards) -> Rewards:
    """reward - mean over the siblings: no std, which favours questions nearly always right or wrong (Liu et al. 2025)."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    agree = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return np.where(agree, 0.0, centred)


def rloo(rewards: Rewards) -> Rewards:
    """reward - mean of the other siblings (leave one out: Kool et al. 2019, Ahmadian et al. 2024) = centred * G / (G - 1)."""
    siblings = rewards.shape[1]
    centred: Rewards = dr_grpo(rewards) * (siblings / (siblings - 1))
    return centred


def reinforce(rewards: Rewards) -> Rewards:
    """reward - mean over the whole batch (REINFORCE with a baseline, Williams 1992); siblings are not compared."""
    return dr_grpo(rewards.reshape(1, -1)).reshape(rewards.shape)


ESTIMATORS: dict[str, Callable[[Rewards], Rewards]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce": reinforce}


def advantages(name: str, rewards: ArrayLike) -> Rewards:
    """The estimator `name` on rewards [P, G] -> [P, G]."""
    table = np.asarray(rewards, dtype=np.float64)
    assert table.ndim == 2, f"rewards must be [P, G], not {table.shape}"
    return ESTIMATORS[name](table)
