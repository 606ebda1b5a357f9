"""Whose fault it is: whatever a user's code raises becomes one exception of ours, as text alone.

A user's class may raise in its own `__str__`, or be no Exception at all (sys.exit, KeyboardInterrupt): set on a future it
would end the event loop of the sampler that awaits it, and every adapter with it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weft.transport.errors import AdapterFault

SHOWN = 10_000  # characters of what a user's object says of itself


@contextmanager
def blamed_on(name: str, what: str) -> Iterator[None]:
    """Whatever is raised inside is the fault of adapter `name` alone: it becomes an AdapterFault with the traceback.

    A cancellation is one as well, unless somebody asked for it: then the caller is given up, and that is nobody's fault.
    """
    try:
        yield
    except AdapterFault:
        raise
    except BaseException as error:  # a user's code may raise anything
        if isinstance(error, asyncio.CancelledError) and _is_given_up():
            raise
        kind = type(error).__name__
        said = f"{name}: {what} raised {kind}: {shown(error)}"
        raise AdapterFault(said, kind, shown(error, _formatted)) from error


def shown(value: object, how: Callable[..., str] = str, most: int | None = SHOWN) -> str:
    """`how(value)`, whatever that raises, so that it can travel: of `most` characters at most, and no half of a surrogate
    pair."""
    try:
        return str.encode(how(value), errors="replace").decode()[:most]
    except BaseException as error:  # noqa: BLE001  it is a user's __str__ or __repr__
        return f"(cannot be shown: {type(error).__name__})"


def _formatted(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _is_given_up() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
