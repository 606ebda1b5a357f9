"""The relay's memory, which ten thousand syncs may not raise (benchmarks/installs.py measures it)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAPS = """
import ctypes, sys, threading
from weft.actors.param_sync import _return_freed_slabs

libc = ctypes.CDLL(None)
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
if sys.argv[2] == "relay":
    _return_freed_slabs()
together = threading.Barrier(8)

def allocate():
    together.wait()
    libc.malloc(5000)
    together.wait()  # each of them while the others have theirs

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(open(sys.argv[1]).read().count("<heap nr="))
"""


def test_a_relays_threads_share_one_heap(tmp_path: Path) -> None:
    """Else its memory grows whenever a busy machine has had two of them allocate at once."""

    def heaps(of: str) -> int:
        said = subprocess.run([sys.executable, "-c", HEAPS, str(tmp_path / of), of], capture_output=True, text=True, check=True)
        return int(said.stdout)

    assert heaps("relay") < heaps("any other")
