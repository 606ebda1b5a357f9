"""Which prompts are held out: decided by the prompt's own text, so no prompt is ever on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 2000  # candidates looked at for one prompt: at a fraction of 0.01, all miss once in 5e8
_STRIDE = 0x9E3779B1  # odd and far from any size: successive indices start far apart


def is_held_out(text: str, fraction: float) -> bool:
    """True for about `fraction` of all texts, the same ones on every machine and in every run."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"held_out_fraction={fraction!r}: must be above 0 and below 1")


def pick(draw: Callable[[int], T], text: Callable[[T], str], index: int, held_out: bool, fraction: float, size: int) -> T:
    """The `index`-th of the endless stream of candidates on one side of the split.

    draw: candidate number (0 to size - 1) -> candidate. The answer depends on the arguments alone, at a cost that does not
    grow with `index`; different indices may give the same candidate. Raises ValueError if one side seems to be empty.
    """
    for attempt in range(min(ATTEMPTS, size)):
        candidate = draw((index * _STRIDE + attempt) % size)
        if is_held_out(text(candidate), fraction) == held_out:
            return candidate
    side = "held-out" if held_out else "training"
    raise ValueError(f"held_out_fraction={fraction!r}: the task has too few different prompts, none of them a {side} one")
