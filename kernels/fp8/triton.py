"""What makes the rows that FP8 products read, each in one kernel: quantised alone, after a norm with its residual, and after
SwiGLU. The formulas are those of weft.kernels.layers, the rounding is that of the reference.

T tokens, H hidden size, I MLP width. One program has one row; scales are fp32 [T, 1].
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
    block = triton.next_power_of_2(size)
    _fp8_quantize[(tokens,)](x, q, scales, size, LARGEST=LARGEST, SMALLEST=SMALLEST_ROW, BLOCK=block, num_warps=_warps(block))
    return q, scales


def norm_rows(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta [T, H], weight [H] -> x + delta; the rows of its norm times weight."""
    tokens, size = x.shape
    total = x if delta is None else torch.empty_like(x)
    q, scales = _empty(x, size)
    block = triton.next_power_of_2(size)
    _fp8_norm[(tokens,)](
        x, x if delta is None else delta, weight, total, q, scales, size, eps,
        LARGEST=LARGEST, SMALLEST=SMALLEST_ROW, ADD=delta is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, q, scales


def swiglu_rows(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up [T, 2 I] -> the rows [T, I] of silu(gate) * up"""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scales = _empty(gate_up, width)
    block = triton.next_power_of_2(width)
    _fp8_swiglu[(tokens,)](
        gate_up, q, scales, width, LARGEST=LARGEST, SMALLEST=SMALLEST_ROW, BLOCK=block, num_warps=_warps(2 * block)
    )
    return q, scales


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def _empty(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    tokens = like.shape[0]
    q = torch.empty(tokens, size, dtype=torch.float8_e4m3fn, device=like.device)
    return q, torch.empty(tokens, 1, dtype=torch.float32, device=like.device)


@triton.jit
def _magnitude(value):
    return tl.where(value == value, tl.abs(value), float("inf"))  # a maximum would pass a NaN by


@triton.jit
def _store_row(q, scales, row, at, value, largest, mask, LARGEST: tl.constexpr):
    tl.store(q + at, (value * (LARGEST / largest)).to(q.dtype.element_ty), mask=mask)
    tl.store(scales + row, largest / LARGEST)


@triton.jit
def _fp8_quantize(x, q, scales, size, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * size + c
    value = tl.load(x + at, mask=c < size, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(_magnitude(value), 0), SMALLEST)
    _store_row(q, scales, row, at, value, largest, c < size, LARGEST)


@triton.jit
def _fp8_norm(
    x, delta, weight, total, q, scales, size, eps, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    mask = c < size
    at = row.to(tl.int64) * size + c
    value = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=mask)
    value = value.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / size + eps) * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(_magnitude(value), 0), SMALLEST)
    _store_row(q, scales, row, at, value, largest, mask, LARGEST)


@triton.jit
def _fp8_swiglu(gate_up, q, scales, width, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    mask = c < width
    at = row.to(tl.int64) * width + c
    gate = tl.load(gate_up + row.to(tl.int64) * width + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row.to(tl.int64) + 1) * width + at, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    largest = tl.maximum(tl.max(_magnitude(value), 0), SMALLEST)
    _store_row(q, scales, row, at, value, largest, mask, LARGEST)
