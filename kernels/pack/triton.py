"""One launch for a whole slab: each program fills one block of one matrix's slot, padding included.

Bytes: the slab once, the slot once. Where a matrix is as wide in the slab as in its slot (every A; every B of the engine's own
rank) both sides are read and written in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.pack.places import BLOCK, FIELDS, SPREAD, Places

WARPS = 4


@torch.no_grad()
def scatter_slab(slab: Tensor, places: Places, slot: int, scale: float, sums: Tensor | None = None) -> Tensor:
    """As `weft.kernels.pack.scatter_slab` says, on the current stream; nothing waits for it."""
    fault = torch.zeros(1, dtype=torch.int32, device=slab.device)
    aligned = places.aligned and slab.data_ptr() % 16 == 0
    _scatter[(len(places.work),)](
        slab, places.first, places.table, places.work, fault, places.sums() if sums is None else sums, slot, scale,
        FIELDS=FIELDS, BLOCK=BLOCK, ALIGN=8 if aligned else 1, SPREAD=SPREAD, num_warps=WARPS,
    )  # fmt: skip
    return fault


@torch.no_grad()
def sum_slot(places: Places, slot: int) -> Tensor:
    """As `weft.kernels.pack.sum_slot` says, on the current stream; nothing waits for it."""
    sums = places.sums()
    _sum[(len(places.work),)](
        places.first, places.table, places.work, sums, slot, FIELDS=FIELDS, BLOCK=BLOCK, SPREAD=SPREAD, num_warps=WARPS
    )  # fmt: skip
    return sums.sum()


@torch.no_grad()
def sum_words(words: Tensor) -> Tensor:
    """As `weft.kernels.pack.sum_words` says, on the current stream; nothing waits for it."""
    sums = torch.zeros(SPREAD, dtype=torch.int64, device=words.device)
    _sum_words[(triton.cdiv(len(words), BLOCK),)](words, sums, len(words), BLOCK=BLOCK, SPREAD=SPREAD, num_warps=WARPS)
    return sums.sum()


@triton.jit
def _add(sums, value, program, inside, BLOCK: tl.constexpr, SPREAD: tl.constexpr):
    """One program's part of the sum over a slot. value [BLOCK], of the stacks' type."""
    bits = value.to(tl.int16 if value.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True).to(tl.int64)
    counts = 2 * (program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)) + 1
    tl.atomic_add(sums + program % SPREAD, tl.sum(tl.where(inside, bits * counts, 0), 0))


@triton.jit(do_not_specialize=["size"])
def _sum_words(words, sums, size, BLOCK: tl.constexpr, SPREAD: tl.constexpr):
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    _add(sums, tl.load(words + place, mask=inside, other=0), program, inside, BLOCK, SPREAD)


@triton.jit(do_not_specialize=["slot"])
def _sum(like, table, work, sums, slot, FIELDS: tl.constexpr, BLOCK: tl.constexpr, SPREAD: tl.constexpr):
    program = tl.program_id(0)
    row_of_table = table + tl.load(work + 2 * program).to(tl.int64) * FIELDS
    element = tl.load(work + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(row_of_table + 1)
    place = tl.load(row_of_table).to(tl.pointer_type(like.dtype.element_ty)) + size * slot
    inside = element < size
    _add(sums, tl.load(place + element, mask=inside, other=0.0), program, inside, BLOCK, SPREAD)


@triton.jit(do_not_specialize=["slot"])
def _scatter(
    slab, like, table, work, fault, sums, slot, scale,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_of_table = table + tl.load(work + 2 * program).to(tl.int64) * FIELDS
    start = tl.load(work + 2 * program + 1) * BLOCK
    size = tl.multiple_of(tl.load(row_of_table + 1), ALIGN)
    cols = tl.load(row_of_table + 2).to(tl.int32)  # within one matrix 32 bits do, and divide several times faster
    stride = tl.load(row_of_table + 4).to(tl.int32)
    filled_rows = tl.load(row_of_table + 5).to(tl.int32)
    filled_cols = tl.load(row_of_table + 6).to(tl.int32)
    source = slab + tl.multiple_of(tl.load(row_of_table + 3), ALIGN)
    address = tl.load(row_of_table).to(tl.pointer_type(like.dtype.element_ty))
    place = tl.multiple_of(address + size * slot, ALIGN)
    element = start + tl.arange(0, BLOCK)
    if stride == cols:  # as wide there as here
        filled = tl.multiple_of(filled_rows * cols, ALIGN)
        value = tl.load(source + element, mask=element < filled, other=0.0).to(tl.float32)
    else:
        row, col = element // cols, element % cols
        there = (row < filled_rows) & (col < filled_cols)
        value = tl.load(source + row * stride + col, mask=there, other=0.0).to(tl.float32)
    sick = tl.max((~(tl.abs(value) < float("inf"))).to(tl.int32), 0)  # NaN compares false
    if sick != 0:
        tl.store(fault, 1)
    if tl.load(row_of_table + 7) != 0:
        value = value * scale
    narrow = value.to(like.dtype.element_ty)
    tl.store(place + element, narrow, mask=element < size)
    _add(sums, narrow, program, element < size, BLOCK, SPREAD)
