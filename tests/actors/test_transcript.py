"""What people read of a rollout can always be carried, and says what it leaves out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.actors.transcript import MAX_TEXT, told, transcript
from weft.transport.codec import decode, encode
from weft.transport.messages import AdapterRef, Group, Sample


def sample(reward: float, text: str = "hm") -> Sample:
    nothing = np.zeros(1, np.int32)
    return Sample(nothing, nothing, nothing, reward, messages=({"role": "assistant", "content": text},))


@given(st.lists(st.tuples(st.sampled_from(["assistant", "tool"]), st.text("ab\n", max_size=9))))
def test_what_is_short_is_told_whole(said: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in said]
    assert transcript(messages) == tuple(messages)


@given(st.lists(st.integers(0, 3 * MAX_TEXT // 2), min_size=1, max_size=6))
def test_of_what_is_long_the_middle_is_left_out_and_each_message_says_how_much(lengths: list[int]) -> None:
    texts = [chr(ord("a") + index) * length for index, length in enumerate(lengths)]
    found = [message["content"] for message in transcript([{"role": "tool", "content": text} for text in texts])]
    marks = [re.search(r"\[\.\.\. (\d+) characters \.\.\.\]", text) for text in found]
    left_out = [int(mark[1]) if mark else 0 for mark in marks]
    kept = [mark.re.sub("", text) if mark else text for mark, text in zip(marks, found, strict=True)]
    assert [len(text) + out for text, out in zip(kept, left_out, strict=True)] == lengths
    assert sum(map(len, kept)) == min(sum(lengths), MAX_TEXT)
    whole, half = "".join(texts), MAX_TEXT // 2
    assert "".join(kept) == (whole if len(whole) <= MAX_TEXT else whole[:half] + whole[-half:])


class Unspeakable:
    def __str__(self) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "half \ud800 a pair"},
        {"role": "tool", "content": None, "tool_calls": [object()]},
        {"role": Unspeakable(), "content": Unspeakable()},
        {"content": [{"type": "text", "text": "part"}]},
        {"role": "tool"},
        "no message",
        7,
    ],
)
def test_whatever_a_users_message_holds_can_travel(message: Any) -> None:
    messages = transcript([message])
    group = Group(AdapterRef("a", 0, 0), 0, (), prompt=messages)
    assert decode(encode(group)).prompt == messages


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=8))
def test_the_best_and_the_worst_keep_their_messages_and_no_other(rewards: list[float]) -> None:
    samples = [sample(reward) for reward in rewards]
    kept = [reward for reward, found in zip(rewards, told(samples, texts=True), strict=True) if found.messages]
    assert sorted(kept) == sorted({min(rewards), max(rewards)})
    assert not any(found.messages for found in told(samples, texts=False))
    assert [found.reward for found in told(samples, texts=True)] == rewards
