"""Makes the shipped base from nothing: tokenizer, demonstrations, model.

    python -m weft.actors.base_model.pretrain --out actors/base_model/tiny --seed 0 --device cuda

On one H100 it takes 4.4 minutes, after 2 minutes of one CPU core for the demonstrations. What is imitated, and why the
result succeeds in three or four of ten attempts only, is in demonstrations.py. The same seed on the same machine gives the
same model. Data can be made on one machine (`--data-only --data FILE`) and used on another.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from weft.actors.base_model.demonstrations import Demonstration, make
from weft.actors.base_model.measure import table
from weft.actors.base_model.tokenizer import END_OF_TURN, MAX_LENGTH, make_tokenizer, render, save_tokenizer, vocabulary_size

IGNORED = -100  # the label of a token that has no loss


@dataclass(frozen=True)
class Settings:
    """Of the model and its training. The defaults made the shipped folder."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    demonstrations: int = 500_000
    batch_size: int = 2048
    steps: int = 6000
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Data:
    """Demonstrations as tokens: row i is tokens[offsets[i]:offsets[i+1]]; mask: True where the assistant speaks."""

    tokens: NDArray[np.uint16]
    mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]

    def save(self, file: Path) -> None:
        np.savez_compressed(file, tokens=self.tokens, mask=np.packbits(self.mask), offsets=self.offsets)

    @staticmethod
    def load(file: Path) -> Data:
        with np.load(file) as saved:
            tokens = saved["tokens"]
            return Data(tokens, np.unpackbits(saved["mask"], count=len(tokens)).astype(bool), saved["offsets"])


def encode(demonstrations: list[Demonstration], tokenizer: Any) -> Data:
    """Every demonstration as a sampler would have recorded it: each segment is tokenized by itself."""
    texts, speaks, rows = [], [], []
    for row, demonstration in enumerate(demonstrations):
        segments = [(render(tokenizer, demonstration.prompt.messages, demonstration.prompt.tools, True), False)]
        for turn in demonstration.turns:
            said = turn["role"] == "assistant"
            segments.append((turn["content"] + END_OF_TURN if said else "\n" + render(tokenizer, [turn], (), True), said))
        texts += [text for text, _ in segments]
        speaks += [said for _, said in segments]
        rows += [row] * len(segments)
    encoded = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.array([len(ids) for ids in encoded])
    totals = np.bincount(np.array(rows), weights=lengths, minlength=len(demonstrations)).astype(np.int64)
    return Data(
        tokens=np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded]),
        mask=np.repeat(np.array(speaks), lengths),
        offsets=np.concatenate([[0], np.cumsum(totals)]),
    )


def make_model(settings: Settings, tokenizer: Any) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    config = Qwen3Config(
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
        attn_implementation="eager",  # its backward pass repeats itself exactly
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def train(model: Qwen3ForCausalLM, data: Data, settings: Settings, seed: int, device: str) -> None:
    """AdamW on the tokens that the assistant speaks; padding stands at the right, where causal attention never sees it."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for step in range(settings.steps):
        if len(order) < settings.batch_size:
            order = np.concatenate([order, rng.permutation(len(data.offsets) - 1)])
        rows, order = order[: settings.batch_size], order[settings.batch_size :]
        tokens, labels = (torch.from_numpy(array).to(device) for array in _batch(data, rows))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == settings.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    model.to("cpu").eval()


def _batch(data: Data, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, labels) [rows, longest], padded at the right with 0 and IGNORED."""
    starts, ends = data.offsets[rows], data.offsets[rows + 1]
    places = starts[:, None] + np.arange((ends - starts).max())
    inside = places < ends[:, None]
    places = np.minimum(places, len(data.tokens) - 1)
    tokens = np.where(inside, data.tokens[places], 0).astype(np.int64)
    return tokens, np.where(inside & data.mask[places], tokens, IGNORED)


def _schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup)))


def pretrain(out: Path, settings: Settings, seed: int, device: str, data: Data | None = None) -> Qwen3ForCausalLM:
    """Write a Hugging Face folder to `out`. data: the demonstrations; None makes them."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    data = data or encode(make(seed, settings.demonstrations), tokenizer)
    model = make_model(settings, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(data.offsets) - 1:,} demonstrations, {len(data.tokens):,} tokens")
    train(model, data, settings, seed, device)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--data", type=Path, help="demonstrations made before with --data-only")
    parser.add_argument("--data-only", action="store_true", help="make the demonstrations, write them to --data, and end")
    parser.add_argument("--no-measure", action="store_true", help="do not sample the model at the end")
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps)
    if not (arguments.data if arguments.data_only else arguments.out):
        parser.error("--data-only needs --data" if arguments.data_only else "--out is not set")
    if arguments.data_only:
        encode(make(arguments.seed, settings.demonstrations), make_tokenizer()).save(arguments.data)
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS repeats itself only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    data = Data.load(arguments.data) if arguments.data else None
    model = pretrain(arguments.out, settings, arguments.seed, arguments.device, data)
    if not arguments.no_measure:
        print(table(model, make_tokenizer(), episodes=256))


if __name__ == "__main__":
    main()
