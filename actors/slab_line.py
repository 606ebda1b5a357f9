"""What a sampler's worker receives over one broadcast group: slabs by their numbers, on a thread of the group's own."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from weft.transport.broadcast import BroadcastGroup
from weft.transport.errors import PeerDiedError

Then = Callable[[torch.Tensor | BaseException], None]
MAX_WAITING = 64  # slabs on their way over one group
SWITCH_S = 5e-4  # Python's own 5e-3 is what a slab's thread would wait for each time while the engine schedules a step


class Line:
    """One broadcast group and the thread that receives over it, in the order of broadcasting, which may not be that of asking.
    A fault ends it and what waits."""

    def __init__(self, group: dict[str, Any], device: torch.device, stream: Any) -> None:
        """stream: which no step runs on; what is received is allocated on it."""
        self._link = BroadcastGroup(**group)
        self._device, self._stream = (device, stream) if group["backend"] == "nccl" else (torch.device("cpu"), None)
        self._jobs: queue.Queue[tuple[int, int, Then] | None] = queue.Queue(MAX_WAITING)
        self.broken: BaseException | None = None
        if self._stream is not None:
            sys.setswitchinterval(SWITCH_S)
        threading.Thread(target=self._serve, name=f"weft-{group['epoch']}", daemon=True).start()

    def receive(self, sequence: int, nbytes: int, then: Then) -> None:
        """`then` gets broadcast number `sequence` (uint8), or why it did not come. Raises queue.Full when too many wait."""
        self._jobs.put_nowait((sequence, nbytes, then))

    def close(self) -> None:
        """Leave the group; what still waits for it fails."""
        self._link.close()
        self._jobs.put(None)

    def _serve(self) -> None:
        early: dict[int, tuple[int, Then]] = {}
        next_one = 0
        while (job := self._jobs.get()) is not None:
            early[job[0]] = job[1:]
            while early and (next_one in early or self.broken is not None):
                self._bring(*early.pop(next_one if next_one in early else min(early)))
                next_one += 1
        for _, then in early.values():
            then(PeerDiedError("the group was left before this broadcast"))

    def _bring(self, nbytes: int, then: Then) -> None:
        try:
            # On the engine's own stream it could be memory that a step still reads. On this one, what another slab's checks
            # have let go of: the broadcast, on a stream of its own, waits for what this one has queued.
            with torch.cuda.stream(self._stream):
                raw = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                self._link.broadcast(raw)
        except Exception as error:  # noqa: BLE001 whatever it is, the waiting install reports it; the group is lost
            self._link.close()
            self.broken = error
            then(error)
        else:
            then(raw)
