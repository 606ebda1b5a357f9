"""A rival of train_step: every adapter stacked, torch._grouped_mm for shrink and expand, autograd for their gradients.

N adapters, T tokens, P parts of a fused linear, R rank, I in, O out. All but LoRA itself is weft's own: norms, attention, head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from step_contenders import Batch, Case, backward
from torch import Tensor

from weft.actors.model import Decoder


class Grouped:
    """At most `most` tokens in one forward and backward: it keeps SwiGLU's output, and 32,768 do not fit. One fused AdamW over
    the stacks in bf16, one clip for all."""

    name = "stack + torch._grouped_mm"

    def __init__(self, decoder: Decoder, case: Case, most: int = 16384) -> None:
        decoder.use_fp8(False)
        self.decoder, self.case = decoder, case
        self.together = max(1, most // case.tokens_each)
        self.batch = Batch.random(case, decoder.head.shape[0], decoder.head.device)
        self.stacks = {id(linear): self._stacks(linear) for linear in self._linears()}
        self.trained = [leaf for pairs in self.stacks.values() for pair in pairs for leaf in pair]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def _linears(self) -> list[Any]:
        return [getattr(layer, name) for layer in self.decoder.layers for name in ("qkv", "o", "gate_up", "down")]

    def _stacks(self, linear: Any) -> list[tuple[Tensor, Tensor]]:
        """A [N, I, R] and B [N, R, O] of each part."""
        count, rank, inputs = self.case.adapters, self.case.rank, linear.weight.shape[1]

        def leaf(*shape: int) -> Tensor:
            return linear.weight.new_empty(shape).normal_(0, 0.02).requires_grad_()

        return [(leaf(count, inputs, rank), leaf(count, rank, width)) for width in linear.widths]

    def step(self) -> None:
        case = self.case
        for first in range(0, case.adapters, self.together):
            chosen = slice(first, min(first + self.together, case.adapters))
            for linear in self._linears():
                linear.forward = partial(self._forward, linear, chosen)
            at = slice(chosen.start * case.tokens_each, chosen.stop * case.tokens_each)
            bounds = list(range(0, at.stop - at.start + 1, case.row))
            self.offsets = torch.arange(1, chosen.stop - chosen.start + 1, device=self.batch.tokens.device, dtype=torch.int32)
            self.offsets *= case.tokens_each
            try:
                backward(self.decoder(self.batch.tokens[at], bounds), self.decoder, self.batch, at)
            finally:
                for linear in self._linears():
                    del linear.forward
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, linear: Any, chosen: slice, x: Tensor, lora: None, source: None = None) -> Tensor:
        parts = [
            torch._grouped_mm(torch._grouped_mm(x, a[chosen], offs=self.offsets), b[chosen], offs=self.offsets)
            for a, b in self.stacks[id(linear)]
        ]
        return F.linear(x, linear.weight, linear.bias) + (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
