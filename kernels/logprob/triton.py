"""Log-probabilities and entropies on CUDA: cuBLAS makes a chunk of logits, one kernel reads them and leaves in their place the
direction of the gradient, cuBLAS takes that back to hidden states. The formulas are those of the reference.

P positions, H hidden size, V vocabulary, c positions of a chunk.
Logits are rounded to the model's type, as a sampler's are; sums and exponents are in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_ELEMENTS = 1 << 29  # logits held at once: 1 GiB in bf16, so that the products are large


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """As `weft.kernels.logprob.token_logprobs` says. chunk_elements: logits held at once, at least those of one position."""
    assert hidden.shape[0] == targets.shape[0] == temperature.shape[0], "one target and one temperature per position"
    assert not head.requires_grad, "the head is frozen: it would get no gradient here"
    chunk = max(1, chunk_elements // head.shape[0])
    chunk -= chunk % 16 if chunk > 16 else 0  # a kernel is compiled anew for pointers to anywhere else
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets, temperature.float(), chunk, differentiable)
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, chunk: int, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        count, size = hidden.shape[0], head.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        direction = torch.empty_like(hidden) if differentiable else None
        room = hidden.new_empty(min(chunk, count), size)
        for start in range(0, count, chunk):
            at = slice(start, min(start + chunk, count))
            logits = torch.mm(hidden[at], head.t(), out=room[: at.stop - start])
            _score[(logits.shape[0],)](
                logits, targets[at], temperature[at], logprobs[at], entropy[at], size,
                DIRECTION=direction is not None, BLOCK=min(8192, triton.next_power_of_2(size)), num_warps=16,
            )  # fmt: skip
            if direction is not None:
                torch.mm(logits, head, out=direction[at])
        ctx.save_for_backward(direction, temperature)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        direction, temperature = ctx.saved_tensors
        count, size = direction.shape
        grad = torch.empty_like(direction)
        if count:
            block = triton.next_power_of_2(size)
            _scale_rows[(count,)](direction, grad_logprobs.contiguous(), temperature, grad, size, BLOCK=block, num_warps=4)
        return grad, None, None, None, None, None


@triton.jit
def _score(logits, targets, temperature, logprobs, entropy, size, DIRECTION: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its log-probability, its entropy, and over its logits one-hot(target) - softmax(z), z = logit / temperature."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * size
    target = tl.load(targets + row)
    heat = tl.load(temperature + row)
    highest, total, along = -float("inf"), 0.0, 0.0  # max z, sum of exp(z - max), sum of exp(z - max) z
    for start in range(0, size, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = tl.load(at + c, mask=c < size, other=-float("inf")).to(tl.float32) / heat
        above = tl.maximum(highest, tl.max(z, 0))
        weight = tl.exp(z - above)
        kept = tl.exp(highest - above)
        total = total * kept + tl.sum(weight, 0)
        along = along * kept + tl.sum(tl.where(c < size, weight * z, 0.0), 0)
        highest = above
    whole = highest + tl.log(total)
    chosen = tl.load(at + target).to(tl.float32) / heat
    tl.store(logprobs + row, chosen - whole)
    tl.store(entropy + row, whole - along / total)
    if DIRECTION:
        tl.debug_barrier()  # the target's logit has been read by every thread
        for start in range(0, size, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.load(at + c, mask=c < size, other=0.0).to(tl.float32) / heat
            value = tl.where(c == target, 1.0, 0.0) - tl.exp(z - whole)
            tl.store(at + c, value.to(logits.dtype.element_ty), mask=c < size)


@triton.jit
def _scale_rows(direction, grad_logprobs, temperature, grad, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * size + c
    factor = tl.load(grad_logprobs + row) / tl.load(temperature + row)
    value = tl.load(direction + at, mask=c < size, other=0.0).to(tl.float32) * factor
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=c < size)
