"""One rollout as tokens: the turns of a model and its environment. Knows no engine; what samples is handed in.

    prompt ──template──> tokens ──generate──> turn ──respond──> done: Sample
                           ^                             |
                           '───── template's delta <─────'   tool messages, unsampled

The model's own tokens are never tokenised again: what is trained is what was sampled. Messages of the environment are
appended as the chat template would render them after an assistant turn, so on a ChatML template the whole sequence
equals a fresh rendering of the conversation. A template that shows earlier turns otherwise than they were (without their
thoughts, say, as those of hybrid models do) changes none of them here; the prompt's chat_template_kwargs are given to it each
time.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from weft.actors.blame import blamed_on, shown
from weft.actors.environment import MAX_REWARD, ChatMessage, Environment, Prompt, Reply
from weft.actors.environment_thread import EnvironmentThread
from weft.actors.transcript import transcript
from weft.transport.errors import AdapterFault
from weft.transport.messages import UNSAMPLED, AdapterRef, Sample

_SENTINEL = "weft2718281828sentinel"  # stands for an assistant's words; no template changes it, no user writes it
_MAX_METRIC = float(np.finfo(np.float32).max)


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
    """The chat template of one tokenizer (transformers' PreTrainedTokenizer): messages in, token ids out. For many threads.

    max_length: of any sequence. Of a text that cannot fit, only so much is tokenised that it is seen not to: tokens above it.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self._tokenizer = tokenizer
        # What rendering itself hands over or is told by; documents are the template's alone, and go through as they are.
        self._taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents"}
        # A token stands for no more characters than its own name has, where a byte is a character of the name or more.
        self._most = None if max_length is None else (max_length + 1) * max(map(len, tokenizer.get_vocab()))
        self._encode("")  # the first call may set the tokenizer up; from then on it is only read

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

    def turn_end(self, prompt: Prompt) -> int | None:
        """The token that the template, as this prompt has it rendered, puts behind an assistant's words; None where that is no
        token added to the vocabulary."""
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        rendered = self._render(prompt, said, begin=False)
        tokens = self._encode(rendered.rpartition(_SENTINEL)[2]) if _SENTINEL in rendered else []
        return tokens[0] if tokens and tokens[0] in self._tokenizer.added_tokens_decoder else None

    def unread(self, prompt: Prompt) -> list[str]:
        """The arguments of a prompt that the template nowhere names: they change nothing."""
        template = self._tokenizer.get_chat_template(tools=list(prompt.tools) or None)
        return [name for name in self._arguments(prompt) if not re.search(rf"\b{re.escape(name)}\b", template)]

    def _render(self, prompt: Prompt, messages: Sequence[ChatMessage], begin: bool = True) -> str:
        """begin: up to where the model begins to speak."""
        tools, arguments = list(prompt.tools) or None, self._arguments(prompt)
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=begin, tokenize=False, **arguments
            )
        )

    def _arguments(self, prompt: Prompt) -> dict[str, Any]:
        given = prompt.chat_template_kwargs
        if given is None:
            return {}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"chat_template_kwargs={shown(given, repr):.80}: must be a mapping from names to values")
        for name in given:
            if name in self._taken:
                raise ValueError(f"chat_template_kwargs.{name}: must be a name that the template alone reads")
        return dict(given)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text[: self._most], add_special_tokens=False, verbose=False))


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

    environment: without a thread of its own it is called here, and has no deadline.
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
        if not all(map(math.isfinite, turn.logprobs)):
            said = f"{name}: the log-probabilities of {ref} are no numbers: its weights have run away"
            raise AdapterFault(said, "FloatingPointError")
        tape.sampled(turn, ref.version)
        truncated = truncated or turn.cut
        turns.append({"role": "assistant", "content": turn.text})
        answer = partial(_answer, chat, prompt, tuple(turns), tape.tokens[-1])
        what = "its environment's respond"
        if isinstance(environment, EnvironmentThread):
            reply, delta = await environment.run(what, answer, bounds.reply_s)
        else:
            with blamed_on(name, what):
                reply, delta = await answer(environment)
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
        messages=transcript(turns),
    )


async def _answer(
    chat: Chat, prompt: Prompt, turns: Sequence[ChatMessage], last_token: int, environment: Environment
) -> tuple[Reply, list[int]]:
    """What the environment replies, its figures as plain floats, and the tokens of it. Raises for whatever is no reply."""
    reply = await environment.respond(prompt, turns)
    if not isinstance(reply, Reply):
        raise TypeError(f"respond returned {type(reply).__name__}: must be a Reply")
    reward, metrics = _figure("reward", reply.reward, MAX_REWARD), _figures(reply.metrics)
    reply = replace(reply, messages=tuple(reply.messages), done=bool(reply.done), reward=reward, metrics=metrics)
    return reply, [] if reply.done else chat.reply(prompt, reply.messages, last_token)


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What travels as a sample's metrics. Raises TypeError for a key, ValueError for a figure that cannot."""
    figures: dict[str, float] = {}
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise TypeError(f"metrics have a key {key!r}: must be a string")
        key.encode()  # half a surrogate pair cannot travel
        figures[key] = _figure(f"metrics[{key!r}]", value, _MAX_METRIC)
    return figures


def _figure(what: str, value: Any, most: float) -> float:
    """A plain float. Raises ValueError for what is none, is not finite, or is above `most` either way."""
    try:
        figure, finite = float(value), math.isfinite(value)  # the second takes no text
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what}={shown(value, repr):.80}: must be a number") from error
    if not finite or abs(figure) > most:
        raise ValueError(f"{what}={figure!r}: must be a finite number, and at most {most:.3g} either way")
    return figure


def seed_of(*parts: object) -> int:
    """A seed of 63 bits, the same in every process and run for the same parts (BLAKE2b of their text)."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
