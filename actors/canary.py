"""The canary: a few fixed tokens whose log-probability tells one set of weights from another.

A trainer publishes it with every version; a sampler that finds another one under the installed version refuses it. So an
adapter that is left out, applied twice or mixed up is caught before a rollout names it.
"""

from __future__ import annotations

CANARY_LENGTH = 24  # the first token conditions, 23 are scored: enough that weights of two versions differ in the sum
# Between trainer and engine, by the weights' type: nats a scored token, and a share of what the adapter adds, which bfloat16
# rounds in every layer. bfloat16's share is a guess: before slabs had checksums one install of 73 differed by 6.7 of 65 nats
# (Qwen3-4B shape, H200), and whether rounding did it is open. That the bytes are the trainer's, checksum.py sees to.
TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (5e-2, 0.15)}
_MULTIPLIER = 0x9E3779B1  # Knuth's multiplicative hash (2^32 / golden ratio): spreads consecutive numbers over the vocabulary


def canary_tokens(vocab_size: int) -> tuple[int, ...]:
    """CANARY_LENGTH token ids below `vocab_size`, the same everywhere.

    The canary's log-probability is the sum over tokens 1..n of log p(token | those before it).
    """
    return tuple(((i + 1) * _MULTIPLIER % 2**32) * vocab_size >> 32 for i in range(CANARY_LENGTH))


def canary_allowance(dtype: str, canary: float, base: float) -> float:
    """How far an engine's canary may be from the trainer's: less than half as far as the base's, for any adapter that does
    something, so that one which is left out, or half there, is found."""
    a_token, share = TOLERANCE[dtype]
    return a_token * (CANARY_LENGTH - 1) + share * abs(canary - base)
