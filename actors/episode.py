"""One rollout as tokens: the turns of a model and its environment. Knows no engine; what samples is handed in.

    prompt ──template──> tokens ──generate──> turn ──respond──> done: Sample
                           ^                             |
                           '───── template's delta <─────'   tool messages, unsampled

The model's own tokens are never tokenised again: what is trained is what was sampled. Messages of the environment are
appended as the chat template would render them after an assistant turn, so on a ChatML template the whole sequence
equals a fresh rendering of the conversation.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from weft.actors.environment import ChatMessage, Environment, Prompt, Reply
from weft.actors.environment_thread import EnvironmentThread
from weft.transport.errors import AdapterFault
from weft.transport.messages import UNSAMPLED, AdapterRef, Sample

_SENTINEL = "weft2718281828sentinel"  # stands for an assistant's words; no template changes it, no user writes it


@dataclass(frozen=True)
class Turn:
    """What the model said once. tokens: as sampled, the end-of-turn token among them; logprobs: one a token;
    text: the tokens decoded, without what ended the turn; cut: it ended for want of tokens, not by itself."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    text: str
    cut: bool = False


# (all tokens so far, version to sample under, most new tokens, seed) -> turn
Generate = Callable[[Sequence[int], AdapterRef, int, int], Awaitable[Turn]]


@dataclass(frozen=True)
class Bounds:
    """max_turns: turns of the model; max_tokens: new tokens a turn; max_length: tokens of the whole sequence; reply_s: seconds
    that the environment has for one reply. One that never came would hold its adapter's places on the samplers for ever."""

    max_turns: int
    max_tokens: int
    max_length: int
    reply_s: float = 600.0


class Chat:
    """The chat template of one tokenizer (transformers' PreTrainedTokenizer): messages in, token ids out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of the prompt, up to where the model begins to speak."""
        return self._encode(self._render(prompt, prompt.messages))

    def reply(self, prompt: Prompt, messages: Sequence[ChatMessage], last_token: int) -> list[int]:
        """Tokens that follow a turn of the model which ended in `last_token`, up to where it speaks again.

        Rendered after an assistant turn of one sentinel word; what stands behind that word is the delta. The end-of-turn
        mark is left out if the model gave it itself, and kept if its turn was cut short of it.
        """
        rendered = self._render(prompt, [*prompt.messages, {"role": "assistant", "content": _SENTINEL}, *messages])
        found = rendered.rfind(_SENTINEL)
        if found < 0:
            raise ValueError("the chat template does not show what an assistant said")
        delta = rendered[found + len(_SENTINEL) :]
        return self._encode(delta.removeprefix(self._tokenizer.decode([last_token], skip_special_tokens=False)))

    def _render(self, prompt: Prompt, messages: Sequence[ChatMessage]) -> str:
        tools = list(prompt.tools) or None
        return str(self._tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=True, tokenize=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))


@dataclass
class _Tape:
    """The sequence as it grows: three columns of one length."""

    tokens: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def given(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.versions += [UNSAMPLED] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def sampled(self, turn: Turn, version: int) -> None:
        assert len(turn.tokens) == len(turn.logprobs), "one log-probability a token"
        self.tokens += turn.tokens
        self.versions += [version] * len(turn.tokens)
        self.logprobs += turn.logprobs


async def run_episode(
    name: str,
    environment: Environment | EnvironmentThread,
    prompt: Prompt,
    prompt_tokens: Sequence[int],
    chat: Chat,
    generate: Generate,
    bounds: Bounds,
    version: Callable[[], AdapterRef],
    seed: Callable[[int], int],
) -> Sample:
    """Play one rollout to its end. name: the adapter that answers for its environment's faults.

    version: asked once a turn, gives the version to sample under. seed: turn's index -> seed of its sampling.
    Raises AdapterFault for whatever the environment raises. The reward is that of the last reply, done or not.
    """
    assert len(prompt_tokens) < bounds.max_length, "the caller refuses prompts that leave no room"
    tape = _Tape()
    turns: list[ChatMessage] = []
    metrics: dict[str, float] = {}
    tape.given(prompt_tokens)
    truncated = False
    for index in range(bounds.max_turns):
        ref = version()
        room = min(bounds.max_tokens, bounds.max_length - len(tape.tokens))
        turn = await generate(tape.tokens, ref, room, seed(index))
        tape.sampled(turn, ref.version)
        truncated = truncated or turn.cut
        turns.append({"role": "assistant", "content": turn.text})
        with blamed_on(name, "its environment's respond"):
            reply = await _reply(environment, prompt, tuple(turns), bounds.reply_s)
            delta = [] if reply.done else chat.reply(prompt, reply.messages, tape.tokens[-1])
        metrics.update(reply.metrics)
        if reply.done or index + 1 == bounds.max_turns:
            break
        if len(tape.tokens) + len(delta) >= bounds.max_length:
            truncated = True
            break
        tape.given(delta)
        turns.extend(reply.messages)
    return Sample(
        tokens=np.asarray(tape.tokens, np.int32),
        versions=np.asarray(tape.versions, np.int32),
        logprobs=np.asarray(tape.logprobs, np.float32),
        reward=reply.reward,
        turns=index + 1,
        truncated=truncated,
        metrics=metrics,
    )


async def _reply(
    environment: Environment | EnvironmentThread, prompt: Prompt, turns: Sequence[ChatMessage], deadline_s: float
) -> Reply:
    """What the environment replies, its figures as plain floats. Raises for whatever is no reply."""
    task = asyncio.current_task()
    assert task is not None
    try:
        async with asyncio.timeout(deadline_s):
            reply = await environment.respond(prompt, turns)
    except TimeoutError as error:  # ours says nothing, the environment's own may
        raise TimeoutError(str(error) or f"no reply within {deadline_s:g} s") from error
    except asyncio.CancelledError as error:
        if task.cancelling():  # the rollout is given up
            raise
        raise RuntimeError("respond was cancelled from within: something that it awaits was") from error
    if not isinstance(reply, Reply):
        raise TypeError(f"respond returned {type(reply).__name__}: must be a Reply")
    if not math.isfinite(reply.reward):
        raise ValueError(f"reward={reply.reward!r}: must be a finite number")
    return replace(reply, reward=float(reply.reward), metrics=_figures(reply.metrics))


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What travels as a sample's metrics. Raises TypeError for a key, ValueError for a figure that cannot."""
    figures: dict[str, float] = {}
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise TypeError(f"metrics have a key {key!r}: must be a string")
        key.encode()  # half a surrogate pair cannot travel
        try:
            figures[key] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"metrics[{key!r}]={value!r:.80}: must be a number") from error
    return figures


@contextmanager
def blamed_on(name: str, what: str) -> Iterator[None]:
    """Whatever is raised inside is the fault of adapter `name` alone: it becomes an AdapterFault with the traceback."""
    try:
        yield
    except AdapterFault:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything; sys.exit would end the sampler's event loop
        kind = type(error).__name__
        raise AdapterFault(f"{name}: {what} raised {kind}: {error}", kind, traceback.format_exc()) from error


def seed_of(*parts: object) -> int:
    """A seed of 63 bits, the same in every process and run for the same parts (BLAKE2b of their text)."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
