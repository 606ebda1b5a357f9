"""Whose signals are whose, while something is started that has its own idea of them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def blocked(one: signal.Signals) -> Iterator[None]:
    """Whatever is started here never gets the signal; this process gets it at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {one})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def kept(one: signal.Signals) -> Iterator[None]:
    """Nothing here puts a handler in the place of the one that Python has for the signal: to put it back afterwards would be
    too late for a signal that comes meanwhile, and blocked, as above, it would never end what is started here. What is put
    behind Python's back is gone at the end."""
    put = signal.signal

    def put_another(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number == one else put(number, handler)

    signal.signal = put_another
    try:
        yield
    finally:
        signal.signal = put
        if (own := signal.getsignal(one)) is not None:
            put(one, own)
