"""Plain torch: copy each A and B of a slab to its place. R rank, S rank of the destination (S >= R), I in, O out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def scatter_slab(
    slab: Tensor, shapes: Sequence[tuple[int, int]], rank: int, destinations: Sequence[tuple[Tensor, Tensor]], scale: float
) -> None:
    """Write a slab (for each linear A [R, I], then B [O, R], row-major, end to end) into one slot of stacked buffers.

    slab: [D]. shapes: (O, I) of each linear, in slab order. destinations: for each, A [S, I] and B [O, S], of any type and
    strides; what lies beyond the rank is set to zero. `scale` = alpha / rank is folded into B, in fp32, before B is rounded to
    the destination's type: the slab itself is unchanged, so that folding it a second time is impossible.
    """
    assert len(shapes) == len(destinations), f"{len(shapes)} linears, {len(destinations)} destinations"
    offset = 0
    for (out_features, in_features), (a_to, b_to) in zip(shapes, destinations, strict=True):
        a = slab[offset : offset + rank * in_features].view(rank, in_features)
        offset += a.numel()
        b = slab[offset : offset + out_features * rank].view(out_features, rank)
        offset += b.numel()
        a_to[:rank].copy_(a)
        a_to[rank:].zero_()
        b_to[:, :rank].copy_(b.float() * scale)
        b_to[:, rank:].zero_()
    assert offset == slab.numel(), f"the linears take {offset} elements, the slab has {slab.numel()}"
