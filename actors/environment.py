"""The user's hook: one task, as prompts in, turns with tool calls, reward out.

A class that fits `Environment` is named in the configuration by its dotted path (`environment.target=mypackage.tasks.Riddles`),
built once per adapter in every sampler from `environment.settings`, and asked for prompts and replies; environments/ has three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

# As chat templates take it: {"role": "user" | "assistant" | "tool" | "system", "content": str, ...}
ChatMessage = Mapping[str, Any]
MAX_REWARD = 1e6  # either way: an advantage beyond it would leave nothing of the adapter's weights


@dataclass(frozen=True)
class Prompt:
    """What an episode begins with. `answer` is for the environment alone: whatever it needs to score."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()  # JSON schemas, handed to the chat template
    answer: Any = None
    chat_template_kwargs: Mapping[str, Any] | None = None  # what else the chat template reads: {"enable_thinking": False}


@dataclass(frozen=True)
class Reply:
    """What follows one turn of the model: messages to append (tool outputs, masked from the loss), or the end with a reward.

    reward: finite, and at most 1e6 either way. metrics: finite as float32. What is not ends this adapter, as an exception does.
    """

    messages: Sequence[ChatMessage] = ()
    done: bool = False
    reward: float = 0.0  # of the whole episode; read when done
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Environment(Protocol):
    """One task. Prompts are a function of their index, so a run can be resumed; an exception, or a prompt or reply that takes
    longer than ten minutes, ends this adapter and no other. In each sampler it has a thread and an event loop of its own: while
    it computes or sleeps without awaiting, its own adapter waits, and no other.

    An episode that runs out of turns or tokens without `done` gets the reward of its last reply.
    """

    @property
    def num_prompts(self) -> int | None:
        """How many training prompts there are; None: endless."""

    def prompt(self, index: int, held_out: bool) -> Prompt:
        """The training prompt `index`, or the held-out one: no prompt is both."""

    async def respond(self, prompt: Prompt, turns: Sequence[ChatMessage]) -> Reply:
        """`turns`: every message since the prompt, the model's newest last (role "assistant", content: its text)."""
