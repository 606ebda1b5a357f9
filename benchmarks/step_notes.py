"""What train_step's figures say, and what was tried: part of its result."""

from __future__ import annotations

NOTES: tuple[str, ...] = ()
