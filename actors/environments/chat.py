"""Chat messages that every built-in environment makes alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def with_system(system: str | None, messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """`messages`, after a system turn if there is one."""
    first: tuple[Mapping[str, Any], ...] = () if system is None else ({"role": "system", "content": system},)
    return (*first, *messages)
