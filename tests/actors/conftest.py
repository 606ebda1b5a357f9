"""A trainer on a tiny random base, asked synchronously, and batches for it."""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.actors.model import Decoder, save_model
from weft.actors.trainer import Trainer
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig, TrainerConfig
from weft.transport import messages
from weft.transport.messages import UNSAMPLED, AdapterRef, StepResult, TrainBatch

VOCAB = 61
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


class Bench:
    """A trainer, asked synchronously."""

    def __init__(
        self,
        base: Path,
        folder: Path,
        adapters: Sequence[AdapterConfig],
        dtype: str = "float32",
        device: str = "cpu",
        base_precision: str = "full",
        **settings: int,
    ) -> None:
        self.folder = folder
        slabs = str(folder / "slabs")
        self.trainer = Trainer(str(base), dtype, TrainerConfig(**settings), str(folder), slabs, device, base_precision)
        asyncio.run(self.trainer.start())
        for config in adapters:
            self.ask(messages.AddAdapter(to_mapping(config)))

    def ask(self, message: Any) -> Any:
        return asyncio.run(self.trainer.handle(message))

    def step(self, *batches: TrainBatch) -> dict[str, StepResult]:
        results = self.ask(messages.TrainStep(batches)).results
        assert [result.ref.name for result in results] == [batch.ref.name for batch in batches]
        return {result.ref.name: result for result in results}

    def state(self, name: str) -> Tensor:
        with self.trainer._store.hold([name]) as (slabs,):
            return slabs.state.clone()

    def gradient(self, name: str) -> Tensor:
        with self.trainer._store.hold([name]) as (slabs,):
            assert slabs.gradient is not None
            return slabs.gradient.clone()

    def perturb(self, *names: str) -> None:
        """Give B values, so that the adapter is not the base and A has a gradient."""
        for name in names:
            layout = self.trainer._adapters[name].layout
            with self.trainer._store.hold([name]) as (slabs,):
                state = slabs.state.clone()
                for i, (_, b) in enumerate(layout.views(state[0]).values()):
                    b.copy_(torch.empty(b.shape).normal_(0, 0.1, generator=torch.Generator().manual_seed(i)))
                slabs.replace_state(state)


@pytest.fixture(autouse=True, scope="module")
def no_variables_left() -> Iterator[None]:
    """An engine in the tests' own process sets some for vLLM, which the processes of later tests would inherit."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(scope="session")
def trainer_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder, generator = Decoder(MODEL), torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    folder = tmp_path_factory.mktemp("base")
    save_model(decoder, folder)
    return folder


@pytest.fixture
def make(trainer_base: Path, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def bench(*adapters: AdapterConfig, **settings: Any) -> Bench:
        made.append(Bench(trainer_base, tmp_path / f"trainer-{len(made)}", adapters, **settings))
        return made[-1]

    yield bench
    for one in made:
        asyncio.run(one.trainer.aclose())


@pytest.fixture
def trainer_bench() -> type[Bench]:
    """The class: a trainer on a base of the test's own."""
    return Bench


@pytest.fixture
def batch() -> Callable[..., TrainBatch]:
    return make_batch


def make_batch(name: str, version: int = 0, rows: int = 6, seed: int = 0, sampled: int | None = None) -> TrainBatch:
    """Rows of unequal length whose second half is sampled, in two turns with an unsampled token between."""
    rng = np.random.default_rng([seed, *name.encode()])
    lengths = rng.integers(6, 15, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    mask[offsets[1:] - 2] = False
    tokens = rng.integers(0, VOCAB, offsets[-1]).astype(np.int32)
    logprobs = np.where(mask, rng.normal(-4.0, 0.5, len(mask)), 0).astype(np.float32)
    versions = np.where(mask, version if sampled is None else sampled, UNSAMPLED).astype(np.int32)
    advantages = rng.normal(size=rows).astype(np.float32)
    groups = (np.arange(rows) // 2).astype(np.int32)
    counted = int(mask.sum())
    ref = AdapterRef(name, 0, version)
    return TrainBatch(ref, tokens, offsets, mask, logprobs, versions, advantages, groups, counted + 5, rows + 1)
