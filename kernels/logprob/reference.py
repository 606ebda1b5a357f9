"""Log-probabilities and entropies in plain torch, a chunk of positions at a time; what the CPU runs.

P positions, H hidden size, V vocabulary, c positions of a chunk.
With p = softmax(z), z = h W^T / temperature: d log p[target] / d h = (W[target] - p W) / temperature. That is one vector a
position, whatever the loss above does with the log-probability: the forward keeps it, [P, H], and the backward only scales it,
so the logits are made once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in fp32


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """As `weft.kernels.logprob.token_logprobs` says. chunk_elements: logits held at once, at least those of one position."""
    assert hidden.shape[0] == targets.shape[0] == temperature.shape[0], "one target and one temperature per position"
    assert not head.requires_grad, "the head is frozen: it would get no gradient here"
    chunk = max(1, chunk_elements // head.shape[0])
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets.long(), temperature.float(), chunk, differentiable)
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor, chunk: int, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        direction = torch.empty_like(hidden) if differentiable else None
        for start in range(0, hidden.shape[0], chunk):
            at = slice(start, start + chunk)
            logits = (hidden[at] @ head.T).float().div_(temperature[at, None])  # [c, V]
            all_logprobs = logits.log_softmax(dim=1)
            probs = all_logprobs.exp()
            logprobs[at] = all_logprobs.gather(1, targets[at, None]).squeeze(1)
            entropy[at] = -torch.linalg.vecdot(probs, all_logprobs)
            if direction is not None:
                probs.neg_().scatter_add_(1, targets[at, None], torch.ones_like(probs[:, :1]))
                direction[at] = probs.to(head.dtype) @ head
        ctx.save_for_backward(direction, temperature)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        direction, temperature = ctx.saved_tensors
        return ((grad_logprobs / temperature)[:, None] * direction).to(direction.dtype), None, None, None, None, None
