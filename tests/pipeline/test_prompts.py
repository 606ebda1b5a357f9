from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.pipeline.prompts import PromptSource
from weft.transport.errors import AdapterFault


@given(st.one_of(st.none(), st.integers(1, 20)), st.integers(0, 5), st.integers(0, 60))
def test_a_resumed_source_goes_on_where_it_was(num_prompts, seed, position):
    whole = PromptSource(num_prompts, seed)
    issued = [whole.next() for _ in range(position + 20)]
    resumed = PromptSource(num_prompts, seed, position)
    assert [resumed.next() for _ in range(20)] == issued[position:]
    assert resumed.position == whole.position


@given(st.integers(1, 20), st.integers(0, 5))
def test_each_epoch_has_every_prompt_once(num_prompts, seed):
    source = PromptSource(num_prompts, seed)
    for epoch in range(3):
        assert sorted(source.next() for _ in range(num_prompts)) == [(index, epoch) for index in range(num_prompts)]


def test_epochs_differ_in_their_order():
    source = PromptSource(50, 0)
    assert [source.next()[0] for _ in range(50)] != [source.next()[0] for _ in range(50)]


def test_an_endless_source_counts():
    source = PromptSource(None, 0, 5)
    assert [source.next() for _ in range(3)] == [(5, 0), (6, 0), (7, 0)]


def test_an_environment_without_prompts_is_the_adapters_own_fault():
    with pytest.raises(AdapterFault, match="num_prompts=0"):
        PromptSource(0, 0)
