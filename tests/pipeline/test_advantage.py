from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from weft.configs.schema import ADVANTAGES
from weft.pipeline.advantage import ESTIMATORS, advantages

REWARDS = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-10, 10, width=32))


def test_every_configurable_estimator_exists():
    assert {"auto", *ESTIMATORS} == set(ADVANTAGES)  # auto: LossConfig names one of these


@given(REWARDS)
def test_sibling_baselines_are_centred_in_each_group(rewards):
    for name in ("grpo", "dr_grpo", "rloo"):
        assert np.allclose(advantages(name, rewards).mean(axis=1), 0, atol=1e-9)


@given(REWARDS)
def test_reinforce_is_centred_over_the_batch(rewards):
    assert np.allclose(advantages("reinforce", rewards), rewards - rewards.mean(), atol=1e-12)


@given(REWARDS)
def test_grpo_has_unit_spread_or_nothing(rewards):
    spread = advantages("grpo", rewards).std(axis=1)
    own = rewards.std(axis=1)
    assert np.allclose(spread, np.where(own > 0, own / (own + 1e-6), 0.0), atol=1e-6)


@given(REWARDS)
def test_rloo_is_the_reward_minus_the_mean_of_the_others(rewards):
    expected = np.empty_like(rewards)
    for g, i in np.ndindex(*rewards.shape):
        expected[g, i] = rewards[g, i] - np.delete(rewards[g], i).mean()
    assert np.allclose(advantages("rloo", rewards), expected, atol=1e-9)


@given(st.floats(-10, 10), st.integers(1, 4), st.integers(2, 7), st.sampled_from(sorted(ESTIMATORS)))
def test_groups_that_agree_teach_exactly_nothing(reward, groups, size, name):
    assert (advantages(name, np.full((groups, size), reward)) == 0.0).all()


@given(REWARDS, st.permutations(range(4)))
def test_advantages_follow_their_rollouts(rewards, order):
    order = [i for i in order if i < rewards.shape[1]]
    order += [i for i in range(rewards.shape[1]) if i not in order]
    for name in ESTIMATORS:
        assert np.allclose(advantages(name, rewards[:, order]), advantages(name, rewards)[:, order], atol=1e-6)


def test_known_values():
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert np.allclose(advantages("dr_grpo", rewards), [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    assert np.allclose(advantages("grpo", rewards)[1], [1, 1, -1, -1], atol=1e-5)
    assert np.allclose(advantages("rloo", rewards)[0], [1.0, -1 / 3, -1 / 3, -1 / 3])
    assert np.allclose(advantages("reinforce", rewards), np.array(rewards) - 0.375)


def test_rewards_must_be_groups_of_siblings():
    with pytest.raises(AssertionError, match=r"\[P, G\]"):
        advantages("grpo", [1.0, 0.0])
