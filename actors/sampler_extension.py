"""What of the sampler runs inside vLLM's worker: adapters from memory into the engine, beside running requests.

    slab_receive ──> a free slot of vLLM's stacked buffers is claimed
                     side thread: broadcast (or bytes) ──> kernels.pack into the slot ──> live    the engine never waits
                                  ──> what came is what was sent, and what stands in the slot is what was packed
    slab_install ──> known to vLLM by its id, as it is before the first step that names it
    slab_prove   ──> whether what stands in the slot is still that
    slab_remove  ──> the slot is free

vLLM imports this module in the process of its engine alone, before the model is loaded, and mixes `SamplerExtension`
into its worker. Everything that crosses is plain: strings, numbers, bytes, dicts. A slot that is being filled is no running
request's, so steps and copies do not disturb each other; vLLM's own tables are touched by the engine's thread alone.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel

from weft.actors.checksum import checksum
from weft.actors.lora import SlabLayout, linear_shapes
from weft.actors.sampler_lora import use_grouped_lora
from weft.actors.shards import part_of
from weft.actors.slab_line import Line
from weft.kernels.pack import Places, pair_targets, scatter_slab, sum_slot

PENDING, INSTALLED = "pending", "installed"
MAX_FORMS = 64  # layouts whose places are kept; an adapter has one
MAX_TIMES = 64  # arrivals whose time is kept
MAX_LINES = 16  # groups kept; a relay keeps no more, and never comes back to an epoch that it has left


def _end_with_parent() -> None:
    """Kill this process when its sampler dies, however it dies: an engine without it serves nobody and holds memory.

    vLLM sees to it only when the parent exits in order. The sentinel is the end of a pipe that the parent holds open. Where a
    model is split, the parent is the engine's own process, the sampler's child, which loads nothing of ours: it is ended too.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ends: list[Any] = [parent.sentinel]
    if parent.name != "MainProcess":
        sampler = int(Path(f"/proc/{parent.pid}/stat").read_text().rpartition(")")[2].split()[1])
        ends.append(os.pidfd_open(sampler))

    def watch() -> None:
        if parent.sentinel not in multiprocessing.connection.wait(ends):
            os.kill(parent.pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="weft-parent", daemon=True).start()


_end_with_parent()
use_grouped_lora()


@dataclass
class _Form:
    """What slabs of one layout have in common. places: of every linear of the engine, those too that the layout leaves out."""

    layout: SlabLayout
    places: Places


@dataclass
class _Arrival:
    """One slab on its way to `slot`, which it has until it is discarded or its id is removed. None: none was free; then `raw`
    (uint8) waits for the install."""

    lora_id: int
    form: _Form
    dtype: torch.dtype
    scale: float
    slot: int | None
    checksum: int  # 0: not known
    raw: torch.Tensor | None = None
    packed: int = 0  # the sum over its slot (kernels.pack.sum_slot) as it was filled
    discarded: bool = False
    told: float = field(default_factory=time.monotonic)
    came: float = 0.0
    settled: Future[None] = field(default_factory=Future)


class SamplerExtension:
    """Mixed into vLLM's worker, which `self` is. State is made on first use: the worker's constructor knows nothing of it."""

    @cached_property
    def weft_arrivals(self) -> dict[str, _Arrival]:
        return {}

    @cached_property
    def weft_lines(self) -> dict[str, Line]:
        return {}

    @cached_property
    def weft_forms(self) -> dict[tuple[tuple[str, ...], int], _Form]:
        return {}

    @cached_property
    def weft_times(self) -> deque[tuple[str, tuple[float, float, float]]]:
        """time.monotonic when a slab was announced, had come, and was live."""
        return deque(maxlen=MAX_TIMES)

    @cached_property
    def weft_live(self) -> deque[_Arrival]:
        """In their slots, and not yet known to vLLM."""
        return deque()

    @cached_property
    def weft_proofs(self) -> dict[int, _Arrival]:
        """Those that vLLM knows, by id."""
        return {}

    @cached_property
    def weft_filling(self) -> threading.Lock:
        """Held while a slot is filled."""
        return threading.Lock()

    @cached_property
    def weft_shapes(self) -> dict[str, tuple[int, int]]:
        config = Path(self.model_config.model) / "config.json"  # type: ignore[attr-defined]
        return linear_shapes(json.loads(config.read_text()))

    @cached_property
    def weft_manager(self) -> Any:
        """vLLM's manager of adapters, which from now on learns of those that are live before each step that names adapters."""
        worker_manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        manager, theirs = worker_manager._adapter_manager, worker_manager._apply_adapters

        def apply(requests: set[Any]) -> None:
            self._register()
            strangers = {one for one in requests if one and one.lora_int_id not in manager._registered_adapters}
            if strangers:
                theirs(strangers)

        worker_manager._apply_adapters = apply
        return manager

    def slab_receive(
        self, key: str, slab: dict[str, Any], group: dict[str, Any] | None, data: bytes | None, lora_id: int, sequence: int
    ) -> None:
        """Expect the slab `key`, which will be adapter `lora_id`; returns at once. slab: fields of its SlabHandle.
        group: BroadcastGroup's arguments, of which broadcast number `sequence` brings it. data: the bytes themselves, and then
        there is no broadcast.

        Raises ValueError for a slab that cannot fit this engine.
        """
        form = self._form(key, slab)
        self._forget(key)
        arrival = _Arrival(lora_id, form, getattr(torch, slab["dtype"]), slab["scale"], self._claim(lora_id), slab["checksum"])
        self.weft_arrivals[key] = arrival

        def settle(came: torch.Tensor | BaseException) -> None:
            try:
                if isinstance(came, BaseException):
                    raise came
                self._settle(key, arrival, came)
                arrival.settled.set_result(None)
            except Exception as error:  # noqa: BLE001 the waiting install reports it
                arrival.settled.set_exception(error)

        if data is not None:
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            threading.Thread(target=settle, args=(raw,), name=f"weft-{key}", daemon=True).start()
        else:
            assert group is not None, "either bytes or a group"
            self._line(group).receive(sequence, slab["nbytes"], settle)

    def slab_install(self, key: str, lora_id: int) -> str:
        """Have vLLM know a received slab as `lora_id`: INSTALLED, or PENDING while it is on its way. Never waits.

        Raises what went wrong on the way, or KeyError if nothing was announced.
        """
        if key not in self.weft_arrivals:
            if lora_id in self.weft_manager._registered_adapters:  # asked again, since another worker was behind
                return INSTALLED
            raise KeyError(f"{key}: no slab of this name was announced")
        arrival = self.weft_arrivals[key]
        assert arrival.lora_id == lora_id, f"{key} was announced as {arrival.lora_id}, not {lora_id}"
        if not arrival.settled.done():
            return PENDING
        del self.weft_arrivals[key]
        try:
            arrival.settled.result()
            if arrival.slot is None:
                arrival.slot = self._claim(lora_id)
                if arrival.slot is None:  # vLLM would evict the oldest, which a rollout may be using
                    raise RuntimeError(f"{key}: all {self.weft_manager.lora_slots} places of the engine are taken")
                assert arrival.raw is not None
                self._settle(key, arrival, arrival.raw)
        except BaseException:
            self._register()  # it may have been live before it was found wrong
            self.weft_manager.remove_adapter(lora_id)
            self._free(lora_id)
            raise
        self._register()
        self.weft_proofs[lora_id] = arrival
        return INSTALLED

    def slab_prove(self, lora_id: int) -> str:
        """Why the weights in the slot of this installed adapter are not those that were packed into it; nothing if they are."""
        arrival = self.weft_proofs[lora_id]
        assert arrival.slot is not None
        if self.weft_manager.lora_index_to_id[arrival.slot] != lora_id:
            return f"its slot {arrival.slot} has become that of {self.weft_manager.lora_index_to_id[arrival.slot]}"
        with torch.cuda.stream(self.weft_stream if arrival.form.places.first.is_cuda else None):
            stands = int(sum_slot(arrival.form.places, arrival.slot))
        return "" if stands == arrival.packed else f"its slot {arrival.slot} has been written to since"

    def slab_discard(self, prefix: str) -> None:
        """Forget announced slabs that are not installed: of the key `prefix`, and of all below it (name/lineage/version)."""
        for key in [key for key in self.weft_arrivals if f"{key}/".startswith(f"{prefix}/")]:
            self._forget(key)

    def slab_remove(self, lora_id: int) -> None:
        """Free the place of `lora_id`, whose slab may be on its way yet. The caller knows that no request names it any more."""
        for key in [key for key, arrival in self.weft_arrivals.items() if arrival.lora_id == lora_id]:
            self._forget(key)  # or it would be filled in when another one has the place
        self._register()
        self.weft_manager.remove_adapter(lora_id)
        self._free(lora_id)
        self.weft_proofs.pop(lora_id, None)

    def slab_statistics(self) -> dict[str, Any]:
        """pid of this process, the ids that the engine holds, and when the last slabs were announced, had come, were live."""
        self._register()
        return {
            "pid": os.getpid(),
            "lora_ids": sorted(self.weft_manager.list_adapters()),
            "times": dict(self.weft_times),
        }

    # ---- slots: the engine's thread ----

    def _claim(self, lora_id: int) -> int | None:
        """A free slot, which is `lora_id`'s from now on."""
        index_to_id: list[int | None] = self.weft_manager.lora_index_to_id
        if None not in index_to_id:
            return None
        slot = index_to_id.index(None)
        index_to_id[slot] = lora_id
        return slot

    def _free(self, lora_id: int) -> None:
        index_to_id: list[int | None] = self.weft_manager.lora_index_to_id
        if lora_id in index_to_id:
            index_to_id[index_to_id.index(lora_id)] = None

    def _forget(self, key: str) -> None:
        arrival = self.weft_arrivals.pop(key, None)
        if arrival is not None:
            with self.weft_filling:
                arrival.discarded = True
            self._register()
            self.weft_manager.remove_adapter(arrival.lora_id)
            self._free(arrival.lora_id)

    def _register(self) -> None:
        """Tell vLLM of what is live. Its tables are no other thread's."""
        manager = self.weft_manager
        while self.weft_live:
            arrival = self.weft_live.popleft()
            manager._registered_adapters[arrival.lora_id] = LoRAModel(arrival.lora_id, arrival.form.layout.rank, {})
            manager._active_adapters[arrival.lora_id] = None

    # ---- filling: the thread that received it ----

    def _settle(self, key: str, arrival: _Arrival, raw: torch.Tensor) -> None:
        """Into its slot, if it has one. Raises ValueError when a weight is not finite, or a byte is not what was sent."""
        arrival.came = arrival.came or time.monotonic()
        if arrival.slot is None:
            arrival.raw = raw
            return
        with self.weft_filling:
            if arrival.discarded:
                return
            if fault := self._fill(key, arrival, raw):
                raise ValueError(f"{key}: {fault}")
        arrival.raw = None

    def _fill(self, key: str, arrival: _Arrival, raw: torch.Tensor) -> str:
        """Fill the slot, which is live from then on. Returns why nobody may use it, if so: none does before it is installed."""
        device, places, slot = self.device, arrival.form.places, arrival.slot  # type: ignore[attr-defined]
        assert slot is not None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Not behind the engine's own work. What was received is complete, for its thread has waited (broadcast.py); and the
        # engine's next step, on another stream, begins after this thread has waited for the device below.
        with torch.cuda.stream(self.weft_stream if device.type == "cuda" else None):
            there, sums = raw.to(device, non_blocking=True).view(arrival.dtype), places.sums()
            if scatter_slab(there, places, slot, arrival.scale, sums).item():
                return "not every weight is finite"
            self.weft_times.append((key, (arrival.told, arrival.came, time.monotonic())))
            self.weft_live.append(arrival)
            stands, came = sum_slot(places, slot), checksum(there) if arrival.checksum else None  # after all that read or wrote
            arrival.packed = int(sums.sum())
            if came is not None and int(came) != arrival.checksum:
                return "the bytes that came are not those that the trainer published"
            if int(stands) != arrival.packed:
                return "what stands in the engine's buffers is not what was packed into them"
            return ""

    @cached_property
    def weft_stream(self) -> Any:
        return torch.cuda.Stream(self.device, priority=-1)  # type: ignore[attr-defined, no-untyped-call]

    def _line(self, group: dict[str, Any]) -> Line:
        group = {**group, "rank": group["rank"] + self.rank}  # type: ignore[attr-defined]  # each worker is one of the group
        lines = self.weft_lines
        line = lines.pop(group["epoch"], None)
        if line is None or line.broken is not None:
            stream = self.weft_stream if group["backend"] == "nccl" else None
            line = Line(group, self.device, stream)  # type: ignore[attr-defined]
        lines[group["epoch"]] = line  # the last is the one used last
        broken = [epoch for epoch, held in lines.items() if held.broken is not None]
        for epoch in broken + [epoch for epoch in lines if epoch not in broken][:-MAX_LINES]:
            lines.pop(epoch).close()
        return line

    # ---- layouts ----

    def _form(self, key: str, slab: dict[str, Any]) -> _Form:
        """The form of a slab, once it is known to fit the model and the engine."""
        rank = slab["rank"]
        limit = self.lora_config.max_lora_rank  # type: ignore[attr-defined]
        if rank > limit:
            raise ValueError(f"{key}: rank {rank} is above the engine's max_lora_rank {limit}")
        name = (tuple(slab["modules"]), rank)
        form = self.weft_forms.pop(name, None) or self._new_form(key, *name)
        self.weft_forms[name] = form
        if len(self.weft_forms) > MAX_FORMS:
            del self.weft_forms[next(iter(self.weft_forms))]
        needed = form.layout.numel * getattr(torch, slab["dtype"]).itemsize
        if needed != slab["nbytes"]:
            raise ValueError(f"{key}: {slab['nbytes']} bytes, but these modules at rank {rank} take {needed}")
        return form

    def _new_form(self, key: str, modules: tuple[str, ...], rank: int) -> _Form:
        layout = SlabLayout.build(self.weft_shapes, modules, rank)
        manager = self.weft_manager
        offsets = {entry.name: entry.a_offset for entry in layout.entries}
        targets = []
        for name, module in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            for index, (part, a, b) in enumerate(zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True)):
                outputs, inputs = self.weft_shapes[part]
                column, row = part_of(module, index, a[:, 0], b[:, 0], inputs, outputs)
                targets += pair_targets(a[:, 0], b[:, 0], offsets.pop(part, None), rank, inputs, column, row)
        if offsets:  # vLLM would leave them out in silence
            raise ValueError(f"{key}: the engine applies no LoRA to {next(iter(offsets))!r}")
        return _Form(layout, Places(tuple(targets)))
