"""Log-probabilities of chosen tokens out of hidden states. The device of the hidden states decides which implementation runs.

P positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from weft.kernels.logprob import reference


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [P, H], head [V, H] (frozen), targets int [P], temperature [P] -> log-probability of each target, and entropy of
    its distribution softmax(hidden head^T / temperature), fp32 [P] each.

    The gradient goes from the log-probabilities to hidden alone; the entropy has none. All P * V logits are never held at once.
    """
    if hidden.device.type == "cuda":
        from weft.kernels.logprob import triton  # needs a GPU's driver, or its interpreter

        return triton.token_logprobs(hidden, head, targets, temperature)
    return reference.token_logprobs(hidden, head, targets, temperature)
