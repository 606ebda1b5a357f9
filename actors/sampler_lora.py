"""LoRA inside vLLM on a CPU: one product per adapter in the batch, where vLLM's own copies an adapter's weights once a token.

T tokens, N adapters in the batch, W tokens of the widest one, S slices of a fused linear (q, k, v), R rank, I in, O out

    x [T, I] ──places──> [N, W, I] ── A [N, I, S R] ──> [N, W, S R] ── B [N, S R, O] ──> [N, W, O] ──place──> added to y [T, O]

vLLM gathers [T, O, R] for every linear of every step: 75 % of a decode step at batch 64 (0.7 M parameters, hidden 128,
8 adapters, places padded to rank 32, one Xeon thread). vLLM makes the wrapper that its platform names; `use_grouped_lora`
has it name this one. Adapters live on in vLLM's stacked buffers; what is packed here is derived from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

_WASTE = 4  # padded places a token, beyond which the adapters are done one by one
QKV = 3  # slices of the linear before attention
_FREE = 128  # padded places that cost no more than the calls around them


@dataclass(frozen=True)
class Groups:
    """The tokens of one batch by adapter. slots [N]: the adapters' places in the stacked buffers, ascending; width: W.

    source [N W]: the token at each place (any token where the place is padding). place [T']: the place of each token that has
    an adapter. rows [T']: these tokens, or None when every token has one. counts [N]: tokens of each adapter.
    """

    slots: tuple[int, ...]
    width: int
    source: Tensor
    place: Tensor
    rows: Tensor | None
    counts: tuple[int, ...]

    @classmethod
    def of(cls, indices: Tensor, before: tuple[int, ...] = ()) -> Groups:
        """indices [T]: each token's slot, -1 for the base alone. before: the slots of the last batch, which are kept, though
        some have no token now, as long as that is cheap: their weights are packed already."""
        rows = None
        if bool((indices < 0).any()):
            rows = (indices >= 0).nonzero()[:, 0]
            indices = indices[rows]
        counts = torch.bincount(indices)
        slots = tuple(counts.nonzero()[:, 0].tolist())
        width = int(counts.max()) if slots else 0
        if slots and set(slots) < set(before) and len(before) * width <= max(_WASTE * len(indices), _FREE):
            slots = before
            counts = torch.nn.functional.pad(counts, (0, max(0, before[-1] + 1 - len(counts))))
        chosen = torch.tensor(slots, dtype=torch.long)
        counts = counts[chosen]
        group = torch.searchsorted(chosen, indices)
        order = torch.argsort(group, stable=True)
        within = torch.empty_like(group)
        within[order] = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group[order]]
        place = group * width + within
        source = torch.zeros(len(slots) * width, dtype=torch.long)
        source[place] = torch.arange(len(group)) if rows is None else rows
        return cls(slots, width, source, place, rows, tuple(counts.tolist()))


@dataclass(frozen=True)
class _Packed:
    """The weights of one linear for the adapters of one batch: a [N, I, S R], b [N, S R, O] block-diagonal over slices.

    key: the slots and the write counters of vLLM's buffers that it was made from.
    """

    key: tuple[Any, ...]
    a: Tensor
    b: Tensor


class GroupedLora(PunicaWrapperCPU):
    """PunicaWrapperCPU whose linears run per adapter. Embeddings and heads are vLLM's still (no adapter of ours has them)."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._groups = Groups.of(torch.empty(0, dtype=torch.long))
        self._packed: dict[int, _Packed] = {}

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called when the batch's tokens or adapters have changed."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._groups = Groups.of(self.token_lora_indices, self._groups.slots)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y [T, O] += scale * B A x, each token with its own adapter. Stacked: [slots, 1, R, I], [slots, 1, O_s, R]."""
        groups = self._groups
        if not groups.slots:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        self._add(y, x, self._pack(groups.slots, lora_a_stacked, lora_b_stacked), scale)
        if len(lora_b_stacked) == QKV:
            # What an adapter that has run away has here are no numbers. In the cache others' attention would meet them: what it
            # masks it multiplies by zero, and zero times NaN is NaN.
            y.nan_to_num_()

    def _add(self, y: Tensor, x: Tensor, packed: _Packed, scale: float) -> None:
        groups = self._groups
        n, width = len(groups.slots), groups.width
        if n == 1 and groups.rows is None:
            y.addmm_(x @ packed.a[0], packed.b[0], alpha=scale)
            return
        if n * width > max(_WASTE * len(groups.place), _FREE):
            self._one_by_one(y, x, packed, scale)
            return
        hidden = torch.bmm(x.index_select(0, groups.source).view(n, width, -1), packed.a)
        delta = torch.bmm(hidden, packed.b).view(n * width, -1).index_select(0, groups.place)
        if groups.rows is None:
            y.add_(delta, alpha=scale)
        else:
            y.index_add_(0, groups.rows, delta, alpha=scale)

    def _one_by_one(self, y: Tensor, x: Tensor, packed: _Packed, scale: float) -> None:
        """For a batch in which one adapter has most tokens: a prompt beside decoding."""
        groups = self._groups
        for n, count in enumerate(groups.counts):
            if not count:
                continue
            rows = groups.source[n * groups.width : n * groups.width + count]
            y.index_add_(0, rows, x.index_select(0, rows) @ packed.a[n] @ packed.b[n], alpha=scale)

    def _pack(self, slots: tuple[int, ...], a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor]) -> _Packed:
        key = (slots, *(stack._version for stack in (*a_stacked, *b_stacked)))
        place = a_stacked[0].data_ptr()
        packed = self._packed.get(place)
        if packed is None or packed.key != key:
            packed = self._packed[place] = _Packed(key, *pack(slots, a_stacked, b_stacked))
        return packed


def pack(slots: Sequence[int], a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(a [N, I, S R], b [N, S R, O]) of these slots, R cut to the highest rank among them; padding rows of A are zero."""
    chosen = torch.tensor(slots)
    a = [stack[:, 0].index_select(0, chosen) for stack in a_stacked]  # [N, R, I] a slice
    used = torch.stack([part.ne(0).any(2).any(0) for part in a]).any(0).nonzero()
    rank = int(used.max()) + 1 if len(used) else 1
    b = [stack[:, 0, :, :rank].index_select(0, chosen).transpose(1, 2) for stack in b_stacked]  # [N, R, O_s] a slice
    widths = [part.shape[2] for part in b]
    blocks = torch.zeros(len(slots), rank * len(b), sum(widths), dtype=b[0].dtype)
    left = 0
    for index, part in enumerate(b):
        blocks[:, index * rank : (index + 1) * rank, left : left + widths[index]] = part
        left += widths[index]
    return torch.cat([part[:, :rank] for part in a], 1).transpose(1, 2).contiguous(), blocks


def use_grouped_lora() -> None:
    """Have vLLM's CPU platform name GroupedLora; other platforms keep theirs."""
    if current_platform.is_cpu():
        name = f"{GroupedLora.__module__}.{GroupedLora.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)  # type: ignore[method-assign, assignment]
