"""The base model that ships with weft, and the scripts that make it.

tiny/ is a normal Hugging Face folder of the Qwen3 architecture; `python -m weft.actors.base_model.pretrain` makes it
from nothing.
"""

from __future__ import annotations

from pathlib import Path

TINY = "tiny"


def tiny_path() -> str:
    """The folder of the shipped base model."""
    return str(Path(__file__).parent / TINY)
