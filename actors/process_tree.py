"""Processes as the kernel knows them: who started whom, who still runs, and their end. Of Ray nothing is known here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

END_S = 5.0  # to end of itself


class Families:
    """Processes and what they have started. Noted while they live: once a parent has died nothing leads to its children."""

    def __init__(self) -> None:
        self._noted: set[psutil.Process] = set()

    def note(self, pid: int) -> None:
        """This process, and what it has started up to now."""
        self._noted.update(_family(pid))

    def note_all(self) -> None:
        """What the noted ones have started since."""
        for process in list(self._noted):
            if runs(process):  # else its number may be another's by now
                self.note(process.pid)

    def end(self) -> None:
        """Returns when none is left: those that do not end of themselves are killed."""
        _, alive = psutil.wait_procs(self._noted, timeout=END_S)
        for process in alive:
            kill(process.pid)
        psutil.wait_procs(alive, timeout=END_S)


def children_of_this(folder: Path) -> Iterator[psutil.Process]:
    """Processes that this one started, and whose command names `folder`."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if str(folder) in " ".join(child.cmdline()):
                yield child


def named(processes: Iterable[psutil.Process], names: Iterable[str]) -> list[psutil.Process]:
    """Those of these names."""
    return [process for process in processes if process.name() in names]


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended, heeded by its parent or not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(pid: int) -> None:
    """End it, if it has not ended."""
    with contextlib.suppress(psutil.Error):
        psutil.Process(pid).kill()


def wait_gone(pid: int, deadline_s: float) -> None:
    """Returns when the kernel has taken it away, with all that it held, or at the deadline."""
    with contextlib.suppress(psutil.Error):  # gone already
        psutil.wait_procs([psutil.Process(pid)], timeout=deadline_s)


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
