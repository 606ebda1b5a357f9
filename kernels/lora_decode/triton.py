"""Many adapters beside one base product on CUDA: two launches, whatever the parts, the adapters and their ranks.

T tokens, P parts of a fused linear, R widest rank, I in, O out; C chunks of I.

    shrink    sums[c, t, p R + j] = sum over chunk c of x[t] A_p[j]     each chunk has its own sums: nothing is zeroed before,
    expand    y[t, O_p] += (s sum over c of sums[c, t, p]) B_p^T        no atomics, and every sum has one order

A launch has as many programs as can be of use at any mix of that many tokens, at most a few for each multiprocessor; they share
out the tiles that are in the table (work.py), of which the device reads the number. So a graph that was captured once serves
every mix, slots without tokens cost nothing, and a slot's rank is its own adapter's. On Hopper the launches are chained
(programmatic dependent launch): shrink has its A's in registers before the base product has ended, and expand has its B's on
their way to the L2 cache while shrink runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.lora_decode.work import HEIGHTS, Work, most_tiles, tiles_at


class Settings(NamedTuple):
    """Of the launches for up to so many tokens. height: an index of HEIGHTS. depth, chunk: columns of x that a program of
    shrink holds at once, and has in all. together: all parts in one program. programs: of a launch, at most."""

    height: int
    depth: int
    chunk: int
    together: bool
    shrink_programs: int
    shrink_warps: int
    shrink_stages: int
    columns: int
    expand_programs: int
    expand_warps: int
    expand_stages: int


# Found by bench_lora_decode.py --tune at 64, 256 and 8,192 tokens with 8 and 64 adapters (r = 32, Qwen3-4B's linears, one
# H200): benchmarks/results/lora_decode-h200.json.
FEW = Settings(0, 256, 256, False, 1056, 4, 1, 256, 396, 4, 2)
SOME = Settings(0, 128, 512, False, 1056, 4, 3, 256, 396, 4, 2)
MANY = Settings(2, 64, 1280, True, 528, 4, 4, 128, 264, 4, 3)
LIMITS = ((64, FEW), (512, SOME))
WIDE = 4096  # inputs of a linear whose chunks are longer, lest expand have too many sums to add up
NARROW_RANK = 32  # of which the settings are; what is wider has as much less of the other side
MOST_CHUNKS = 40
MOST_ROWS = 256  # of A in a program of shrink: three parts of rank 128 spill registers, and take 108 KB where an A10 has 99
AHEAD = tl.constexpr(32768)  # bytes that a program of expand has brought to the cache before its turn: all of them must fit


def settings(tokens: int, rank: int, inputs: int) -> Settings:
    """By the tokens of a launch, which a graph has fixed; rank: the widest; inputs: columns of x."""
    chosen = next((own for limit, own in LIMITS if tokens <= limit), MANY)
    if inputs >= WIDE and chosen is not MANY:
        chosen = chosen._replace(depth=128, chunk=512, shrink_stages=4)
    times = max(1, triton.next_power_of_2(rank) // NARROW_RANK)
    return chosen._replace(depth=max(32, chosen.depth // times), columns=max(32, chosen.columns // times))


def add_lora(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], table: Tensor, max_tokens: int, scale: float, add: bool
) -> None:
    """As `weft.kernels.lora_decode.add_lora` says."""
    own = settings(x.shape[0], a[0].shape[2], x.shape[1])
    sums = shrink(x, a, table, max_tokens, own, chains(y.device))
    expand(sums, y, b, table, max_tokens, scale, add, own, chains(y.device))


def warm_up(a: Sequence[Tensor], b: Sequence[Tensor], max_tokens: int) -> None:
    """As `weft.kernels.lora_decode.warm_up` says."""
    work = Work(max_tokens, a[0].shape[0], a[0].device)
    for tokens in (1, *(limit + 1 for limit, _ in LIMITS)):
        if tokens <= max_tokens:
            x = a[0].new_empty(tokens, a[0].shape[3])
            add_lora(x.new_empty(tokens, sum(part.shape[2] for part in b)), x, a, b, work.table, max_tokens, 1.0, True)


def shrink(x: Tensor, a: Sequence[Tensor], table: Tensor, max_tokens: int, own: Settings, chained: bool) -> Tensor:
    """-> sums [C, T, P R], in the order of the table's tokens; what no adapter of the batch has is left unwritten."""
    tokens, width = x.shape
    slots, _, rank, _ = a[0].shape
    parts, height = len(a), HEIGHTS[own.height]
    chunk = max(own.chunk, triton.cdiv(triton.cdiv(width, MOST_CHUNKS), own.depth) * own.depth)
    chunks = triton.cdiv(width, chunk)
    together = parts if own.together and parts * rank <= MOST_ROWS else 1
    sums = torch.empty(chunks, tokens, parts * rank, dtype=torch.float32, device=x.device)
    programs = most_tiles(height, tokens, slots) * (parts // together) * chunks
    _shrink[(min(own.shrink_programs, programs),)](
        x, a[0], sums, table, *_places(own, max_tokens, slots), tokens, width, *_gaps(a), x.stride(0),
        PARTS=parts, TOGETHER=together, CHUNKS=chunks, CHUNK=min(chunk, width), RANK=rank, ONCE=chunk == own.depth,
        EVEN=width % own.depth == 0, CHAINED=chained, PRECISION=_precision(x), BLOCK_T=height,
        BLOCK_R=triton.next_power_of_2(max(16, together * rank)), BLOCK_K=own.depth,
        num_warps=own.shrink_warps, num_stages=own.shrink_stages, **_options(chained),
    )  # fmt: skip
    return sums


def expand(
    sums: Tensor,
    y: Tensor,
    b: Sequence[Tensor],
    table: Tensor,
    max_tokens: int,
    scale: float,
    add: bool,
    own: Settings,
    chained: bool,
) -> None:
    """sums: of `shrink`, with the same settings."""
    chunks, tokens, _ = sums.shape
    slots, _, _, rank = b[0].shape
    widths = [part.shape[2] for part in b]
    height = HEIGHTS[own.height]
    programs = most_tiles(height, tokens, slots) * sum(triton.cdiv(one, own.columns) for one in widths)
    _expand[(min(own.expand_programs, programs),)](
        sums, b[0], y, table, *_places(own, max_tokens, slots), tokens, *_gaps(b), *(widths + [0, 0])[:3], y.stride(0), scale,
        PARTS=len(b), CHUNKS=chunks, RANK=rank, ADD=add, EVEN=not any(one % own.columns for one in widths), CHAINED=chained,
        PRECISION=_precision(b[0]), STAGES=own.expand_stages, BLOCK_T=height,
        BLOCK_R=triton.next_power_of_2(max(16, rank)), BLOCK_O=own.columns,
        num_warps=own.expand_warps, num_stages=own.expand_stages, **_options(chained),
    )  # fmt: skip


def _places(own: Settings, max_tokens: int, slots: int) -> tuple[int, int, int]:
    return own.height, tiles_at(own.height, max_tokens, slots), tiles_at(len(HEIGHTS), max_tokens, slots)


def _options(chained: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if chained else {}


@cache
def chains(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # of products of fp32 alone


def _gaps(stacks: Sequence[Tensor]) -> tuple[int, int]:
    """Elements from the first stack to the second and the third: so there is one pointer, whatever the parts."""
    first, size = stacks[0].data_ptr(), stacks[0].element_size()
    gaps = [(stack.data_ptr() - first) // size for stack in stacks[1:]]
    return tuple((gaps + [0, 0])[:2])  # type: ignore[return-value]


@triton.jit
def _tile(table, tiles_at, tile):
    """-> slot, start, stop, rank"""
    record = table + tiles_at + tile * 4
    rank = tl.multiple_of(tl.load(record + 3), 8)
    return tl.load(record).to(tl.int64), tl.load(record + 1), tl.load(record + 2), rank


@triton.jit
def _to_cache(start, nbytes):
    """Begin to read nbytes into the L2 cache: whole sixteens, from an address that is one."""
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
        " @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [start.to(tl.int64), nbytes.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["variant", "tiles_at", "tokens_at", "tokens"])
def _shrink(
    x, a, sums, table, variant, tiles_at, tokens_at, tokens, in_features, a_1: tl.int64, a_2: tl.int64, stride_x,
    PARTS: tl.constexpr, TOGETHER: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    ONCE: tl.constexpr, EVEN: tl.constexpr, CHAINED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums[c, i, p R + j] = sum over chunk c of x[tokens[i], k] A_p[slot, j, k], i in the order of the table."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    groups: tl.constexpr = PARTS // TOGETHER
    items = tl.load(table + variant) * groups * CHUNKS
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        part = item % groups * TOGETHER
        chunk = item // groups % CHUNKS
        slot, start, stop, rank = _tile(table, tiles_at, item // (groups * CHUNKS))
        i = start + tl.arange(0, BLOCK_T)
        t = tl.load(table + tokens_at + i, mask=i < stop, other=0)
        x_at = x + t.to(tl.int64)[:, None] * stride_x + (chunk * CHUNK + k)[None, :]
        if TOGETHER == 1:
            gap = tl.where(part == 0, 0, tl.where(part == 1, a_1, a_2))
            there = r < rank
            a_at = a + tl.multiple_of(gap, 8) + (slot * RANK + r)[None, :] * in_features + (chunk * CHUNK + k)[:, None]
        else:
            own = r // RANK
            gap = tl.where(own == 0, 0, tl.where(own == 1, a_1, a_2))
            there = (r - own * RANK < rank) & (own < TOGETHER)
            a_rows = tl.multiple_of(gap, 8) + (slot * RANK + r - own * RANK) * in_features
            a_at = a + a_rows[None, :] + (chunk * CHUNK + k)[:, None]
        if ONCE:
            left = chunk * CHUNK + k < in_features
            block = tl.load(a_at, mask=there[None, :] if EVEN else there[None, :] & left[:, None], other=0.0)
            if CHAINED:
                tl.extra.cuda.gdc_wait()
            held = (i < stop)[:, None]
            rows = tl.load(x_at, mask=held if EVEN else held & left[None, :], other=0.0)
            total = tl.dot(rows, block, input_precision=PRECISION)
        else:
            if CHAINED:
                tl.extra.cuda.gdc_wait()
            total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for at in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, in_features), BLOCK_K):
                left = k < in_features - at
                held = (i < stop)[:, None]
                rows = tl.load(x_at, mask=held if EVEN else held & left[None, :], other=0.0)
                block = tl.load(a_at, mask=there[None, :] if EVEN else there[None, :] & left[:, None], other=0.0)
                total = tl.dot(rows, block, total, input_precision=PRECISION)
                x_at += BLOCK_K
                a_at += BLOCK_K
        sums_at = sums + (chunk * tokens + i).to(tl.int64)[:, None] * (PARTS * RANK) + (part * RANK + r)[None, :]
        tl.store(sums_at, total, mask=(i < stop)[:, None] & there[None, :])
    if CHAINED:  # noqa: SIM102 known when it is compiled, the other is not
        if tl.program_id(0) == 0:
            tl.extra.cuda.gdc_wait()  # though it has no work: what comes next must not overtake what came before


@triton.jit(do_not_specialize=["variant", "tiles_at", "tokens_at", "tokens"])
def _expand(
    sums, b, y, table, variant, tiles_at, tokens_at, tokens, b_1: tl.int64, b_2: tl.int64, width_0, width_1, width_2,
    stride_y, scale,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
    CHAINED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y[tokens[i], O_p + o] += scale * (sum over c of sums[c, i, p R + j]) B_p[slot, o, j]. A program's items lie side by side,
    so that it adds up a tile's sums once for many columns."""
    ends_0 = tl.cdiv(width_0, BLOCK_O)
    ends_1 = ends_0 + tl.cdiv(width_1, BLOCK_O)
    blocks = ends_1 + tl.cdiv(width_2, BLOCK_O)
    items = tl.load(table + variant) * blocks
    each = tl.cdiv(items, tl.num_programs(0))
    item = tl.program_id(0) * each
    end = tl.minimum(item + each, items)
    j = tl.arange(0, BLOCK_R)
    if CHAINED:
        if item < end:
            tile = item // blocks
            part, within, last, gap, column, width = _place(
                item - tile * blocks, ends_0, ends_1, blocks, b_1, b_2, width_0, width_1, width_2, PARTS
            )
            slot, start, stop, rank = _tile(table, tiles_at, tile)
            first = within * BLOCK_O
            past = tl.minimum(tl.minimum(within + end - item, last) * BLOCK_O, width)
            if rank == RANK:
                size: tl.constexpr = RANK * b.dtype.element_ty.primitive_bitwidth // 8
                _to_cache(b + gap + (slot * width + first) * RANK, tl.minimum((past - first) * size, AHEAD))
        if item < end or tl.program_id(0) == 0:  # the others give their place to those with work at once
            tl.extra.cuda.gdc_wait()
    while item < end:
        tile = item // blocks
        part, within, last, gap, column, width = _place(
            item - tile * blocks, ends_0, ends_1, blocks, b_1, b_2, width_0, width_1, width_2, PARTS
        )
        slot, start, stop, rank = _tile(table, tiles_at, tile)
        i = start + tl.arange(0, BLOCK_T)
        t = tl.load(table + tokens_at + i, mask=i < stop, other=0)
        there = j < rank
        sums_at = sums + i[:, None] * (PARTS * RANK) + part * RANK
        low = _summed(sums_at, i < stop, rank, tokens, CHUNKS, PARTS * RANK, BLOCK_T, BLOCK_R)
        rows = (low * scale).to(b.dtype.element_ty)
        stay = tl.minimum(within + end - item, last)
        b_at = b + tl.multiple_of(gap, 8) + (slot * width) * RANK
        for o_at in tl.range(within * BLOCK_O, stay * BLOCK_O, BLOCK_O, num_stages=STAGES):
            o = o_at + tl.arange(0, BLOCK_O)
            mask = there[:, None] if EVEN else there[:, None] & (o < width)[None, :]
            block = tl.load(b_at + o.to(tl.int64)[None, :] * RANK + j[:, None], mask=mask, other=0.0)
            total = tl.dot(rows, block, input_precision=PRECISION)
            y_at = y + t.to(tl.int64)[:, None] * stride_y + (column + o)[None, :]
            held = (i < stop)[:, None] if EVEN else (i < stop)[:, None] & (o < width)[None, :]
            if ADD:
                total += tl.load(y_at, mask=held, other=0.0).to(tl.float32)
            tl.store(y_at, total.to(y.dtype.element_ty), mask=held)
        item += stay - within


@triton.jit
def _summed(
    sums_at, held, rank, tokens, CHUNKS: tl.constexpr, ROW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """The sum over the chunks of a tile's sums. ROW: elements of one token."""
    j = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        at = sums_at + (chunk * tokens).to(tl.int64) * ROW + j[None, :]
        total += tl.load(at, mask=held[:, None] & (j < rank)[None, :], other=0.0)
    return total


@triton.jit
def _place(at, ends_0, ends_1, blocks, b_1, b_2, width_0, width_1, width_2, PARTS: tl.constexpr):
    """Of block `at` of a tile -> part; block and past the last block within the part; the part's gap, first column, width."""
    part, within, last, gap, column, width = 0, at, blocks, b_1 * 0, 0, width_0
    if PARTS > 1:
        second, third = at >= ends_0, at >= ends_1
        part = second.to(tl.int32)
        within = at - tl.where(second, ends_0, 0)
        last = tl.where(second, ends_1 - ends_0, ends_0)
        gap = tl.where(second, b_1, 0)
        column = tl.where(second, width_0, 0)
        width = tl.where(second, width_1, width_0)
        if PARTS > 2:
            part = tl.where(third, 2, part)
            within = tl.where(third, at - ends_1, within)
            last = tl.where(third, blocks - ends_1, last)
            gap = tl.where(third, b_2, gap)
            column = tl.where(third, width_0 + width_1, column)
            width = tl.where(third, width_2, width)
    return part, within, last, gap, column, width
