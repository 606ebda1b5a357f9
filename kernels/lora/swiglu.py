"""SwiGLU between two multi-adapter linears on CUDA, which adds what the adapters add: the delta of gate and up never goes to
memory, nor does that of SwiGLU's own gradient. One pass over the tokens forward, one backward.

T tokens, R rank, I MLP width; tables as in triton.py. Rows without adapter go through weft.kernels.layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.layers.triton import swiglu_gradient, swiglu_rows
from weft.kernels.lora.tables import TILE, Group, Tables
from weft.kernels.lora.triton import precision

BLOCK_T, BLOCK_C = 64, 64  # tokens and columns of one program


def lora_swiglu(gate_up: Tensor, low: Tensor, tables: Tables, group: Group) -> Tensor:
    """gate_up [T, 2 I] of the base, low [T, 2 R] of its adapters -> silu(gate) * up [T, I] with their deltas."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], width)
    for start, stop in tables.bare:
        swiglu_rows(gate_up[start:stop], out[start:stop])
    for own in tables.classes:
        grid = (triton.cdiv(width, BLOCK_C), len(own.tiles) * (TILE // BLOCK_T))
        _lora_swiglu[grid](
            gate_up, low, out, tables.wide, own.tiles, tables.ranks, group.first["b"], tables.adapters, low.stride(0), width,
            ALIGN=group.align, STEP=group.align // low.element_size(), EVEN=width % BLOCK_C == 0, PRECISION=precision(low),
            SPLIT=TILE // BLOCK_T, BLOCK_T=BLOCK_T, BLOCK_R=own.block, BLOCK_C=BLOCK_C, num_warps=8,
        )  # fmt: skip
    return out


def lora_swiglu_gradient(
    gate_up: Tensor, low: Tensor, group: Group, grad_out: Tensor, grad_low: Tensor, down: Group, tables: Tables
) -> tuple[Tensor, Tensor]:
    """grad_out [T, I] of the base, grad_low [T, R] of the adapters of the linear behind -> gradient of gate_up [T, 2 I], and
    once more what `lora_swiglu` gave [T, I]."""
    width = grad_out.shape[1]
    grad, again = torch.empty_like(gate_up), torch.empty_like(grad_out)
    for start, stop in tables.bare:
        swiglu_gradient(gate_up[start:stop], grad_out[start:stop], (grad[start:stop], again[start:stop]))
    for own in tables.classes:
        grid = (triton.cdiv(width, BLOCK_C), len(own.tiles) * (TILE // BLOCK_T))
        _lora_swiglu_gradient[grid](
            gate_up, low, grad_out, grad_low, grad, again, tables.wide, own.tiles, tables.ranks, group.first["b"],
            down.first["a"], tables.adapters, low.stride(0), grad_low.stride(0), width,
            ALIGN=min(group.align, down.align), STEP=min(group.align, down.align) // low.element_size(),
            EVEN=width % BLOCK_C == 0, PRECISION=precision(low), SPLIT=TILE // BLOCK_T, BLOCK_T=BLOCK_T, BLOCK_R=own.block,
            BLOCK_C=BLOCK_C, num_warps=8,
        )  # fmt: skip
    return grad, again


@triton.jit
def _delta(
    low, wide, at, rank, column, t, stop, c, width, stride_low, stride_j, stride_c,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """low[t, column : column + rank] times the matrix whose address is wide[at], at columns c; 0 where there is none."""
    j = tl.arange(0, BLOCK_R)
    address = tl.load(wide + at)
    matrix = tl.multiple_of(address.to(tl.pointer_type(low.dtype.element_ty)), ALIGN)
    there = (j < rank) & (address != 0)
    low_at = low + t.to(tl.int64)[:, None] * stride_low + (column + j)[None, :]
    rows = tl.load(low_at, mask=(t < stop)[:, None] & there[None, :], other=0.0)
    mask = there[:, None] if EVEN else there[:, None] & (c < width)[None, :]
    block = tl.load(matrix + j[:, None] * stride_j + c[None, :] * stride_c, mask=mask, other=0.0)
    return tl.dot(rows, block, input_precision=PRECISION)


@triton.jit
def _gate_and_up(
    gate_up, low, wide, first, adapters, n, rank, t, stop, c, width, mask, stride_low,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    at = gate_up + t.to(tl.int64)[:, None] * 2 * width + c[None, :]
    gate, up = tl.load(at, mask=mask, other=0.0).to(tl.float32), tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    gate += _delta(
        low, wide, first + n, rank, 0, t, stop, c, width, stride_low, 1, rank, ALIGN, EVEN, PRECISION, BLOCK_R
    )  # fmt: skip
    up += _delta(
        low, wide, first + adapters + n, rank, rank, t, stop, c, width, stride_low, 1, rank, ALIGN, EVEN, PRECISION, BLOCK_R
    )  # fmt: skip
    return gate, up


@triton.jit(do_not_specialize=["first", "adapters"])
def _lora_swiglu(
    gate_up, low, out, wide, tiles, ranks, first, adapters, stride_low, width,
    ALIGN: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1) // SPLIT
    n, start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rank = tl.multiple_of(tl.load(ranks + n), STEP)
    t = start + tl.program_id(1) % SPLIT * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (t < stop)[:, None] if EVEN else (t < stop)[:, None] & (c < width)[None, :]
    gate, up = _gate_and_up(
        gate_up, low, wide, first, adapters, n, rank, t, stop, c, width, mask, stride_low, ALIGN, EVEN, PRECISION, BLOCK_R
    )
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + t.to(tl.int64)[:, None] * width + c[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["first", "first_down", "adapters"])
def _lora_swiglu_gradient(
    gate_up, low, grad_out, grad_low, grad, again, wide, tiles, ranks, first, first_down, adapters, stride_low,
    stride_grad_low, width,
    ALIGN: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1) // SPLIT
    n, start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rank = tl.multiple_of(tl.load(ranks + n), STEP)
    t = start + tl.program_id(1) % SPLIT * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (t < stop)[:, None] if EVEN else (t < stop)[:, None] & (c < width)[None, :]
    gate, up = _gate_and_up(
        gate_up, low, wide, first, adapters, n, rank, t, stop, c, width, mask, stride_low, ALIGN, EVEN, PRECISION, BLOCK_R
    )
    narrow_at = t.to(tl.int64)[:, None] * width + c[None, :]
    out = tl.load(grad_out + narrow_at, mask=mask, other=0.0).to(tl.float32)
    out += _delta(
        grad_low, wide, first_down + n, rank, 0, t, stop, c, width, stride_grad_low, width, 1, ALIGN, EVEN, PRECISION, BLOCK_R
    )  # fmt: skip
    kind = grad.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    at = grad + t.to(tl.int64)[:, None] * 2 * width + c[None, :]
    tl.store(at, (out * up * sigmoid * (1 + gate * (1 - sigmoid))).to(kind), mask=mask)
    tl.store(at + width, (out * gate * sigmoid).to(kind), mask=mask)
    tl.store(again + narrow_at, (gate * sigmoid * up).to(kind), mask=mask)
