"""The canary: a few fixed tokens whose log-probability tells one set of weights from another.

A trainer publishes it with every version; a sampler that finds another one under the installed version refuses it. So an
adapter that is left out, applied twice or mixed up is caught before a rollout names it. That the weights are those of this
version to the bit, checksums say (checksum.py, kernels.pack); that the engine computes with them, the canary alone.

In bfloat16 trainer and engine round differently. On a random base of the Qwen3-4B shape two orders of the same sums differ by
0.17 nats (root mean square over 56 versions, steps of 1e-3), until an adapter begins to run away: there by 1.0 to 1.2 nats at
some versions and by 0.01 at the ones between, where one step moved the canary by 5 to 12. On H200s trainer and vLLM were never
further apart than 0.6, over 300 syncs of small steps and 68 of 1e-3; under the 69th, 80 nats from the base, by 2.5 in each of
ten installs, while the engine held to the bit what was published. So how far apart they may be is no constant, and no share
of what the adapter does: what is further apart than usual is looked at again, with the noise that the trainer finds in its own
canary when it rounds otherwise.
"""

from __future__ import annotations

CANARY_LENGTH = 24  # the first token conditions, 23 are scored: enough that weights of two versions differ in the sum
# Nats a scored token between trainer and engine, by the weights' type.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
REWRITTEN = (1.25, 1.5, 1.75, 0.7)  # what the weights are multiplied by, to have everything rounded otherwise
NOISES = 4.0  # of so many the allowance is: the noise is known from four rewritings alone, and has a long tail
_MULTIPLIER = 0x9E3779B1  # Knuth's multiplicative hash (2^32 / golden ratio): spreads consecutive numbers over the vocabulary


def canary_tokens(vocab_size: int) -> tuple[int, ...]:
    """CANARY_LENGTH token ids below `vocab_size`, the same everywhere.

    The canary's log-probability is the sum over tokens 1..n of log p(token | those before it).
    """
    return tuple(((i + 1) * _MULTIPLIER % 2**32) * vocab_size >> 32 for i in range(CANARY_LENGTH))


def canary_allowance(dtype: str, noise: float = 0.0, shift: float = 0.0) -> float:
    """How far an engine's canary may be from the trainer's, in nats. noise: of the trainer's, where it has been looked for;
    shift: how far that is from the base's. Noise allows for less than half of the shift: whatever it is, an adapter is refused
    that is left out, or applied by half, if the difference which that makes is above what is usual (1.15 in bfloat16)."""
    usual = TOLERANCE[dtype] * (CANARY_LENGTH - 1)
    return max(usual, min(NOISES * noise, 0.45 * abs(shift)))
