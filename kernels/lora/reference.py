"""Multi-adapter linear in plain torch, one small product per adapter; what the CPU runs.

T tokens, N adapters, R rank, I in, O out; t tokens of one adapter, r summed rank of its parts.
The backward is written out because autograd's own makes a full-size zero tensor for the slice of every adapter, and because the
parts of a fused linear can share one product with x: their A's are laid one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Piece:
    """One adapter in one linear: its tokens start:stop, and for each part that it touches, the columns of the output."""

    start: int
    stop: int
    scale: float
    columns: tuple[slice, ...]


def fused_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Sequence[int],
    a: Sequence[Sequence[Tensor | None]],
    b: Sequence[Sequence[Tensor | None]],
    scales: Sequence[float],
    offsets: Sequence[int],
) -> Tensor:
    """As `weft.kernels.lora.fused_lora_linear` says. An adapter without tokens gets no gradient rather than zeros."""
    assert x.dim() == 2 and offsets[-1] <= x.shape[0], f"offsets end at {offsets[-1]} of {tuple(x.shape)} tokens"
    pieces, pairs = [], []
    for n, scale in enumerate(scales):
        start, stop, column, columns = offsets[n], offsets[n + 1], 0, []
        assert 0 <= start <= stop, f"offsets must not decrease: {list(offsets)}"
        for part, width in enumerate(widths):
            part_a, part_b = a[part][n], b[part][n]
            if part_a is not None and part_b is not None and stop > start:
                columns.append(slice(column, column + width))
                pairs += [part_a, part_b]
            column += width
        if columns:
            pieces.append(_Piece(start, stop, scale, tuple(columns)))
    if not pieces:
        return F.linear(x, weight, bias)
    out: Tensor = _FusedLoraLinear.apply(x, weight, bias, pieces, *pairs)
    return out


class _FusedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pieces: list[_Piece], *pairs: Tensor) -> Tensor:
        assert not weight.requires_grad, "the base is frozen: its weight would get no gradient here"
        out = F.linear(x, weight, bias)
        stacked, lows, at = [], [], 0
        for piece in pieces:
            count = len(piece.columns)
            parts_a, parts_b = pairs[at : at + 2 * count : 2], pairs[at + 1 : at + 2 * count : 2]
            at += 2 * count
            a = parts_a[0] if count == 1 else torch.cat(parts_a)  # [r, I]
            low = x[piece.start : piece.stop] @ a.T  # [t, r]
            rows = out[piece.start : piece.stop]
            lows_of_parts = low.split([part.shape[0] for part in parts_a], dim=1)
            for columns, part_low, part_b in zip(piece.columns, lows_of_parts, parts_b, strict=True):
                rows[:, columns].addmm_(part_low, part_b.T, alpha=piece.scale)
            stacked.append(a)
            lows.append(low)
        ctx.pieces = pieces
        ctx.save_for_backward(x, weight, *stacked, *lows, *pairs[1::2])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        pieces: list[_Piece] = ctx.pieces
        x, weight, *saved = ctx.saved_tensors
        stacked, lows, all_b = saved[: len(pieces)], saved[len(pieces) : 2 * len(pieces)], saved[2 * len(pieces) :]
        grad_x = grad_out @ weight if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        at = 0
        for piece, a, low in zip(pieces, stacked, lows, strict=True):
            parts_b = all_b[at : at + len(piece.columns)]
            at += len(piece.columns)
            ranks = [part_b.shape[1] for part_b in parts_b]
            grad_rows = grad_out[piece.start : piece.stop]
            grad_low = torch.empty_like(low)  # [t, r]
            grad_bs = []
            places = zip(piece.columns, grad_low.split(ranks, dim=1), low.split(ranks, dim=1), parts_b, strict=True)
            for columns, place, part_low, part_b in places:
                grad_part = grad_rows[:, columns]
                place.copy_(grad_part @ part_b)
                grad_bs.append((part_low.T @ grad_part).mul_(piece.scale).T)  # a third of the time of its transpose on a CPU
            grad_low.mul_(piece.scale)
            grad_as = (grad_low.T @ x[piece.start : piece.stop]).split(ranks)
            if grad_x is not None:
                grad_x[piece.start : piece.stop].addmm_(grad_low, a)
            for grad_a, grad_b in zip(grad_as, grad_bs, strict=True):
                grads += [grad_a, grad_b]
        return grad_x, None, None, None, *grads
