"""Who takes part in a broadcast group: a roll call on a key store, under an epoch.

An epoch is a name that is used once. A group whose member dies, leaves or comes back is dissolved, and the next one forms
under a new epoch, so that what a straggler of the old one says is never heard. The store is torch's (broadcast.py opens
it); all that is asked of it is in `KeyStore`.

    <epoch>/came/<rank>     set by each member as it comes
    <epoch>/dissolved       set by the store's host: waiting for this group is over
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from weft.transport.errors import RendezvousError

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.0005, 0.01  # between two looks at the store; doubles


class KeyStore(Protocol):
    """The part of torch.distributed.Store that a roll call needs."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are set."""


def answer(
    store: KeyStore, epoch: str, rank: int, world_size: int, deadline_s: float, left: threading.Event | None = None
) -> None:
    """Come to the roll call of `epoch` and wait until everybody has. Blocking.

    Raises RendezvousError when the deadline passes (it names the ranks that came), when the epoch is dissolved,
    when the store is gone, or when this member has `left`.
    """
    left = left or threading.Event()
    end, pause = time.monotonic() + deadline_s, _FIRST_PAUSE_S
    everybody = [_came(epoch, member) for member in range(world_size)]
    try:
        store.set(_came(epoch, rank), "1")
        while not store.check(everybody):
            if store.check([_dissolved(epoch)]):
                raise RendezvousError(f"group {epoch} was dissolved while rank {rank} waited for it")
            if time.monotonic() >= end:
                present = [member for member, key in enumerate(everybody) if store.check([key])]
                raise RendezvousError(f"group {epoch} did not form in {deadline_s:.3g} s: ranks {present} of {world_size} came")
            if left.wait(min(pause, max(end - time.monotonic(), 0))):
                raise RendezvousError(f"rank {rank} left group {epoch} before it formed")
            pause = min(2 * pause, _LAST_PAUSE_S)
        if store.check([_dissolved(epoch)]):
            raise RendezvousError(f"group {epoch} is dissolved: rank {rank} came too late")
    except RuntimeError as error:  # what torch raises when the store's host has died
        raise _gone(epoch, error) from error


def is_dissolved(store: KeyStore, epoch: str) -> bool:
    """Raises RendezvousError when the store is gone, and with it the group."""
    try:
        return store.check([_dissolved(epoch)])
    except RuntimeError as error:
        raise _gone(epoch, error) from error


def dissolve(store: KeyStore, epoch: str) -> None:
    """Whoever waits for the group of `epoch`, or comes later, gets RendezvousError."""
    store.set(_dissolved(epoch), "1")


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port". Raises ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"store={address!r}: must be host:port")
    return host, int(port)


def _came(epoch: str, rank: int) -> str:
    return f"{epoch}/came/{rank}"


def _dissolved(epoch: str) -> str:
    return f"{epoch}/dissolved"


def _gone(epoch: str, error: BaseException) -> RendezvousError:
    return RendezvousError(f"the rendezvous store of group {epoch} is gone: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
