"""Reinforcement learning of the shipped base over each precision of its products: two tasks of the demo, one trainer.

The sampler is the decoder itself over the exact base, as vLLM computes it: what FP8 changes in training shows, and how far it
takes the trainer's log-probabilities from the sampler's. On policy; seeds, prompts and rewards are the same for each.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from weft.actors.base_model import tiny_path
from weft.actors.environments.load import load_environment
from weft.actors.episode import Bounds, Chat, Turn, run_episode
from weft.actors.lora import LoraBatch
from weft.actors.trainer import Trainer
from weft.configs.schema import (
    AdapterConfig,
    EnvironmentConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainerConfig,
)
from weft.pipeline.batch import make_batch
from weft.transport import messages
from weft.transport.messages import AdapterRef, Group

LINEAR = "linear"
COMMON: dict[str, Any] = {"batch_size": 64, "group_size": 8, "max_staleness": 0, "sampling": SamplingConfig(max_tokens=16)}
ADAPTERS = (  # of configs/adapters/demo.yaml, but for their staleness
    AdapterConfig(
        name="calculator",
        environment=EnvironmentConfig("calculator", {"operations": 1}, max_turns=4),
        lora=LoraConfig(rank=8, alpha=16),
        optimizer=OptimizerConfig(learning_rate=6e-3, schedule=LINEAR),
        **COMMON,
    ),
    AdapterConfig(
        name="larger",
        environment=EnvironmentConfig("jsonl", {"path": "weft:larger.jsonl", "match": "exact"}, max_turns=1),
        lora=LoraConfig(rank=4, alpha=16),
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule=LINEAR),
        loss=LossConfig(name="importance_sampling", advantage="reinforce", kl_coefficient=0.01),
        **COMMON,
    ),
)


def learn(device: torch.device, steps: int, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """-> by precision and adapter, figures of every step."""
    return [row for precision in precisions for row in asyncio.run(_learn(device, steps, precision))]


async def _learn(device: torch.device, steps: int, precision: str) -> list[dict[str, Any]]:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        trainer = Trainer(tiny_path(), dtype, TrainerConfig(), str(path), str(path / "slabs"), str(device), precision)
        await trainer.start()
        configs = [_shortened(config, steps) for config in ADAPTERS]
        for config in configs:
            await trainer.handle(messages.AddAdapter(_mapping(config)))
        players = [Player(trainer, config, device) for config in configs]
        for version in range(steps):
            batches = [make_batch(player.config, player.ref(version), await player.play(version)) for player in players]
            results = (await trainer.handle(messages.TrainStep(tuple(batches)))).results
            for player, result in zip(players, results, strict=True):
                assert not result.fault, result.fault
                difference = result.metrics.get("logprob_diff")  # none of a step whose groups all paid alike: nothing trains
                player.logprob_diff.append(None if difference is None else round(difference, 5))
        await trainer.aclose()
    return [{"base": precision, "adapter": p.config.name, "reward": p.rewards, "logprob_diff": p.logprob_diff} for p in players]


def _shortened(config: AdapterConfig, steps: int) -> AdapterConfig:
    return replace(config, num_steps=steps)


def _mapping(config: AdapterConfig) -> dict[str, Any]:
    return asdict(config)


@dataclass
class Player:
    """Plays one adapter's rollouts; every turn that is asked for is sampled together with the others that wait."""

    trainer: Trainer
    config: AdapterConfig
    device: torch.device
    rewards: list[float] = field(default_factory=list)
    logprob_diff: list[float | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = load_environment(self.config.environment.target, self.config.environment.settings)
        self.tokenizer = AutoTokenizer.from_pretrained(tiny_path())
        self.chat, self.draw = Chat(self.tokenizer), torch.Generator(self.device).manual_seed(1)
        self.waiting: list[tuple[Sequence[int], int, asyncio.Future[Turn]]] = []

    def ref(self, version: int) -> AdapterRef:
        return AdapterRef(self.config.name, 0, version)

    async def play(self, version: int) -> list[Group]:
        """batch_size rollouts under the newest version."""
        ref, size = self.ref(version), self.config.group_size
        bounds = Bounds(self.config.environment.max_turns, self.config.sampling.max_tokens, 512)
        count = self.config.groups_per_step
        prompts = [self.environment.prompt(version * count + index, held_out=False) for index in range(count)]
        starts = [self.chat.prompt(prompt) for prompt in prompts]
        async with asyncio.TaskGroup() as tasks:
            episodes = [
                tasks.create_task(
                    run_episode(
                        self.config.name,
                        self.environment,
                        prompt,
                        start,
                        self.chat,
                        self.generate,
                        bounds,
                        lambda: ref,
                        lambda i: i,
                    )
                )
                for prompt, start in zip(prompts, starts, strict=True)
                for _ in range(size)
            ]
            while not all(episode.done() for episode in episodes):
                await asyncio.sleep(0)
                if self.waiting:
                    self.answer()
        samples = [episode.result() for episode in episodes]
        self.rewards.append(round(sum(sample.reward for sample in samples) / len(samples), 4))
        return [Group(ref, g, tuple(samples[g * size : (g + 1) * size])) for g in range(count)]

    async def generate(self, tokens: Sequence[int], ref: AdapterRef, room: int, seed: int) -> Turn:
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self.waiting.append((tuple(tokens), room, future))
        return await future

    @torch.no_grad()
    def answer(self) -> None:
        """A turn for each that waits, token by token over the whole sequences: they are short."""
        asked, self.waiting = self.waiting, []
        adapter, end = self.trainer._adapters[self.config.name], self.tokenizer.eos_token_id
        rows: list[list[int]] = [list(tokens) for tokens, _, _ in asked]
        said: list[list[float]] = [[] for _ in asked]
        going = list(range(len(asked)))
        with self.trainer._store.hold([self.config.name]) as (slabs,):
            while going:
                for row, (token, logprob) in zip(going, self.sample([rows[n] for n in going], adapter, slabs), strict=True):
                    rows[row].append(token)
                    said[row].append(logprob)
                going = [n for n in going if rows[n][-1] != end and len(said[n]) < asked[n][1]]
        for row, logprobs, (tokens, _, future) in zip(rows, said, asked, strict=True):
            new = row[len(tokens) :]
            future.set_result(Turn(new, logprobs, self.tokenizer.decode(new, skip_special_tokens=True), new[-1] != end))

    def sample(self, rows: list[list[int]], adapter: Any, slabs: Any) -> list[tuple[int, float]]:
        """The next token of each row and its log-probability, at temperature 1."""
        decoder = self.trainer._learner._decoder
        bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
        views = adapter.layout.views(slabs.weights)
        lora = LoraBatch.build([0, int(bounds[-1])], [adapter.config.lora.scale], [views])
        tokens = torch.tensor([token for row in rows for token in row], device=self.device)
        hidden = decoder(tokens, bounds, lora)[bounds[1:].to(self.device) - 1]
        logprobs = (hidden @ decoder.head.T).float().log_softmax(-1)
        chosen = torch.multinomial(logprobs.exp(), 1, generator=self.draw)
        return list(zip(chosen[:, 0].tolist(), logprobs.gather(1, chosen)[:, 0].tolist(), strict=True))
