"""Plain torch: copy each matrix of a slab to its place, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.pack.places import Places


@torch.no_grad()
def scatter_slab(slab: Tensor, places: Places, slot: int, scale: float) -> Tensor:
    """As `weft.kernels.pack.scatter_slab` says."""
    for target in places.targets:
        to = target.stack[slot]
        to.zero_()
        if target.filled_rows:
            size, strides = (target.filled_rows, target.filled_cols), (target.stride, 1)
            matrix = slab.as_strided(size, strides, slab.storage_offset() + target.offset).float()
            to[: target.filled_rows, : target.filled_cols].copy_(matrix * scale if target.scaled else matrix)
    return (~torch.isfinite(slab).all()).to(torch.int32).reshape(1)
