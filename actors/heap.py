"""Python's garbage collector in a process that others wait for: each of ours, and the driver as long as it has pools."""

from __future__ import annotations

import gc


def freeze() -> None:
    """What there is by now, of modules and of a model's parts, is never looked through again.

    A full collection goes through all of it: in a process that has imported vLLM it takes 0.44 s (633,000 objects, Xeon at
    2.5 GHz), and no token and no version passes meanwhile. What is made from now on is collected as ever.
    """
    gc.collect()
    gc.freeze()


def thaw() -> None:
    """Everything is looked through again: what is no longer needed of a run that has ended would stay, where it has cycles."""
    gc.unfreeze()
