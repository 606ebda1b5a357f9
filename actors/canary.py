"""The canary: a few fixed tokens whose log-probability tells one set of weights from another.

A trainer publishes it with every version; a sampler that finds another one under the installed version refuses it. So an
adapter that is left out, applied twice or mixed up is caught before a rollout names it.
"""

from __future__ import annotations

CANARY_LENGTH = 24  # the first token conditions, 23 are scored: enough that weights of two versions differ in the sum
# Nats a scored token between trainer and engine, by the weights' type.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_MULTIPLIER = 0x9E3779B1  # Knuth's multiplicative hash (2^32 / golden ratio): spreads consecutive numbers over the vocabulary


def canary_tokens(vocab_size: int) -> tuple[int, ...]:
    """CANARY_LENGTH token ids below `vocab_size`, the same everywhere.

    The canary's log-probability is the sum over tokens 1..n of log p(token | those before it).
    """
    return tuple(((i + 1) * _MULTIPLIER % 2**32) * vocab_size >> 32 for i in range(CANARY_LENGTH))


def canary_allowance(dtype: str) -> float:
    """How far an engine's canary may be from the trainer's, in nats. The same for an adapter that does much: one install of 73
    on a Qwen3-4B shape differed by 6.7 of 65 nats, and until that is explained it is refused, not allowed for."""
    return TOLERANCE[dtype] * (CANARY_LENGTH - 1)
