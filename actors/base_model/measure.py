"""How often a model succeeds at its tasks when it is sampled: `python -m weft.actors.base_model.measure FOLDER`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.actors.base_model.demonstrations import TASKS
from weft.actors.base_model.tokenizer import render
from weft.actors.environment import ChatMessage, Environment, Prompt
from weft.actors.environments.load import load_environment


@dataclass(frozen=True)
class Success:
    """Means over episodes. reward: of an episode; prompt_tokens: before the first turn; sampled_tokens: over all turns;
    longest: tokens of the longest turn; total_tokens: prompt, turns and tool outputs."""

    reward: float
    prompt_tokens: float
    sampled_tokens: float
    longest: int
    total_tokens: float


@dataclass
class _Episode:
    prompt: Prompt
    tokens: list[int]
    turns: list[ChatMessage] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    environment: Environment,
    episodes: int,
    max_tokens: int = 48,
    max_turns: int = 6,
    held_out: bool = True,
) -> Success:
    """Play `episodes` prompts at temperature 1, all at once, turn by turn."""
    prompts = [environment.prompt(i, held_out) for i in range(episodes)]
    texts = [render(tokenizer, prompt.messages, prompt.tools, True) for prompt in prompts]
    running = [_Episode(prompt, tokenizer.encode(text)) for prompt, text in zip(prompts, texts, strict=True)]
    every, lengths = list(running), [len(episode.tokens) for episode in running]
    for _ in range(max_turns):
        for episode, said in zip(running, _sample(model, tokenizer, [e.tokens for e in running], max_tokens), strict=True):
            episode.tokens += said
            episode.lengths.append(len(said))
            text = tokenizer.decode(said, skip_special_tokens=True)
            episode.turns.append({"role": "assistant", "content": text})
        asyncio.run(_respond(environment, tokenizer, running))
        running = [episode for episode in running if not episode.done]
        if not running:
            break
    return Success(
        reward=sum(e.reward for e in every) / episodes,
        prompt_tokens=sum(lengths) / episodes,
        sampled_tokens=sum(sum(e.lengths) for e in every) / episodes,
        longest=max(max(e.lengths) for e in every),
        total_tokens=sum(len(e.tokens) for e in every) / episodes,
    )


async def _respond(environment: Environment, tokenizer: Any, running: Sequence[_Episode]) -> None:
    for episode in running:
        reply = await environment.respond(episode.prompt, episode.turns)
        episode.reward, episode.done = reply.reward, reply.done
        if not reply.done:
            episode.turns.extend(reply.messages)
            episode.tokens += tokenizer.encode("\n" + render(tokenizer, reply.messages, (), True))


def _sample(model: Any, tokenizer: Any, rows: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """The tokens that follow each row, up to and with the end of the turn."""
    width = max(map(len, rows))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampled = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return [row[: row.index(end) + 1] if end in row else row for row in sampled[:, width:].tolist()]


def table(model: Any, tokenizer: Any, episodes: int) -> str:
    """One line a task."""
    lines = [f"{'task':18} success  prompt  sampled  longest turn  all tokens"]
    for task in TASKS:
        s = measure(model, tokenizer, load_environment(task.target, task.settings), episodes)
        numbers = f"{s.reward:7.3f}  {s.prompt_tokens:6.1f}  {s.sampled_tokens:7.1f}  {s.longest:12d}  {s.total_tokens:10.1f}"
        lines.append(f"{task.name:18} {numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    sys.stdout.write(table(model, AutoTokenizer.from_pretrained(arguments.folder), arguments.episodes) + "\n")


if __name__ == "__main__":
    main()
