"""What of the sampler runs inside vLLM's worker: adapters from memory into the engine, beside running requests.

    slab_receive ──> side thread: broadcast (or bytes) -> check -> scale, cast: a LoRAModel    the engine never waits
    slab_install ──> engine's thread, between two steps: into the stacked buffers              a copy, milliseconds
    slab_remove

vLLM imports this module in the process of its engine alone, before the model is loaded, and mixes `SamplerExtension`
into its worker. Everything that crosses is plain: strings, numbers, bytes, dicts.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from weft.actors.lora import SlabLayout, linear_shapes
from weft.actors.sampler_lora import use_grouped_lora
from weft.transport.broadcast import BroadcastGroup

PENDING, INSTALLED = "pending", "installed"
MAX_WAITING = 64  # slabs on their way over one group
MAX_LINES = 8  # groups kept; a relay keeps fewer, and never comes back to an epoch that it has left


def _end_with_parent() -> None:
    """Kill this process when its parent dies, however it dies: an engine without its sampler serves nobody and holds memory.

    vLLM sees to it only when the parent exits in order. The sentinel is the end of a pipe that the parent holds open.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="weft-parent", daemon=True).start()


_end_with_parent()
use_grouped_lora()


class _Line:
    """One broadcast group and the thread that receives over it, in the order of asking. A fault ends it and what waits."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._link = BroadcastGroup(**group)
        self._jobs: queue.Queue[tuple[torch.Tensor, Future[torch.Tensor]] | None] = queue.Queue(MAX_WAITING)
        self.broken: BaseException | None = None
        threading.Thread(target=self._serve, name=f"weft-{group['epoch']}", daemon=True).start()

    def receive(self, raw: torch.Tensor) -> Future[torch.Tensor]:
        """The next broadcast fills `raw` (uint8). Raises queue.Full when too many wait."""
        done: Future[torch.Tensor] = Future()
        self._jobs.put_nowait((raw, done))
        return done

    def close(self) -> None:
        """Leave the group; what still waits for it fails."""
        self._link.close()
        self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            raw, done = job
            try:
                self._link.broadcast(raw)
            except Exception as error:  # noqa: BLE001 whatever it is, the waiting install reports it; the group is lost
                self._link.close()
                self.broken = error
                done.set_exception(error)
            else:
                done.set_result(raw)


class SamplerExtension:
    """Mixed into vLLM's worker, which `self` is. State is made on first use: the worker's constructor knows nothing of it."""

    @cached_property
    def weft_arrivals(self) -> dict[str, Future[dict[str, LoRALayerWeights]]]:
        return {}

    @cached_property
    def weft_lines(self) -> dict[str, _Line]:
        return {}

    @cached_property
    def weft_shapes(self) -> dict[str, tuple[int, int]]:
        config = Path(self.model_config.model) / "config.json"  # type: ignore[attr-defined]
        return linear_shapes(json.loads(config.read_text()))

    @property
    def weft_manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]

    def slab_receive(self, key: str, slab: dict[str, Any], group: dict[str, Any] | None, data: bytes | None) -> None:
        """Expect the slab `key`; returns at once. slab: nbytes, dtype, rank, scale, modules. group: BroadcastGroup's arguments.
        data: the bytes themselves, and then there is no broadcast.

        Raises ValueError for a slab that cannot fit this engine.
        """
        layout = self._layout(key, slab)
        arrival: Future[dict[str, LoRALayerWeights]] = Future()
        if data is not None:
            received: Future[torch.Tensor] = Future()
            received.set_result(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        else:
            assert group is not None, "either bytes or a group"
            received = self._line(group).receive(self._buffer(slab["nbytes"], group["backend"]))
        self.weft_arrivals[key] = arrival

        def prepare() -> None:
            try:
                arrival.set_result(self._weights(key, slab, layout, received.result()))
            except Exception as error:  # noqa: BLE001 the waiting install reports it
                arrival.set_exception(error)

        threading.Thread(target=prepare, name=f"weft-{key}", daemon=True).start()

    def slab_install(self, key: str, lora_id: int) -> str:
        """Put a received slab into the engine under `lora_id`: INSTALLED, or PENDING while it is on its way. Never waits.

        Raises what went wrong on the way, or KeyError if nothing was announced.
        """
        if key not in self.weft_arrivals:
            raise KeyError(f"{key}: no slab of this name was announced")
        if not self.weft_arrivals[key].done():
            return PENDING
        loras = self.weft_arrivals.pop(key).result()
        manager = self.weft_manager
        if len(manager) >= manager.lora_slots:  # vLLM would evict the oldest, which a rollout may be using
            raise RuntimeError(f"{key}: all {manager.lora_slots} places of the engine are taken")
        rank = max(weights.rank for weights in loras.values())
        manager.add_adapter(LoRAModel(lora_id, rank, loras))
        manager.activate_adapter(lora_id)
        return INSTALLED

    def slab_discard(self, prefix: str) -> None:
        """Forget announced slabs that are not installed: of the key `prefix`, and of all below it (name/lineage/version)."""
        for key in [key for key in self.weft_arrivals if f"{key}/".startswith(f"{prefix}/")]:
            del self.weft_arrivals[key]

    def slab_remove(self, lora_id: int) -> None:
        """Free the place of `lora_id`. The caller knows that no request names it any more."""
        self.weft_manager.remove_adapter(lora_id)

    def slab_statistics(self) -> dict[str, Any]:
        """pid of this process, and the ids that the engine holds."""
        return {"pid": os.getpid(), "lora_ids": sorted(self.weft_manager.list_adapters())}

    def _line(self, group: dict[str, Any]) -> _Line:
        lines = self.weft_lines
        line = lines.pop(group["epoch"], None)
        if line is None or line.broken is not None:
            line = _Line(group)
        lines[group["epoch"]] = line  # the last is the one used last
        broken = [epoch for epoch, held in lines.items() if held.broken is not None]
        for epoch in broken + [epoch for epoch in lines if epoch not in broken][:-MAX_LINES]:
            lines.pop(epoch).close()
        return line

    def _buffer(self, nbytes: int, backend: str) -> torch.Tensor:
        device = self.device if backend == "nccl" else "cpu"  # type: ignore[attr-defined]
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def _layout(self, key: str, slab: dict[str, Any]) -> SlabLayout:
        """The layout of a slab, once it is known to fit the model and the engine."""
        layout = SlabLayout.build(self.weft_shapes, slab["modules"], slab["rank"])
        itemsize = getattr(torch, slab["dtype"]).itemsize
        if layout.numel * itemsize != slab["nbytes"]:
            raise ValueError(
                f"{key}: {slab['nbytes']} bytes, but these modules at rank {slab['rank']} take {layout.numel * itemsize}"
            )
        limit = self.lora_config.max_lora_rank  # type: ignore[attr-defined]
        if slab["rank"] > limit:
            raise ValueError(f"{key}: rank {slab['rank']} is above the engine's max_lora_rank {limit}")
        manager = self.weft_manager
        known = set(manager.modules).union(*manager.packed_modules.values())
        strangers = [name for name in layout.modules if name not in known]  # vLLM would leave them out in silence
        if strangers:
            raise ValueError(f"{key}: the engine applies no LoRA to {strangers[0]!r}")
        return layout

    def _weights(self, key: str, slab: dict[str, Any], layout: SlabLayout, raw: torch.Tensor) -> dict[str, LoRALayerWeights]:
        """vLLM's weights of one slab, the scale folded into B here and nowhere else (scaling=1 tells vLLM so)."""
        if raw.is_cuda:
            stream = torch.cuda.Stream(raw.device)  # type: ignore[no-untyped-call]  # not behind the engine's own work
            with torch.cuda.stream(stream):
                loras = self._split(key, slab, layout, raw)
            stream.synchronize()
            return loras
        return self._split(key, slab, layout, raw)

    def _split(self, key: str, slab: dict[str, Any], layout: SlabLayout, raw: torch.Tensor) -> dict[str, LoRALayerWeights]:
        flat = raw.view(getattr(torch, slab["dtype"]))
        if not torch.isfinite(flat).all():
            raise ValueError(f"{key}: not every weight is finite")
        dtype, rank, scale = self.lora_config.lora_dtype, slab["rank"], slab["scale"]  # type: ignore[attr-defined]
        return {
            name: LoRALayerWeights(name, rank, rank, a.to(dtype, copy=True), (b.float() * scale).to(dtype), scaling=1)
            for name, (a, b) in layout.views(flat).items()
        }
