"""The three kernels of multi-adapter linears on CUDA, for any adapters in any mix of ranks: shrink [T, I] -> [T, R], expand
[T, R] -> [T, O], outer [T, R], [T, I] -> [R, I]. linears.py and fp8.py say when each runs.

T tokens, N adapters, P parts of a fused linear, R rank, I in, O out.
s = alpha / R is applied once, in fp32, where low and dlow are rounded. A program works for one adapter, through addresses
(`tables`); a rank is padded in registers alone. Sums over an adapter's tokens have a fixed order and no atomics: the same
adapter and tokens give the same bits whoever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.lora.tables import TILE, Group, RankClass, Tables

ROW = 16  # columns that divide the width of `low`
WIDEST_SHARED = 128  # rows of all parts that one program of shrink or outer holds; beyond it each part reads for itself
SUMMED = 32  # columns of one program that adds up chunks: few read little each, and wait
EXPAND = {"BLOCK_T": 64, "BLOCK_O": 128, "SPAN": 4, "num_warps": 4, "num_stages": 2}  # best of eleven (bench_lora.py, H200)


def shrink(
    x: Tensor, tables: Tables, group: Group, kind: str, scales: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """kind "a": s x A^T of every part; "b": s dY_p B_p of each part. -> [T, at least P * widest rank], part p of an adapter of
    rank R in columns p R to (p + 1) R; the rest, and rows without adapter, are left unwritten. scales [T, 1]: of the rows of an
    x in FP8; dtype is then the adapters'."""
    parts, shared = len(group.widths), kind == "a"
    width = triton.cdiv(parts * tables.max_rank, ROW) * ROW  # whatever the ranks: kernels are compiled for such strides alone
    low = torch.empty(x.shape[0], width, dtype=dtype or x.dtype, device=x.device)
    for own in tables.classes:
        together = parts if shared and parts * own.block <= WIDEST_SHARED else 1
        block_r = triton.next_power_of_2(together * own.block)
        depth = 64
        even = all(width % depth == 0 for width in ((group.in_features,) if shared else group.widths))
        _shrink[(len(own.tiles), parts // together)](
            x, low, x if scales is None else scales, tables.wide, own.tiles, tables.ranks, tables.scales, group.first[kind],
            group.first["columns"], tables.adapters, x.stride(0), low.stride(0), group.in_features,
            PARTS=together, TRANSPOSED=not shared, ALIGN=group.align, STEP=group.align // low.element_size(),
            COLUMN_STEP=_column_step(group, x), EVEN=even, SCALED=scales is not None, PRECISION=precision(low),
            BLOCK_T=TILE, BLOCK_R=block_r, BLOCK_K=depth, num_warps=8 if block_r > 64 else 4,
            num_stages=_stages(low),
        )  # fmt: skip
    return low


def expand(low: Tensor, tables: Tables, group: Group, kind: str, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """kind "b": low_p B_p^T in the columns of each part [T, sum(widths)]; "a": the sum over parts of low_p A_p [T, I]. Rows
    without adapter get the bias, or 0. onto: is added to, in place, and has the bias already."""
    forward, parts = kind == "b", len(group.widths)
    width = sum(group.widths) if forward else group.in_features
    out = torch.empty(low.shape[0], width, dtype=low.dtype, device=low.device) if onto is None else onto
    for start, stop in tables.bare if onto is None else ():
        out[start:stop] = 0 if bias is None else bias
    block_t, block_o, span = EXPAND["BLOCK_T"], EXPAND["BLOCK_O"], EXPAND["SPAN"]
    for own in tables.classes:
        held = own.block * (1 if forward else parts) * low.element_size()  # bytes of a column of what a program holds
        settings = EXPAND | ({"num_stages": 1} if held > 2 * 3 * 32 else {})
        wide = max(group.widths) if forward else width
        even = all(size % block_o == 0 for size in (group.widths if forward else (width,)))
        grid = (triton.cdiv(wide, block_o * span), parts if forward else 1, len(own.tiles) * (TILE // block_t))
        _expand[grid](
            low, out, bias if bias is not None else low, tables.wide, own.tiles, tables.ranks, group.first[kind],
            group.first["columns"], tables.adapters, low.stride(0), width,
            PARTS=1 if forward else parts, TRANSPOSED=forward, BIAS=bias is not None, ADD=onto is not None, ALIGN=group.align,
            STEP=group.align // low.element_size(), EVEN=even, PRECISION=precision(low), SPLIT=TILE // block_t,
            BLOCK_R=own.block, **settings,
        )  # fmt: skip
    return out


def outer(low: Tensor, y: Tensor, tables: Tables, group: Group, kind: str, scales: Tensor | None = None) -> None:
    """kind "grad_a": low^T y for all parts, y [T, I]; "grad_b": low_p^T y_p of each part, transposed, y [T, sum(widths)].
    Added to the gradient slabs in fp32, or written over them where tables.accumulate is 0. scales: of the rows of a y in FP8.
    """
    shared, parts = kind == "grad_a", len(group.widths)
    for own in tables.classes:
        together = parts if shared and parts * own.block <= WIDEST_SHARED else 1
        block_r = triton.next_power_of_2(together * own.block)
        wide = group.in_features if shared else max(group.widths)
        block_c = 128 if block_r <= 128 else 64
        grid = (triton.cdiv(wide, block_c), parts // together)
        part_rows = together * own.block
        sums = torch.empty(own.slots * (parts // together) * part_rows * wide, dtype=torch.float32, device=y.device)
        shape = {"PARTS": together, "TRANSPOSED": not shared, "ALIGN": group.align, "BLOCK_R": block_r, "BLOCK_C": block_c}
        even = all(size % block_c == 0 for size in ((wide,) if shared else group.widths))
        places = (tables.wide, tables.ranks, tables.accumulate, group.first[kind], group.first["columns"], tables.adapters)
        _outer[(*grid, len(own.chunks))](
            low, y, y if scales is None else scales, sums, own.chunks, *places, low.stride(0), y.stride(0), wide, part_rows,
            group.in_features, STEP=group.align // low.element_size(), COLUMN_STEP=_column_step(group, y), EVEN=even,
            SCALED=scales is not None, PRECISION=precision(low),
            BLOCK_T=64, num_warps=8 if block_r * block_c >= 16384 else 4, num_stages=_stages(low) - 1, **shape,
        )  # fmt: skip
        if own.slots:
            add_slots(sums, tables, own, group, kind, together, part_rows, block_r)


def add_slots(
    sums: Tensor, tables: Tables, own: RankClass, group: Group, kind: str, together: int, part_rows: int, block_r: int
) -> None:
    """The sums of chunks [slots, parts / together, part_rows, widest part] to the gradient slabs."""
    shared, parts = kind == "grad_a", len(group.widths)
    wide = group.in_features if shared else max(group.widths)
    _add_slots[(triton.cdiv(wide, SUMMED), parts // together, len(own.sums))](
        sums, own.sums, tables.wide, tables.ranks, tables.accumulate, group.first[kind], group.first["columns"],
        tables.adapters, wide, part_rows, group.in_features, PARTS=together, TRANSPOSED=not shared, ALIGN=group.align,
        BLOCK_R=block_r, BLOCK_C=SUMMED,
    )  # fmt: skip


def _column_step(group: Group, x: Tensor) -> int:
    """What divides every part's first column and width in x: as many elements as are 16 bytes, if the compiler may know."""
    step = 16 // x.element_size()
    return step if group.align == 16 and not any(width % step for width in group.widths) else 1


def precision(x: Tensor) -> str:
    """Of products of x."""
    return "ieee" if x.dtype == torch.float32 else "tf32"  # of products of fp32 alone


def _stages(x: Tensor) -> int:
    """Loads in flight: what shared memory has room for."""
    return 4 if x.element_size() == 2 else 2


@triton.jit
def _row_places(
    wide, first, adapters, n, part, rank, ELEMENT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """-> for rows j of parts part ... part + PARTS: the part's matrix, the row in it, and whether there is one."""
    j = tl.arange(0, BLOCK_R)
    within = j < PARTS * rank
    if PARTS == 1:  # one address for all rows, so that the compiler sees them lie side by side
        row = j
        address = tl.load(wide + first + part * adapters + n)
    else:
        own = tl.where(within, j // rank, 0)
        row = j - own * rank
        address = tl.load(wide + first + (part + own) * adapters + n, mask=within, other=0)
    matrix = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), ALIGN)  # here: on a call's result it would be lost
    return matrix, row, within & (address != 0)


@triton.jit(do_not_specialize=["first", "at_columns", "adapters"])
def _shrink(
    x, low, x_scales, wide, tiles, ranks, scales, first, at_columns, adapters, stride_x, stride_low, in_features,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
    EVEN: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """low[t, j] = s sum_k x[t, column + k] M[j, k]; M is A [R, I], or B [O, R] transposed. SCALED: x is in FP8."""
    tile, part = tl.program_id(0), tl.program_id(1) * PARTS
    n, start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rank = tl.multiple_of(tl.load(ranks + n), STEP)
    narrow = low.dtype.element_ty
    matrix, row, there = _row_places(wide, first, adapters, n, part, rank, narrow, PARTS, ALIGN, BLOCK_R)
    column, size = _columns(wide, at_columns, part, in_features, TRANSPOSED, COLUMN_STEP)
    if TRANSPOSED:
        stride_k = rank
        m_rows = matrix + row
    else:
        stride_k = 1
        m_rows = matrix + row * in_features
    t = start + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    x_at = x + t.to(tl.int64)[:, None] * stride_x + column + k[None, :]
    m_at = m_rows[None, :] + k[:, None] * stride_k
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for at in range(0, size, BLOCK_K):
        if EVEN:
            rows = tl.load(x_at, mask=(t < stop)[:, None], other=0.0)
            block = tl.load(m_at, mask=there[None, :], other=0.0)
        else:
            left = k < size - at
            rows = tl.load(x_at, mask=(t < stop)[:, None] & left[None, :], other=0.0)
            block = tl.load(m_at, mask=there[None, :] & left[:, None], other=0.0)
        total = tl.dot(rows.to(narrow), block, total, input_precision=PRECISION)
        x_at += BLOCK_K
        m_at += BLOCK_K * stride_k
    total *= tl.load(scales + n)
    if SCALED:
        total *= tl.load(x_scales + t, mask=t < stop, other=0.0)[:, None]
    j = tl.arange(0, BLOCK_R)
    low_at = low + t.to(tl.int64)[:, None] * stride_low + (part * rank + j)[None, :]
    tl.store(low_at, total.to(low.dtype.element_ty), mask=(t < stop)[:, None] & (j < PARTS * rank)[None, :])


@triton.jit(do_not_specialize=["first", "at_columns", "adapters"])
def _expand(
    low, out, bias, wide, tiles, ranks, first, at_columns, adapters, stride_low, stride_out,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, ALIGN: tl.constexpr,
    STEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """out[t, column + o] = sum over parts p, rows j of low[t, p R + j] M_p[j, o]; M is A [R, I], or B [O, R] transposed."""
    tile, part = tl.program_id(2) // SPLIT, tl.program_id(1)
    n, start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rank = tl.multiple_of(tl.load(ranks + n), STEP)
    column, size = 0, stride_out
    if TRANSPOSED:
        column = tl.multiple_of(tl.load(wide + at_columns + part).to(tl.int32), STEP)
        size = tl.load(wide + at_columns + part + 1).to(tl.int32) - column
    t = start + tl.program_id(2) % SPLIT * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_R)
    stride_j, stride_o = (1, rank) if TRANSPOSED else (stride_out, 1)
    first_column = tl.program_id(0) * BLOCK_O * SPAN
    for at in range(first_column, tl.minimum(first_column + BLOCK_O * SPAN, size), BLOCK_O):
        o = at + tl.arange(0, BLOCK_O)
        total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for p in tl.static_range(PARTS):
            address = tl.load(wide + first + (part + p) * adapters + n)
            matrix = tl.multiple_of(address.to(tl.pointer_type(low.dtype.element_ty)), ALIGN)
            there = (j < rank) & (address != 0)
            low_at = low + t.to(tl.int64)[:, None] * stride_low + ((part + p) * rank + j)[None, :]
            rows = tl.load(low_at, mask=(t < stop)[:, None] & there[None, :], other=0.0)
            m_at = matrix + j[:, None] * stride_j + o[None, :] * stride_o
            mask = there[:, None] if EVEN else there[:, None] & (o < size)[None, :]
            total = tl.dot(rows, tl.load(m_at, mask=mask, other=0.0), total, input_precision=PRECISION)
        if BIAS:
            total += tl.load(bias + column + o, mask=o < size, other=0.0).to(tl.float32)[None, :]
        out_at = out + t.to(tl.int64)[:, None] * stride_out + column + o[None, :]
        mask = (t < stop)[:, None] if EVEN else (t < stop)[:, None] & (o < size)[None, :]
        if ADD:
            total += tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_to_slab(
    total, wide, ranks, accumulate, first, adapters, n, part, c, size, in_features,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rank = tl.load(ranks + n)
    matrix, row, there = _row_places(wide, first, adapters, n, part, rank, tl.float32, PARTS, ALIGN, BLOCK_R)
    stride_row, stride_c = (1, rank) if TRANSPOSED else (in_features, 1)
    at = (matrix + row * stride_row)[None, :] + c[:, None] * stride_c
    mask = there[None, :] & (c < size)[:, None]
    keeps = mask & (tl.load(accumulate + n) != 0)
    tl.store(at, total + tl.load(at, mask=keeps, other=0.0), mask=mask)


@triton.jit
def _columns(wide, at_columns, part, in_features, TRANSPOSED: tl.constexpr, STEP: tl.constexpr):
    """-> first column and width of a part in y."""
    column, size = 0, in_features
    if TRANSPOSED:
        column = tl.multiple_of(tl.load(wide + at_columns + part).to(tl.int32), STEP)
        size = tl.load(wide + at_columns + part + 1).to(tl.int32) - column
    return column, size


@triton.jit(do_not_specialize=["first", "at_columns", "adapters", "part_rows"])
def _outer(
    low, y, y_scales, sums, chunks, wide, ranks, accumulate, first, at_columns, adapters, stride_low, stride_y, widest,
    part_rows, in_features,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
    EVEN: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """G[j, c] = sum over a chunk's tokens of low[t, j] y[t, column + c], to slab or slot [parts, rows, c]."""
    chunk, part = tl.program_id(2), tl.program_id(1) * PARTS
    n, start = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
    stop, slot = tl.load(chunks + 4 * chunk + 2), tl.load(chunks + 4 * chunk + 3)
    rank = tl.multiple_of(tl.load(ranks + n), STEP)
    column, size = _columns(wide, at_columns, part, in_features, TRANSPOSED, COLUMN_STEP)
    if tl.program_id(0) * BLOCK_C < size:
        t = start + tl.arange(0, BLOCK_T)
        j = tl.arange(0, BLOCK_R)
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        within = j < PARTS * rank
        low_at = low + t.to(tl.int64)[:, None] * stride_low + (part * rank + j)[None, :]
        y_at = y + t.to(tl.int64)[:, None] * stride_y + column + c[None, :]
        total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for at in range(start, stop, BLOCK_T):
            left = tl.arange(0, BLOCK_T) < stop - at
            rows = tl.load(low_at, mask=left[:, None] & within[None, :], other=0.0)
            mask = left[:, None] if EVEN else left[:, None] & (c < size)[None, :]
            block = tl.load(y_at, mask=mask, other=0.0).to(rows.dtype)
            if SCALED:
                heights = tl.load(y_scales + at + tl.arange(0, BLOCK_T), mask=left, other=0.0)
                rows = (rows.to(tl.float32) * heights[:, None]).to(rows.dtype)
            total = tl.dot(tl.trans(block), rows, total, input_precision=PRECISION)
            low_at += BLOCK_T * stride_low
            y_at += BLOCK_T * stride_y
        if slot < 0:
            _add_to_slab(
                total, wide, ranks, accumulate, first, adapters, n, part, c, size, in_features,
                PARTS, TRANSPOSED, ALIGN, BLOCK_R,
            )  # fmt: skip
        else:
            place = (slot * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * part_rows
            slot_at = sums + (place + j)[None, :] * widest + c[:, None]
            tl.store(slot_at, total, mask=within[None, :] & (c < size)[:, None])


@triton.jit(do_not_specialize=["first", "at_columns", "adapters", "part_rows"])
def _add_slots(
    sums, spans, wide, ranks, accumulate, first, at_columns, adapters, widest, part_rows, in_features,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The chunks' sums of one adapter, in their order, to its slab."""
    span, part = tl.program_id(2), tl.program_id(1) * PARTS
    n, slot, end = tl.load(spans + 3 * span), tl.load(spans + 3 * span + 1), tl.load(spans + 3 * span + 2)
    _, size = _columns(wide, at_columns, part, in_features, TRANSPOSED, 1)
    if tl.program_id(0) * BLOCK_C < size:
        j = tl.arange(0, BLOCK_R)
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (j < PARTS * tl.load(ranks + n))[None, :] & (c < size)[:, None]
        total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for at in range(slot, end):
            block = (at * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * part_rows
            total += tl.load(sums + (block + j)[None, :] * widest + c[:, None], mask=mask, other=0.0)
        _add_to_slab(
            total, wide, ranks, accumulate, first, adapters, n, part, c, size, in_features, PARTS, TRANSPOSED, ALIGN, BLOCK_R
        )
