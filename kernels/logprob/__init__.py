"""Log-probabilities of chosen tokens out of hidden states. The device of the hidden states decides which implementation runs.

P positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from weft.kernels.logprob import reference

_TOKEN_LOGPROBS = {"cpu": reference.token_logprobs}  # device type -> implementation; elsewhere the reference runs too


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [P, H], head [V, H] (frozen), targets int [P], temperature [P] -> log-probability of each target, and entropy of
    its distribution softmax(hidden head^T / temperature), fp32 [P] each.

    The gradient goes from the log-probabilities to hidden alone; the entropy has none. All P * V logits are never held at once.
    """
    run = _TOKEN_LOGPROBS.get(hidden.device.type, reference.token_logprobs)
    return run(hidden, head, targets, temperature)
