"""Rollouts as people read them: role and content of each message. What is trained are the tokens; nothing reads these back.

Of the rollouts of a prompt two are told, the best rewarded and the worst: a policy that has found how to be rewarded for
nothing shows it in one of them, and the texts of all would be more to carry than their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weft.actors.blame import shown
from weft.actors.environment import ChatMessage
from weft.transport.messages import Sample

MAX_TEXT = 20_000  # characters of all contents together: of a rollout of 16k tokens a third, its beginning and its end

Messages = tuple[dict[str, str], ...]


def transcript(messages: Sequence[ChatMessage]) -> Messages:
    """Role and content of each. Of what is longer than MAX_TEXT in all, the middle is left out, and each message says how many
    characters of it. Whatever a user's messages hold, it raises nothing, and can travel."""
    said = [(shown(message, _role), shown(message, _content, None)) for message in messages]
    kept = MAX_TEXT // 2  # from either end
    over, at = max(sum(len(text) for _, text in said) - MAX_TEXT, 0), 0
    cut = []
    for role, text in said:
        first, last = (min(max(edge - at, 0), len(text)) for edge in (kept, kept + over))
        at += len(text)
        left_out = f"[... {last - first} characters ...]" if last > first else ""
        cut.append({"role": role, "content": text[:first] + left_out + text[last:]})
    return tuple(cut)


def told(samples: Sequence[Sample], texts: bool) -> tuple[Sample, ...]:
    """The samples, of which the best rewarded and the worst (the first of each) keep their messages; without `texts` none."""
    rewards = [sample.reward for sample in samples]
    kept = {rewards.index(max(rewards)), rewards.index(min(rewards))} if texts else set()
    return tuple(sample if index in kept else replace(sample, messages=()) for index, sample in enumerate(samples))


def _role(message: ChatMessage) -> str:
    return str(message.get("role", ""))


def _content(message: ChatMessage) -> str:
    content = message.get("content")
    return "" if content is None else str(content)
