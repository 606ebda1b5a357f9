"""How an adapter's weights leave their trainer: as a file, or in a box on the GPU whose file says where it is (slab_ipc.py)."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from pathlib import Path

import torch
from torch import Tensor

from weft.actors.checksum import checksum
from weft.actors.learner import Adapter
from weft.actors.slab_ipc import Boxes, write_whole
from weft.transport.messages import SlabHandle


class Outgoing:
    """The slabs of one trainer. For any thread that has the adapter to itself."""

    def __init__(self, folder: Path, boxes: Boxes | None) -> None:
        """folder: of the files, best in shared memory; whoever takes a slab removes its file."""
        self._folder, self._boxes = folder, boxes
        self._one_at_a_time = threading.Lock()  # boxes are for one thread
        self._numbers = itertools.count()

    @property
    def on_device(self) -> bool:
        """Whether slabs stay on the GPU."""
        return self._boxes is not None

    def hand_over(self, adapter: Adapter, weights: Tensor, base_logprob: float) -> SlabHandle:
        """weights: the adapter's of its version, complete. Raises OSError where there is no room for the file."""
        ref = adapter.ref
        # a number of its own: what takes the slab of an earlier publish of this version removes that file, never this one
        name = f"{ref.name}-{ref.lineage}-{ref.version}-{os.getpid()}-{next(self._numbers)}.slab"
        path, adding = self._folder / name, checksum(weights)  # beside the copy into a box
        if self._boxes is not None:
            with self._one_at_a_time:
                self._boxes.put(weights, ref.name, path)
        else:
            write_whole(path, weights.cpu().view(torch.uint8).numpy().tofile)
        return SlabHandle(
            ref=ref,
            nbytes=weights.nbytes,
            dtype=str(weights.dtype).removeprefix("torch."),
            rank=adapter.layout.rank,
            scale=adapter.config.lora.scale,
            modules=adapter.layout.modules,
            canary_logprob=None,  # which is asked for when this is on its way
            base_logprob=base_logprob,
            host=socket.gethostname(),
            path=str(path),
            on_device=self.on_device,
            checksum=int(adding),
        )

    def forget(self, name: str) -> None:
        """The box that nobody has come for is free: its adapter has left."""
        if self._boxes is not None:
            with self._one_at_a_time:
                self._boxes.forget(name)
