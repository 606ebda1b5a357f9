"""One adapter's slab into one slot of the stacked LoRA buffers of a sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.pack import reference
from weft.kernels.pack.places import Places, Target, pair_targets

__all__ = ["Places", "Target", "pair_targets", "scatter_slab", "sum_slot", "sum_words"]


def scatter_slab(slab: Tensor, places: Places, slot: int, scale: float, sums: Tensor | None = None) -> Tensor:
    """Fill one slot of every stack from a slab (flat, any float type): what the slab has no weights for is zero, and `scale` =
    alpha / rank is folded into each B, in fp32, before it is rounded to the stack's type; the slab itself is unchanged, so that
    to fold it a second time is impossible. Returns int32 [1], on the slab's device: not 0 if some weight is not finite, and
    then the slot must not be used. sums: of `places.sums()`, to which is added what `sum_slot` finds in a slot that holds what
    was written. On CUDA this is one launch, and nothing waits for it."""
    assert slab.dim() == 1 and slab.is_contiguous(), f"a slab is flat, not {tuple(slab.shape)}"
    assert slab.numel() >= places.end, f"the places take {places.end} elements, the slab has {slab.numel()}"
    if slab.device.type == "cuda":
        from weft.kernels.pack import triton  # needs a GPU's driver, or its interpreter

        return triton.scatter_slab(slab, places, slot, scale, sums)
    return reference.scatter_slab(slab, places, slot, scale, sums)


def sum_slot(places: Places, slot: int) -> Tensor:
    """What stands in a slot: the sum of its elements' bits, each times a number of its place, so that two which changed places
    are seen. int64 [], on the stacks' device. On CUDA nothing waits for it."""
    if places.first.device.type == "cuda":
        from weft.kernels.pack import triton  # needs a GPU's driver, or its interpreter

        return triton.sum_slot(places, slot)
    return reference.sum_slot(places, slot)


def sum_words(words: Tensor) -> Tensor:
    """int16 [n] -> the sum of the words, word i counting 2 i + 1 times, modulo 2^64: int64 [], on the same device. One read,
    and no memory beside it. On CUDA nothing waits for it."""
    assert words.dim() == 1 and words.is_contiguous() and words.dtype == torch.int16
    if words.device.type == "cuda":
        from weft.kernels.pack import triton  # needs a GPU's driver, or its interpreter

        return triton.sum_words(words)
    return reference.sum_words(words)
