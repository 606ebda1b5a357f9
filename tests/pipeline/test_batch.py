from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.configs.schema import AdapterConfig, LossConfig
from weft.pipeline.advantage import advantages
from weft.pipeline.batch import figures, make_batch
from weft.transport.errors import AdapterFault
from weft.transport.messages import UNSAMPLED, AdapterRef, Group, Sample

REF = AdapterRef("a", 0, 3)


def config(group_size, loss=None):
    return AdapterConfig(name="a", batch_size=group_size * 2, group_size=group_size, loss=loss or LossConfig())


def sample(tokens, versions, reward, **more):
    tokens = np.array(tokens, np.int32)
    return Sample(tokens, np.array(versions, np.int32), -np.arange(len(tokens), dtype=np.float32), reward, **more)


def groups_of(rewards, lengths=None):
    made, at = [], 0
    for g, row in enumerate(rewards):
        samples = []
        for reward in row:
            prompt, sampled = lengths[at] if lengths else (2, 3)
            samples.append(sample(range(at * 10, at * 10 + prompt + sampled), [UNSAMPLED] * prompt + [3] * sampled, reward))
            at += 1
        made.append(Group(REF, g, tuple(samples)))
    return made


@settings(deadline=None)
@given(st.data())
def test_packing_keeps_every_row_whole_and_in_order(data):
    size = data.draw(st.integers(2, 4))
    siblings = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size)
    rewards = data.draw(st.lists(siblings, min_size=1, max_size=4))
    rollouts = size * len(rewards)
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=rollouts, max_size=rollouts))
    loss = data.draw(st.sampled_from([LossConfig(), LossConfig(kl_coefficient=0.1), LossConfig(name="cross_entropy")]))
    groups = groups_of(rewards, lengths)
    batch = make_batch(config(size, loss), REF, groups)
    expected = rewards if loss.name == "cross_entropy" else advantages("grpo", rewards)
    keep_all = loss.kl_coefficient > 0
    rows = [(g, i) for g in range(len(rewards)) for i in range(size) if keep_all or expected[g][i] != 0]
    assert len(batch.offsets) == len(rows) + 1 == len(batch.advantages) + 1 == len(batch.groups) + 1
    assert batch.offsets[0] == 0 and batch.offsets[-1] == len(batch.tokens)
    for row, (g, i) in enumerate(rows):
        own, at = groups[g].samples[i], slice(batch.offsets[row], batch.offsets[row + 1])
        assert (batch.tokens[at] == own.tokens).all()
        assert (batch.mask[at] == (own.versions != UNSAMPLED)).all()
        assert (batch.versions[at] == own.versions).all()
        assert (batch.sampler_logprobs[at] == own.logprobs).all()
        assert batch.advantages[row] == pytest.approx(expected[g][i])
        assert batch.groups[row] == g
    assert batch.loss_rows == size * len(rewards)
    assert batch.loss_tokens == sum(sampled for _, sampled in lengths)
    kinds = [array.dtype for array in (batch.tokens, batch.offsets, batch.mask, batch.sampler_logprobs, batch.versions)]
    assert kinds == [np.int32, np.int32, np.bool_, np.float32, np.int32]
    assert (batch.advantages.dtype, batch.groups.dtype) == (np.float32, np.int32)


def test_a_step_without_any_advantage_has_no_tokens_but_its_denominators():
    batch = make_batch(config(2), REF, groups_of([[1.0, 1.0], [0.0, 0.0]]))
    assert len(batch.tokens) == len(batch.mask) == len(batch.advantages) == 0
    assert batch.offsets.tolist() == [0]
    assert (batch.loss_rows, batch.loss_tokens) == (4, 12)


def test_dr_grpo_compares_siblings_without_their_standard_deviation():
    rewards = [[1.0, 0.0, 0.0, 0.0]]
    batch = make_batch(config(4, LossConfig(name="dr_grpo")), REF, groups_of(rewards))
    assert batch.advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_tool_output_between_turns_has_no_loss():
    own = sample([5, 6, 7, 8, 9], [UNSAMPLED, 3, UNSAMPLED, 3, 3], 1.0)
    other = sample([5, 6], [UNSAMPLED, 3], 0.0)
    batch = make_batch(config(2), REF, [Group(REF, 0, (own, other))])
    assert batch.mask.tolist() == [False, True, False, True, True, False, True]


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_the_adapters_own_fault(reward):
    with pytest.raises(AdapterFault, match=f"prompt 1 has the reward {reward}"):
        make_batch(config(2), REF, groups_of([[1.0, 0.0], [0.5, reward]]))


def test_figures_are_means_over_rollouts():
    samples = (
        sample([1, 2], [UNSAMPLED, 3], 1.0, turns=3, metrics={"calls": 2.0}),
        sample([1, 2, 3], [UNSAMPLED, 3, 3], 0.0, truncated=True),
    )
    found = figures([Group(REF, 0, samples)])
    assert (found.reward, found.reward_std, found.rollouts, found.turns, found.truncated) == (0.5, 0.5, 2, 2.0, 0.5)
    assert found.tokens_sampled == 3
    assert found.environment == {"calls": 2.0}
