"""Where the adapters of one packed batch lie, as tables that kernels read: made on the host and uploaded once.

T tokens, N adapters, P parts of a fused linear (q, k and v; gate and up), R_n rank of adapter n, I in, O_p out of part p.
Adapters stay in slabs of their own: a table holds the address of every A, B and gradient, so any number may be registered and
nothing is ever stacked. An address of 0: the adapter leaves that part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 128  # tokens of one program in shrink and expand
CHUNK = 2048  # tokens that one program of outer sums; an adapter with more has its sums added up by a second kernel
RANK_BLOCKS = (16, 32, 64, 128)  # ranks are padded to one of these, within registers alone
ALIGNED = 4  # int32 in 16 bytes


@dataclass(frozen=True)
class SlabGroup:
    """One fused linear of every adapter, as addresses. widths: O_p. a, b, grad_a, grad_b: int64 [P, N] each, on the host; the
    gradients' are 0 where none is wanted."""

    in_features: int
    widths: tuple[int, ...]
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    grad_a: NDArray[np.int64]
    grad_b: NDArray[np.int64]


@dataclass(frozen=True)
class RankClass:
    """The adapters whose rank fits `block`. Rows of int32 on the device."""

    block: int
    tiles: Tensor  # [n, 3] adapter, first token, end
    chunks: Tensor  # [m, 4] adapter, first token, end, slot of the partial sum or -1: the only chunk of its adapter
    sums: Tensor  # [q, 3] adapter, its first slot, end
    slots: int


@dataclass(frozen=True)
class Tables:
    """What all linears of a batch share. wide: int64 with every group's addresses and columns; narrow: int32."""

    adapters: int
    tokens: int
    classes: tuple[RankClass, ...]
    bare: tuple[tuple[int, int], ...]  # token ranges without an adapter
    wide: Tensor
    ranks: Tensor  # int32 [N]
    accumulate: Tensor  # int32 [N]: 0 where the gradient slab holds nothing yet and is overwritten
    scales: Tensor  # fp32 [N]
    max_rank: int
    anchor: Tensor  # a leaf that makes autograd run the backward, whose gradients go straight to the slabs
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Group:
    """One fused linear's place in Tables.wide."""

    in_features: int
    widths: tuple[int, ...]
    first: dict[str, int]  # of "a", "b", "grad_a", "grad_b": int64 [P, N] from there; of "columns": [P + 1]
    align: int  # bytes that divide every address and row
    touched: bool  # by any adapter
    trains: bool


def build_tables(
    device: torch.device,
    tokens: int,
    offsets: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    groups: Sequence[SlabGroup],
    accumulate: Sequence[bool],
    item_bytes: int = 2,
) -> Tables:
    """Adapter n owns tokens offsets[n]:offsets[n + 1] of `tokens`. item_bytes: of a weight. Nothing waits for the device."""
    count = len(ranks)
    assert len(offsets) == count + 1 == len(scales) + 1 == len(accumulate) + 1, "one range, rank, scale and flag per adapter"
    inside = offsets[0] >= 0 and offsets[-1] <= tokens and list(offsets) == sorted(offsets)
    assert inside, f"offsets {list(offsets)} of {tokens} tokens"
    assert max(ranks) <= RANK_BLOCKS[-1], f"rank {max(ranks)}: kernels hold at most {RANK_BLOCKS[-1]}"
    arrays = [array.ravel() for group in groups for array in (group.a, group.b, group.grad_a, group.grad_b)]
    columns = [np.array([0, *group.widths]).cumsum() for group in groups]
    wide = np.concatenate([*arrays, *columns])
    placed = _place(groups, wide, count, ranks, item_bytes)
    host: list[NDArray[np.int32]] = []
    marks = [_class_arrays(block, offsets, ranks, host) for block in sorted({rank_block(rank) for rank in ranks})]
    rank_at, flag_at = _append(host, np.asarray(ranks)), _append(host, np.asarray(accumulate))
    narrow = _upload(np.concatenate(host), device)
    whole = _upload(wide, device)

    def rows(mark: tuple[int, int], width: int) -> Tensor:
        return narrow[mark[0] : mark[1]].view(-1, width)

    classes = tuple(
        RankClass(block, rows(tiles, 3), rows(chunks, 4), rows(sums, 3), slots) for block, tiles, chunks, sums, slots in marks
    )
    ends = [0, *(bound for n in range(count) if offsets[n + 1] > offsets[n] for bound in offsets[n : n + 2]), tokens]
    bare = tuple((a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if b > a)
    trains = any(group.trains for group in placed)
    return Tables(
        adapters=count,
        tokens=tokens,
        classes=classes,
        bare=bare,
        wide=whole,
        ranks=narrow[rank_at[0] : rank_at[1]],
        accumulate=narrow[flag_at[0] : flag_at[1]],
        scales=_upload(np.asarray(scales, np.float32), device),
        max_rank=max(ranks),
        anchor=torch.zeros((), device=device, requires_grad=trains),
        groups=tuple(placed),
    )


def _place(
    groups: Sequence[SlabGroup], wide: NDArray[np.int64], count: int, ranks: Sequence[int], item_bytes: int
) -> list[Group]:
    sizes = [len(group.widths) * count for group in groups]
    at, column_at = 0, 4 * sum(sizes)
    placed_evenly = not (wide[:column_at] % 16).any() and all(even(rank, item_bytes) for rank in ranks)
    placed = []
    for group, size in zip(groups, sizes, strict=True):
        first = {name: at + index * size for index, name in enumerate(("a", "b", "grad_a", "grad_b"))} | {"columns": column_at}
        aligned = placed_evenly and not any(width * item_bytes % 16 for width in (group.in_features, *group.widths))
        touched, trains = wide[at : at + size].any(), wide[at + 2 * size : at + 3 * size].any()
        align = 16 if aligned else item_bytes
        placed.append(Group(group.in_features, group.widths, first, align, bool(touched), bool(trains)))
        at += 4 * size
        column_at += len(group.widths) + 1
    return placed


def rank_block(rank: int) -> int:
    """What a rank is padded to."""
    return next(block for block in RANK_BLOCKS if rank <= block)


def even(rank: int, item_bytes: int) -> bool:
    """Whether rows of this many weights keep every matrix at a multiple of 16 bytes."""
    return rank * item_bytes % 16 == 0


def _class_arrays(block: int, offsets: Sequence[int], ranks: Sequence[int], host: list[NDArray[np.int32]]) -> tuple[Any, ...]:
    """-> block, then the places in `host` of its tiles, chunks and sums, then its slots."""
    tiles, chunks, sums, slots = [], [], [], 0
    for n, rank in enumerate(ranks):
        start, stop = offsets[n], offsets[n + 1]
        if rank_block(rank) != block or stop <= start:
            continue
        tiles += [(n, at, min(at + TILE, stop)) for at in range(start, stop, TILE)]
        own = [(n, at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
        if len(own) == 1:
            chunks.append((*own[0], -1))
            continue
        sums.append((n, slots, slots + len(own)))
        chunks += [(*chunk, slots + index) for index, chunk in enumerate(own)]
        slots += len(own)
    places = [_append(host, np.asarray(rows, np.int32).reshape(-1)) for rows in (tiles, chunks, sums)]
    return (block, *places, slots)


def _append(host: list[NDArray[np.int32]], rows: NDArray[Any]) -> tuple[int, int]:
    """Its place. Each begins at a multiple of 16 bytes, for a kernel is compiled anew for a pointer that does not."""
    start = sum(len(array) for array in host)
    host.append(np.pad(rows.astype(np.int32), (0, -rows.size % ALIGNED)))
    return start, start + rows.size


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
