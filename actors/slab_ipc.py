"""A slab from a trainer to the relay without the host: a buffer on the trainer's GPU that the relay opens by CUDA IPC.

    trainer   put(weights, file) ──> copied into a box ──> `file` says where the box is
    relay     take(file): claims it (the file is renamed) ──> copied to a buffer of its own ──> the file is removed
                                                                                                  '──> the box is free again

A box is the size of a slab and never given back: to open one costs milliseconds the first time, and nothing afterwards. One
that nobody came for is free again when its adapter publishes its next version.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLAIMED = ".taken"


@dataclass
class _Box:
    buffer: Tensor
    address: list[Any]  # what the other process opens it by
    owner: str = ""
    file: Path | None = None

    def free_for(self, owner: str) -> bool:
        """Nobody has a claim on it, or only one that `owner` itself has made out of date."""
        if self.file is None or (not self.file.exists() and not _claimed(self.file).exists()):
            return True
        if self.owner != owner:
            return False
        try:
            self.file.unlink()
        except FileNotFoundError:
            return False  # it is being copied just now
        return True


class Boxes:
    """The boxes of one trainer, on one GPU. For one thread."""

    def __init__(self, device: torch.device, export: Callable[[Tensor], list[Any]] | None = None) -> None:
        """export: the address of a buffer, for the process that opens it; by default CUDA's."""
        self._device = device
        self._export = export or _cuda_address
        self._boxes: list[_Box] = []
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def put(self, weights: Tensor, owner: str, file: Path) -> None:
        """Hand over a copy of `weights` through `file`. The weights must be complete: nothing on the device is waited for."""
        raw = weights.detach().view(torch.uint8)
        box = next((box for box in self._boxes if len(box.buffer) == len(raw) and box.free_for(owner)), None)
        # A buffer is the memory of the stream that is current when it is made: what another one has let go of, and still works
        # on, comes into it unasked. So a box is made where it is written.
        with torch.cuda.stream(self._stream):
            if box is None:
                buffer = torch.empty(len(raw), dtype=torch.uint8, device=self._device)
                box = _Box(buffer, self._export(buffer))
                self._boxes.append(box)
            box.buffer.copy_(raw)
        if self._stream is not None:
            self._stream.synchronize()
        box.owner, box.file = owner, file
        said = json.dumps({"pid": os.getpid(), "address": box.address})
        write_whole(file, lambda part: part.write_text(said))

    def forget(self, owner: str) -> None:
        """It publishes no more: what nobody has come for is free."""
        for box in self._boxes:
            if box.owner == owner:
                box.free_for(owner)


class Taker:
    """The relay's side: boxes of every trainer of this machine, each opened once. For any thread."""

    def __init__(self, open_box: Callable[[list[Any]], Tensor] | None = None) -> None:
        """open_box: a view of the buffer of an address; by default CUDA's."""
        self._open = open_box or _cuda_view
        self._views: dict[tuple[int, str], Tensor] = {}  # by the trainer's process and the address there
        self._streams: dict[torch.device, Any] = {}
        self._one_at_a_time = threading.Lock()
        self.home: torch.device | None = None  # where slabs are kept: the GPU of the first

    def take(self, file: Path, nbytes: int) -> Tensor:
        """A copy of the slab, uint8 [nbytes]. Raises OSError if it is not there (any more), ValueError if it is of another
        size, RuntimeError if the box cannot be opened."""
        claimed = _claimed(file)
        file.rename(claimed)
        try:
            said = json.loads(claimed.read_text())
            with self._one_at_a_time:
                return self._copy(said, file, nbytes)
        finally:
            claimed.unlink()

    def _copy(self, said: dict[str, Any], file: Path, nbytes: int) -> Tensor:
        view = self._view(said["pid"], said["address"])
        if len(view) != nbytes:
            raise ValueError(f"{file} holds {len(view)} bytes, its handle says {nbytes}")
        self.home = self.home or view.device
        if view.device.type == "cpu":
            return view.clone()
        stream = self._streams.get(view.device) or torch.cuda.Stream(view.device, priority=-1)  # type: ignore[no-untyped-call]
        self._streams[view.device] = stream
        with torch.cuda.device(view.device), torch.cuda.stream(stream):
            own = torch.empty(nbytes, dtype=torch.uint8, device=self.home)
            own.copy_(view, non_blocking=True)
        stream.synchronize()
        return own

    def _view(self, pid: int, address: list[Any]) -> Tensor:
        name = pid, json.dumps(address)
        if name not in self._views:
            for other in [other for other in self._views if not Path(f"/proc/{other[0]}").exists()]:
                del self._views[other]  # a mapping keeps the memory of a trainer that has died
            self._views[name] = self._open(address)
        return self._views[name]


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Once `file` is there, it is whole. Raises what `write` raises (OSError: no room), and then leaves nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    try:
        write(part)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _claimed(file: Path) -> Path:
    return file.with_suffix(CLAIMED)


def _cuda_address(buffer: Tensor) -> list[Any]:
    """The GPU's UUID, since the two processes may number GPUs differently, then what torch opens it by."""
    _, *parts = buffer.untyped_storage()._share_cuda_()
    uuid = str(torch.cuda.get_device_properties(buffer.device).uuid)
    return [uuid, len(buffer), *(part.hex() if isinstance(part, bytes) else part for part in parts)]


def _cuda_view(address: list[Any]) -> Tensor:
    uuid, size, handle, nbytes, offset, counter, counter_offset, event, wait = address
    devices = range(torch.cuda.device_count())
    there = [index for index in devices if str(torch.cuda.get_device_properties(index).uuid) == uuid]
    if not there:
        raise RuntimeError(f"GPU {uuid} is not among the {len(devices)} that this process sees")
    with torch.cuda.device(there[0]):
        torch.empty(1, device="cuda")  # the context, without which nothing can be opened
        storage = torch.UntypedStorage._new_shared_cuda(
            there[0], bytes.fromhex(handle), nbytes, offset, bytes.fromhex(counter), counter_offset, bytes.fromhex(event), wait
        )
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)[:size]
