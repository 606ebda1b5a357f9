"""Plain torch: copy each matrix of a slab to its place, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.pack.places import BLOCK, Places

CHUNK = 1 << 16  # words that are widened at a time


@torch.no_grad()
def scatter_slab(slab: Tensor, places: Places, slot: int, scale: float, sums: Tensor | None = None) -> Tensor:
    """As `weft.kernels.pack.scatter_slab` says."""
    for target in places.targets:
        to = target.stack[slot]
        to.zero_()
        if target.filled_rows:
            size, strides = (target.filled_rows, target.filled_cols), (target.stride, 1)
            matrix = slab.as_strided(size, strides, slab.storage_offset() + target.offset).float()
            to[: target.filled_rows, : target.filled_cols].copy_(matrix * scale if target.scaled else matrix)
    if sums is not None:
        sums[0] += sum_slot(places, slot)
    return (~torch.isfinite(slab).all()).to(torch.int32).reshape(1)


@torch.no_grad()
def sum_slot(places: Places, slot: int) -> Tensor:
    """As `weft.kernels.pack.sum_slot` says: element e, counted over the blocks of all targets, counts 2 e + 1 times."""
    total, first = torch.zeros((), dtype=torch.int64, device=places.first.device), 0
    for target in places.targets:
        held = target.stack[slot].flatten()
        bits = held.view(torch.int32 if held.element_size() == 4 else torch.int16).to(torch.int64)
        total += (bits * (2 * torch.arange(first, first + len(bits), device=bits.device) + 1)).sum()
        first += -(-len(bits) // BLOCK) * BLOCK
    return total


@torch.no_grad()
def sum_words(words: Tensor) -> Tensor:
    """As `weft.kernels.pack.sum_words` says."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for first in range(0, len(words), CHUNK):
        part = words[first : first + CHUNK].to(torch.int64)
        total += (part * (2 * torch.arange(first, first + len(part), device=words.device) + 1)).sum()
    return total
