"""The adapters of one packed batch by their slabs: what the CUDA kernels take in place of `LoraBatch`'s pairs of tensors.

N adapters, T tokens, D elements of one, P linears that share an input. Thousands of leaves and their hooks would cost the host
more than the card needs for a small batch: here an adapter is three addresses, and the kernels add to its gradient slab
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.actors.lora import SlabLayout
from weft.kernels.lora.tables import SlabGroup, Tables, build_tables


@dataclass(frozen=True)
class LinearGroup:
    """Linears of the decoder that share their input; `widths` are their outputs."""

    names: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class SlabBatch:
    """Adapter n owns tokens offsets[n]:offsets[n + 1]; tokens outside every range run the base alone. weights: [D] of the
    model's type. gradients: fp32 [D], or None for all where none is wanted. fresh: the gradient holds nothing yet, and is
    overwritten by the backward: every adapter that is fresh must have tokens here."""

    offsets: tuple[int, ...]
    scales: tuple[float, ...]
    layouts: tuple[SlabLayout, ...]
    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    fresh: tuple[bool, ...]

    @classmethod
    def build(
        cls,
        offsets: Sequence[int],
        scales: Sequence[float],
        adapters: Sequence[tuple[SlabLayout, Tensor, Tensor | None]],
        fresh: bool = False,
    ) -> SlabBatch:
        """adapters: of each its layout, weights and gradient."""
        layouts, weights, gradients = zip(*adapters, strict=True)
        return cls(tuple(offsets), tuple(scales), layouts, weights, gradients, (fresh,) * len(layouts))

    def tables(self, groups: Sequence[LinearGroup], tokens: int, device: torch.device) -> Tables:
        """The addresses of every group's matrices, on the device. The host waits for nothing."""
        names = [name for group in groups for name in group.names]
        item = self.weights[0].element_size()
        arrays = np.zeros((4, len(names), len(self.layouts)), np.int64)  # A, B and their gradients
        offsets_of: dict[int, NDArray[np.int64]] = {}
        for n, (layout, weights, gradient) in enumerate(zip(self.layouts, self.weights, self.gradients, strict=True)):
            if id(layout) not in offsets_of:
                offsets_of[id(layout)] = _offsets(layout, names)
            offsets = offsets_of[id(layout)]
            there = offsets[1] >= 0
            arrays[:2, :, n] = np.where(there, weights.data_ptr() + item * offsets, 0)
            if gradient is not None:
                assert gradient.dtype == torch.float32, f"gradient slab of {gradient.dtype}"
                arrays[2:, :, n] = np.where(there, gradient.data_ptr() + 4 * offsets, 0)
        slabs, at = [], 0
        for group in groups:
            slabs.append(SlabGroup(group.in_features, group.widths, *arrays[:, at : at + len(group.names)]))
            at += len(group.names)
        ranks = [layout.rank for layout in self.layouts]
        return build_tables(device, tokens, self.offsets, ranks, self.scales, slabs, [not one for one in self.fresh], item)


def _offsets(layout: SlabLayout, names: Sequence[str]) -> NDArray[np.int64]:
    """-> [2, names]: where A and B of each begin, -1 where the adapter leaves it alone."""
    places = {entry.name: (entry.a_offset, entry.b_offset) for entry in layout.entries}
    return np.array([places.get(name, (-1, -1)) for name in names], np.int64).T
