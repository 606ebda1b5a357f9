"""The exceptions of the world (the user's mistakes are ValueError, ours are assertions).

    WeftError
    ├── TransportError
    │   ├── DeadlineError        no reply in time
    │   ├── PeerDiedError        the process at the other end is gone; its state is lost
    │   ├── CodecError           bytes that are no message of ours
    │   └── BusyError            the peer's bounded queue is full
    ├── RemoteError              the peer's handler raised; carries its traceback
    │   └── AdapterFault         ... because of one adapter (its reward, its loss): the others go on
    ├── InstallError             a sampler could not take a version
    ├── VersionError             a trainer has another version of the adapter than the one asked for
    ├── EngineLostError          a sampler's process lives, but its engine does not: it can do nothing any more
    ├── RendezvousError          a broadcast group did not form in time (says which ranks came), or broke in a shared step
    ├── StartError               an actor did not start, or not in time; carries its traceback
    └── CheckpointError          a checkpoint cut short or altered
"""

from __future__ import annotations


class WeftError(Exception):
    """Root of every exception that weft raises for the world's faults."""


class TransportError(WeftError):
    """A message did not make its way."""


class DeadlineError(TransportError):
    """No reply came within the deadline."""


class PeerDiedError(TransportError):
    """The process at the other end is gone, and what only it held is lost."""


class CodecError(TransportError):
    """Bytes that are no message of this version of weft."""


class BusyError(TransportError):
    """The peer has as many requests in flight as it admits."""


class RemoteError(WeftError):
    """The peer's handler raised.

    kind: name of the exception's class there; traceback: its formatted traceback.
    """

    def __init__(self, message: str, kind: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.traceback}".rstrip()


class AdapterFault(RemoteError):
    """One adapter's own fault: its environment raised, its loss is not finite. Nobody else's."""


class InstallError(WeftError):
    """A sampler could not take a version, or it took one that does not sample as it should."""


class VersionError(WeftError):
    """The trainer has another version of this adapter than the one asked for: it is ahead, or has begun a new lineage."""


class EngineLostError(WeftError):
    """vLLM's engine process is gone. The sampler's process holds nothing without it and must end."""


class RendezvousError(WeftError):
    """A broadcast group did not form in time, or broke in a step that trainers share."""


class StartError(WeftError):
    """An actor did not start, or not in time."""


class CheckpointError(WeftError):
    """A checkpoint is cut short or altered."""
