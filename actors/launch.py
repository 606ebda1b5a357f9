"""The rows of many adapters' batches, packed end to end for one forward and backward.

T packed tokens, P loss tokens, n rows. A row goes in without its last token, which predicts nothing; a row without a loss token
stays out. The target at position t of a row is predicted by the hidden state at t - 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.transport.messages import TrainBatch


def check_batch(batch: TrainBatch, vocab_size: int) -> None:
    """Raises ValueError unless arrays, rows, mask and token ids are what TrainBatch says."""
    tokens, rows = len(batch.tokens), len(batch.offsets) - 1
    for name in ("mask", "sampler_logprobs", "versions"):
        _require(len(getattr(batch, name)) == tokens, f"{name} holds {len(getattr(batch, name))} values for {tokens} tokens")
    for name in ("advantages", "groups"):
        _require(len(getattr(batch, name)) == rows, f"{name} holds {len(getattr(batch, name))} values for {rows} rows")
    offsets = np.asarray(batch.offsets)
    covers = rows >= 0 and offsets[0] == 0 and offsets[-1] == tokens and bool((np.diff(offsets) > 0).all())
    _require(covers, f"offsets must rise from 0 to {tokens}")
    if tokens:
        low, high = int(np.min(batch.tokens)), int(np.max(batch.tokens))
        _require(low >= 0 and high < vocab_size, f"token ids from {low} to {high}: must be from 0 to {vocab_size - 1}")
        _require(not np.asarray(batch.mask, bool)[offsets[:-1]].any(), "a row's first token has a loss: nothing predicts it")
    counted = int(np.count_nonzero(batch.mask))
    _require(batch.loss_tokens >= counted, f"loss_tokens={batch.loss_tokens}: must be at least the {counted} masked tokens")
    _require(batch.loss_rows >= rows, f"loss_rows={batch.loss_rows}: must be at least the {rows} rows")


def _require(rule: bool, text: str) -> None:
    if not rule:
        raise ValueError(f"batch: {text}")


@dataclass(frozen=True)
class Piece:
    """Some whole rows of one adapter's batch. All of it on the host."""

    adapter: int  # whose: its index among the batches
    tokens: NDArray[np.int64]  # [T]
    lengths: NDArray[np.int64]  # [n]
    positions: NDArray[np.int64]  # [P] in the piece: whose hidden state predicts the target
    targets: NDArray[np.int64]  # [P]
    sources: NDArray[np.int64]  # [P] where the targets stand in the batch
    rows: NDArray[np.int64]  # [P] from 0 to n - 1
    row_tokens: NDArray[np.float32]  # [n] loss tokens of each
    sampler_logprobs: NDArray[np.float32]  # [P]
    versions: NDArray[np.int64]  # [P]
    advantages: NDArray[np.float32]  # [P]


def cut(adapter: int, batch: TrainBatch, chosen: NDArray[np.bool_]) -> Piece:
    """The rows of the batch that are `chosen` [rows]; each has a loss token."""
    offsets, mask = np.asarray(batch.offsets, np.int64), np.asarray(batch.mask, bool)
    lengths = np.diff(offsets)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    goes_in = chosen[row_of]
    goes_in[offsets[1:] - 1] = False
    place = np.cumsum(goes_in) - 1  # of each token that goes in
    sources = np.flatnonzero(mask & chosen[row_of])
    rows = (np.cumsum(chosen) - 1)[row_of[sources]]
    return Piece(
        adapter=adapter,
        tokens=np.asarray(batch.tokens, np.int64)[goes_in],
        lengths=lengths[chosen] - 1,
        positions=place[sources - 1],
        targets=np.asarray(batch.tokens, np.int64)[sources],
        sources=sources,
        rows=rows,
        row_tokens=np.bincount(rows, minlength=int(chosen.sum())).astype(np.float32),
        sampler_logprobs=np.asarray(batch.sampler_logprobs, np.float32)[sources],
        versions=np.asarray(batch.versions, np.int64)[sources],
        advantages=np.asarray(batch.advantages, np.float32)[row_of[sources]],
    )


def longest_row(batch: TrainBatch) -> int:
    """Packed tokens of the longest row that has a loss token; 0 where there is none."""
    offsets, mask = np.asarray(batch.offsets, np.int64), np.asarray(batch.mask, bool)
    losses = np.add.reduceat(mask, offsets[:-1], dtype=np.int64) if len(offsets) > 1 else np.zeros(0, np.int64)
    return int((np.diff(offsets) - 1)[losses > 0].max(initial=0))


def plan(batches: Sequence[TrainBatch], token_budget: int, left_out: Collection[int] = ()) -> Iterator[list[Piece]]:
    """The pieces of one launch after another, in the order of the batches: each holds at most `token_budget` packed tokens, or
    a single row that is longer. left_out: indices of batches that do not take part."""
    pieces: list[Piece] = []
    room = token_budget
    for adapter, batch in enumerate(batches):
        if adapter in left_out:
            continue
        offsets = np.asarray(batch.offsets, np.int64)
        has_loss = np.zeros(len(offsets) - 1, bool)
        has_loss[np.repeat(np.arange(len(has_loss)), np.diff(offsets))[np.asarray(batch.mask, bool)]] = True
        chosen = np.zeros_like(has_loss)
        for row in np.flatnonzero(has_loss):
            length = int(offsets[row + 1] - offsets[row]) - 1
            if length > room and (pieces or chosen.any()):
                yield pieces + ([cut(adapter, batch, chosen)] if chosen.any() else [])
                pieces, room = [], token_budget
                chosen = np.zeros_like(has_loss)
            chosen[row] = True
            room -= length
        if chosen.any():
            pieces.append(cut(adapter, batch, chosen))
    if pieces:
        yield pieces


@dataclass(frozen=True)
class Launch:
    """Pieces of several adapters as one packed batch, on the device."""

    tokens: Tensor  # int64 [T]
    row_offsets: list[int]  # n + 1
    token_offsets: list[int]  # one range of tokens per piece
    loss_tokens: list[int]  # of each piece
    positions: Tensor  # int64 [P]
    targets: Tensor  # int64 [P]

    @classmethod
    def join(cls, pieces: Sequence[Piece], device: torch.device) -> Launch:
        token_offsets = _bounds([len(piece.tokens) for piece in pieces])
        positions = [piece.positions + start for piece, start in zip(pieces, token_offsets, strict=False)]
        return cls(
            tokens=upload(np.concatenate([piece.tokens for piece in pieces]), device),
            row_offsets=_bounds(np.concatenate([piece.lengths for piece in pieces]).tolist()),
            token_offsets=token_offsets,
            loss_tokens=[len(piece.targets) for piece in pieces],
            positions=upload(np.concatenate(positions), device),
            targets=upload(np.concatenate([piece.targets for piece in pieces]), device),
        )


def _bounds(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device. Out of pinned memory, so that the host does not wait for what the device has yet to do."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
