"""The output folder: one run at a time, and an earlier run that is moved aside, never deleted."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.configs.build import SettingError

LOCK_FILE = "weft.lock"


def is_run(folder: Path) -> bool:
    """Whether a run of weft has begun here."""
    return (folder / LOCK_FILE).is_file()


@contextmanager
def hold(folder: Path, make: bool = False) -> Iterator[None]:
    """Hold the folder against other runs; the kernel lets go of it when the process ends, however it ends.

    make: make the folder and its lock. Raises SettingError when another run holds it, and says which process that is.
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+" if make else "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise SettingError(f"run.dir={str(folder)!r}: must not be in use, and process {holder} is running there") from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def move_aside(folder: Path) -> Path | None:
    """Rename an earlier run to the first free of <folder>.1, .2 ...; returns where it is, None if there was none.

    Raises SettingError for a folder with something else in it, which is no run of weft's to move.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not is_run(folder):
        raise SettingError(f"run.dir={str(folder)!r}: must be empty or an earlier run for run.fresh=true to move it aside")
    if folder.resolve() == Path.cwd():
        raise SettingError(f"run.dir={str(folder)!r}: must not be the current folder for run.fresh=true to move it aside")
    free = next(path for number in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.{number}")).exists())
    folder.rename(free)
    return free
