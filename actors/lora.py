"""The shape of LoRA adapters (Hu et al. 2021): which linears they touch, and how one's weights lie in one flat slab.

N adapters in a batch, R rank, I in, O out, T tokens. W x + scale * B A x with A [R, I], B [O, R], scale = alpha / R.
vLLM's worker imports this too: torch and nothing heavier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.actors.architecture import Architecture

ALL_LINEAR = "all-linear"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # vLLM's names: their parts

LoraPair = tuple[Tensor, Tensor]  # A [R, I], B [O, R]


@dataclass(frozen=True)
class SlabEntry:
    """One linear's place in a slab, offsets in elements: A [R, I] from a_offset, B [O, R] from b_offset, row-major."""

    name: str
    out_features: int
    in_features: int
    a_offset: int
    b_offset: int


@dataclass(frozen=True)
class SlabLayout:
    """One adapter's weights as one flat buffer of `numel` elements: A then B of each target in model order, unscaled."""

    rank: int
    entries: tuple[SlabEntry, ...]
    numel: int

    @classmethod
    def build(cls, shapes: Mapping[str, tuple[int, int]], modules: Sequence[str], rank: int) -> SlabLayout:
        """shapes: name -> (out, in) in model order (`linear_shapes`). Raises ValueError for a module that is not in it."""
        unknown = [name for name in modules if name not in shapes]
        if unknown:
            raise ValueError(f"module {unknown[0]!r}: not among the {len(shapes)} linears of this model")
        chosen = set(modules)
        entries, offset = [], 0
        for name, (out_features, in_features) in shapes.items():
            if name in chosen:
                b_offset = offset + rank * in_features
                entries.append(SlabEntry(name, out_features, in_features, offset, b_offset))
                offset = b_offset + out_features * rank
        return cls(rank, tuple(entries), offset)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the linears, in slab order."""
        return tuple(entry.name for entry in self.entries)

    def views(self, flat: Tensor) -> dict[str, LoraPair]:
        """name -> (A, B), views of `flat` [numel]."""
        assert flat.shape == (self.numel,), f"slab of shape {tuple(flat.shape)}, not ({self.numel},)"
        rank, pairs = self.rank, {}
        for entry in self.entries:
            a = flat[entry.a_offset : entry.b_offset].view(rank, entry.in_features)
            b = flat[entry.b_offset : entry.b_offset + entry.out_features * rank].view(entry.out_features, rank)
            pairs[entry.name] = (a, b)
        return pairs

    def leaves(self, weights: Tensor, gradients: Tensor | None) -> dict[str, LoraPair]:
        """name -> (A, B) as leaves over `weights` [numel] whose .grad are views of `gradients` [numel]: backward adds into
        that one flat buffer, which may be of a wider type than the weights. Zero it to start over; never set .grad to None.
        gradients None: the leaves take no gradient."""
        pairs = {name: (a.detach(), b.detach()) for name, (a, b) in self.views(weights).items()}
        if gradients is not None:
            for name, places in self.views(gradients).items():
                for leaf, place in zip(pairs[name], places, strict=True):
                    leaf.requires_grad_()
                    leaf.grad_dtype = gradients.dtype
                    leaf.grad = place
        return pairs


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of one packed batch: adapter n owns tokens offsets[n]:offsets[n + 1]; tokens outside every range run the
    base alone. pairs: linear's name -> for each adapter (A, B), or None where it leaves that linear alone."""

    offsets: tuple[int, ...]
    scales: tuple[float, ...]
    pairs: Mapping[str, tuple[LoraPair | None, ...]] = field(default_factory=dict)

    @classmethod
    def build(cls, offsets: Sequence[int], scales: Sequence[float], adapters: Sequence[Mapping[str, LoraPair]]) -> LoraBatch:
        """adapters: for each, name -> (A, B), as `SlabLayout.leaves` makes them."""
        assert len(offsets) == len(adapters) + 1 == len(scales) + 1, "one range, one scale and one set of pairs per adapter"
        names = dict.fromkeys(name for adapter in adapters for name in adapter)
        pairs = {name: tuple(adapter.get(name) for adapter in adapters) for name in names}
        return cls(tuple(int(offset) for offset in offsets), tuple(float(scale) for scale in scales), pairs)

    def columns(self, name: str) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Every adapter's A, and every adapter's B, of one linear: what kernels.lora takes."""
        pairs = self.pairs.get(name) or (None,) * len(self.scales)
        return [pair and pair[0] for pair in pairs], [pair and pair[1] for pair in pairs]


def linear_shapes(hf_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """name -> (out, in) of every linear that LoRA may target, in model order: neither head nor embedding.

    Raises ValueError for a config.json that is of no supported family.
    """
    return {name: shape for name, shape, _ in Architecture.from_hf(hf_config).linears()}


def resolve_targets(
    shapes: Mapping[str, tuple[int, int]], target_modules: Sequence[str], exclude_modules: Sequence[str] = ()
) -> tuple[str, ...]:
    """The linears that the settings name, in model order.

    A name is "all-linear", a full dotted name, or any dotted ending of one ("q_proj", "self_attn.q_proj"), as in PEFT;
    the fused names qkv_proj and gate_up_proj stand for their parts. Raises ValueError, listing what the model has, for a name
    that fits nothing, and when nothing is left.
    """
    chosen = _matching(shapes, target_modules, "target_modules") - _matching(shapes, exclude_modules, "exclude_modules")
    if not chosen:
        raise ValueError(f"exclude_modules={list(exclude_modules)}: leaves nothing of target_modules={list(target_modules)}")
    return tuple(name for name in shapes if name in chosen)


def _matching(shapes: Mapping[str, tuple[int, int]], wanted: Sequence[str], setting: str) -> set[str]:
    chosen: set[str] = set()
    for want in wanted:
        stem, _, last = want.rpartition(".")
        parts = [f"{stem}.{part}".lstrip(".") for part in FUSED[last]] if last in FUSED else [want]
        found = {name for name in shapes if want == ALL_LINEAR or any(f".{name}".endswith(f".{part}") for part in parts)}
        if not found:
            has = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shapes))
            raise ValueError(
                f"{setting}={want!r}: must be {ALL_LINEAR} or a linear of the model, which has {has} "
                f"(in full: {', '.join(list(shapes)[:2])}, ... {list(shapes)[-1]})"
            )
        chosen |= found
    return chosen


def init_pairs(layout: SlabLayout, flat: Tensor, generator: torch.Generator | None = None) -> None:
    """Fills `flat` in place with version 0: B zero, so that the adapter begins as the base, and A uniform within +-sqrt(1 / I)
    (He et al. 2015 with a = sqrt(5), PEFT's default). Drawn in fp32 in slab order: one seed, one adapter."""
    flat.zero_()
    for a, _ in layout.views(flat).values():
        bound = a.shape[1] ** -0.5
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
