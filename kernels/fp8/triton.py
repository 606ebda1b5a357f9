"""What makes the rows that FP8 products read, each in one kernel: quantised alone, after a norm with its residual, and after
SwiGLU. The formulas are those of weft.kernels.layers, the rounding is that of the reference.

T tokens, H hidden size, I MLP width. One program has one row, as a power of two and what is left of it, for a block of the next
power of two leaves up to half of the threads idle; scales are fp32 [T, 1].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.fp8.reference import LARGEST, SMALLEST_ROW


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `weft.kernels.fp8.quantize_rows` says."""
    x = x.contiguous()
    tokens, size = x.shape
    q, scales = _empty(x, size)
    _fp8_quantize[(tokens,)](x, q, scales, size, LARGEST=LARGEST, SMALLEST=SMALLEST_ROW, **_blocks(size))
    return q, scales


def norm_rows(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta [T, H], weight [H] -> x + delta; the rows of its norm times weight."""
    tokens, size = x.shape
    total = x if delta is None else torch.empty_like(x)
    q, scales = _empty(x, size)
    _fp8_norm[(tokens,)](
        x, x if delta is None else delta, weight, total, q, scales, size, eps,
        LARGEST=LARGEST, SMALLEST=SMALLEST_ROW, ADD=delta is not None, **_blocks(size),
    )  # fmt: skip
    return total, q, scales


def swiglu_rows(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up [T, 2 I] -> the rows [T, I] of silu(gate) * up"""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scales = _empty(gate_up, width)
    _fp8_swiglu[(tokens,)](gate_up, q, scales, width, LARGEST=LARGEST, SMALLEST=SMALLEST_ROW, **_blocks(width))
    return q, scales


def _blocks(size: int) -> dict[str, int]:
    """The largest power of two within a row, the one that holds the rest, and warps for both."""
    main = 1 << (size.bit_length() - 1)
    warps = 4 if main <= 2048 else 8 if main <= 8192 else 16
    return {"MAIN": main, "TAIL": triton.next_power_of_2(max(1, size - main)), "num_warps": warps}


def _empty(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    tokens = like.shape[0]
    q = torch.empty(tokens, size, dtype=torch.float8_e4m3fn, device=like.device)
    return q, torch.empty(tokens, 1, dtype=torch.float32, device=like.device)


@triton.jit
def _magnitude(value):
    return tl.where(value == value, tl.abs(value), float("inf"))  # a maximum would pass a NaN by


@triton.jit
def _store_row(q, scales, row, at, rest_at, value, rest, there, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    largest = tl.maximum(tl.maximum(tl.max(_magnitude(value), 0), tl.max(_magnitude(rest), 0)), SMALLEST)
    scale = LARGEST / largest
    tl.store(q + at, (value * scale).to(q.dtype.element_ty))
    tl.store(q + rest_at, (rest * scale).to(q.dtype.element_ty), mask=there)
    tl.store(scales + row, largest / LARGEST)


@triton.jit
def _fp8_quantize(
    x, q, scales, size, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * size
    at, rest_at = start + tl.arange(0, MAIN), start + MAIN + tl.arange(0, TAIL)
    there = tl.arange(0, TAIL) < size - MAIN
    value = tl.load(x + at).to(tl.float32)
    rest = tl.load(x + rest_at, mask=there, other=0.0).to(tl.float32)
    _store_row(q, scales, row, at, rest_at, value, rest, there, LARGEST, SMALLEST)


@triton.jit
def _fp8_norm(
    x, delta, weight, total, q, scales, size, eps, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, ADD: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * size
    c, d = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    at, rest_at, there = start + c, start + d, d < size
    value, rest = tl.load(x + at), tl.load(x + rest_at, mask=there, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(delta + at).to(tl.float32)).to(total.dtype.element_ty)
        rest = (rest.to(tl.float32) + tl.load(delta + rest_at, mask=there, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, value)
        tl.store(total + rest_at, rest, mask=there)
    value, rest = value.to(tl.float32), rest.to(tl.float32)
    scale = tl.rsqrt((tl.sum(value * value, 0) + tl.sum(rest * rest, 0)) / size + eps)
    value *= scale * tl.load(weight + c).to(tl.float32)
    rest *= scale * tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
    _store_row(q, scales, row, at, rest_at, value, rest, there, LARGEST, SMALLEST)


@triton.jit
def _fp8_swiglu(
    gate_up, q, scales, width, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    c, d = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    start, there = row.to(tl.int64) * width, d < width
    gates = gate_up + 2 * start
    gate, up = tl.load(gates + c).to(tl.float32), tl.load(gates + width + c).to(tl.float32)
    rest_gate = tl.load(gates + d, mask=there, other=0.0).to(tl.float32)
    rest_up = tl.load(gates + width + d, mask=there, other=0.0).to(tl.float32)
    value, rest = gate * tl.sigmoid(gate) * up, rest_gate * tl.sigmoid(rest_gate) * rest_up
    _store_row(q, scales, row, start + c, start + d, value, rest, there, LARGEST, SMALLEST)
