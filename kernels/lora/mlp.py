"""The backward of SwiGLU together with what else would read its tiles: the gradients of down's A, and of gate's and up's B.

T tokens, N adapters, R rank, I MLP width. Alone, SwiGLU's backward writes its output once more for down's A to read, and gate's
and up's B read the gradient that it has just written: here both are sums in passing, and 4 of 9 parts of the memory traffic go.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.layers.triton import swiglu_gradient
from weft.kernels.lora.tables import Group, Tables
from weft.kernels.lora.triton import _add_to_slab, add_slots, precision

# For ranks to 32: best of eight (bench_lora.py, H200). So many registers leave room for three programs.
SETTINGS = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
WIDE = SETTINGS | {"num_warps": 8, "num_stages": 2, "maxnreg": 255}  # beyond: three sums of a rank of 128 need the registers


def swiglu_outer(
    hidden: Tensor, grad_active: Tensor, low: Tensor, grad_low: Tensor, tables: Tables, gate_up: Group, down: Group
) -> Tensor:
    """hidden [T, 2 I], grad_active [T, I] of silu(gate) * up, low of gate_up and dlow of down as `shrink` gives them -> the
    gradient of hidden [T, 2 I]. Adds to the gradient slabs what `outer` would: down's A, and gate's and up's B."""
    width = down.in_features
    assert gate_up.widths == (width, width), f"gate and up of {gate_up.widths} before {width} columns"
    grad = torch.empty_like(hidden)
    for start, stop in tables.bare:
        grad[start:stop] = swiglu_gradient(hidden[start:stop], grad_active[start:stop])[0]
    for own in tables.classes:
        sums = torch.empty(3 * own.slots * own.block * width, dtype=torch.float32, device=hidden.device)
        sums_a, sums_b = sums.split([own.slots * own.block * width, 2 * own.slots * own.block * width])
        align, settings = min(gate_up.align, down.align), SETTINGS if own.block <= 32 else WIDE
        block_c = settings["BLOCK_C"]
        _swiglu_outer[(triton.cdiv(width, block_c), len(own.chunks))](
            hidden, grad_active, grad, low, grad_low, sums_a, sums_b, own.chunks, tables.wide, tables.ranks, tables.accumulate,
            down.first["grad_a"], gate_up.first["grad_b"], tables.adapters, width, low.stride(0), grad_low.stride(0),
            ALIGN=align, STEP=align // low.element_size(), EVEN=width % block_c == 0, PRECISION=precision(low),
            BLOCK_R=own.block, **settings,
        )  # fmt: skip
        if own.slots:
            add_slots(sums_a, tables, own, down, "grad_a", 1, own.block, own.block)
            add_slots(sums_b, tables, own, gate_up, "grad_b", 1, own.block, own.block)
    return grad


@triton.jit(do_not_specialize=["first_a", "first_b", "adapters"])
def _swiglu_outer(
    hidden, grad_active, grad, low, grad_low, sums_a, sums_b, chunks, wide, ranks, accumulate, first_a, first_b, adapters,
    width, stride_low, stride_grad_low,
    ALIGN: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A chunk's tokens by a block of columns of gate, and the same of up."""
    chunk = tl.program_id(1)
    n, start = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
    stop, slot = tl.load(chunks + 4 * chunk + 2), tl.load(chunks + 4 * chunk + 3)
    rank = tl.multiple_of(tl.load(ranks + n), STEP)
    narrow = grad.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_R)
    t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
    at = t[:, None] * (2 * width) + c[None, :]
    active_at = t[:, None] * width + c[None, :]
    low_at = low + t[:, None] * stride_low + j[None, :]
    grad_low_at = grad_low + t[:, None] * stride_grad_low + j[None, :]
    of_a = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    of_gate = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    of_up = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first in range(start, stop, BLOCK_T):
        left = tl.arange(0, BLOCK_T) < stop - first
        mask = left[:, None] if EVEN else left[:, None] & (c < width)[None, :]
        gate = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(hidden + at + width, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(grad_active + active_at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_gate = (out * up * sigmoid * (1 + gate * (1 - sigmoid))).to(narrow)
        grad_up = (out * silu).to(narrow)
        active = (silu.to(narrow).to(tl.float32) * up).to(narrow)
        tl.store(grad + at, grad_gate, mask=mask)
        tl.store(grad + at + width, grad_up, mask=mask)
        rows = left[:, None] & (j < rank)[None, :]
        of_a = tl.dot(tl.trans(active), tl.load(grad_low_at, mask=rows, other=0.0), of_a, input_precision=PRECISION)
        of_gate = tl.dot(tl.trans(grad_gate), tl.load(low_at, mask=rows, other=0.0), of_gate, input_precision=PRECISION)
        of_up = tl.dot(tl.trans(grad_up), tl.load(low_at + rank, mask=rows, other=0.0), of_up, input_precision=PRECISION)
        at += BLOCK_T * 2 * width
        active_at += BLOCK_T * width
        low_at += BLOCK_T * stride_low
        grad_low_at += BLOCK_T * stride_grad_low
    if slot < 0:
        _add_to_slab(of_a, wide, ranks, accumulate, first_a, adapters, n, 0, c, width, width, 1, False, ALIGN, BLOCK_R)
        _add_to_slab(of_gate, wide, ranks, accumulate, first_b, adapters, n, 0, c, width, width, 1, True, ALIGN, BLOCK_R)
        _add_to_slab(of_up, wide, ranks, accumulate, first_b, adapters, n, 1, c, width, width, 1, True, ALIGN, BLOCK_R)
    else:
        mask = (j < rank)[None, :] & (c < width)[:, None]
        place = slot.to(tl.int64) * BLOCK_R
        tl.store(sums_a + (place + j)[None, :] * width + c[:, None], of_a, mask=mask)
        tl.store(sums_b + (2 * place + j)[None, :] * width + c[:, None], of_gate, mask=mask)
        tl.store(sums_b + (2 * place + BLOCK_R + j)[None, :] * width + c[:, None], of_up, mask=mask)
