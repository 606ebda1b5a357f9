"""The trainer: weights, gradients and moments of many adapters on one frozen base, behind messages.

    handle(message) ──> one thread, in the order of arrival ──> learner (compute), adapter_store (tiers), files
                  `──> GetStatistics is answered at once

What concerns one adapter alone (a stale batch, a loss that is not finite) comes back as the fault of its StepResult, and the
others' step is taken.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.actors.adapter_store import AdapterStore
from weft.actors.launch import check_batch
from weft.actors.learner import Adapter, Learner
from weft.actors.lora import SlabLayout, init_pairs, linear_shapes, resolve_targets
from weft.actors.model import load_model, read_config
from weft.actors.peft_folder import read_peft_folder, write_peft_folder
from weft.configs.build import build
from weft.configs.schema import AdapterConfig, TrainerConfig
from weft.transport import messages
from weft.transport.errors import CheckpointError
from weft.transport.messages import UNSAMPLED, AdapterRef, StepResult, TrainBatch

STATE_FILE = "adapter.safetensors"  # what Save writes: master, exp_avg, exp_avg_sq fp32 [D], and in its header the rest


class Trainer:
    """One process's part of the trainer pool. `start` before the first message, `aclose` after the last."""

    def __init__(
        self, model_folder: str, model_dtype: str, config: TrainerConfig, folder: str, slab_folder: str, device: str = "cpu"
    ) -> None:
        """folder: of the store's disk tier, this trainer's own; emptied at the start. slab_folder: where published slabs are
        written, best in shared memory; whoever takes a slab removes its file."""
        self._model_folder, self._dtype = Path(model_folder), getattr(torch, model_dtype)
        self._config = config
        self._folder, self._slab_folder = Path(folder), Path(slab_folder)
        self._device = torch.device(device)
        self._store = AdapterStore(
            self._device, self._dtype, config.device_adapters, config.host_adapters, self._folder / "adapters"
        )
        threads = functools.partial(torch.set_num_threads, config.num_threads)  # a setting of the thread that computes
        self._thread = ThreadPoolExecutor(1, "weft-trainer", initializer=threads)
        self._adapters: dict[str, Adapter] = {}
        self._shapes = linear_shapes(read_config(self._model_folder))
        self._slabs_written = self._steps = self._tokens_trained = 0
        self._busy_seconds = 0.0
        self._calls: dict[type, Callable[[Any], Any]] = {
            messages.AddAdapter: self._add,
            messages.DropAdapter: self._drop,
            messages.TrainStep: self._train_step,
            messages.ForwardBackward: self._forward_backward,
            messages.OptimStep: self._optim_step,
            messages.Score: self._score,
            messages.Publish: self._publish,
            messages.Save: self._save,
            messages.Load: self._load,
            messages.Export: self._export,
        }

    async def start(self) -> None:
        """Load the base. Raises ValueError for a folder that holds no model."""
        await self._compute(self._load_base, None)

    async def handle(self, message: Any) -> Any:
        """The reply that the message's docstring names. Raises ValueError for an adapter that is unknown or cannot be."""
        if isinstance(message, messages.GetStatistics):
            return self._statistics()
        assert type(message) in self._calls, f"no message to a trainer: {type(message).__name__}"
        return await self._compute(self._calls[type(message)], message)

    async def aclose(self) -> None:
        """Ends after what is being computed; the disk tier is removed."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        shutil.rmtree(self._folder / "adapters", ignore_errors=True)

    async def _compute(self, call: Callable[[Any], Any], message: Any) -> Any:
        def timed() -> Any:
            began = time.perf_counter()
            try:
                return call(message)
            finally:
                self._busy_seconds += time.perf_counter() - began

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)

    def _load_base(self, _: None) -> None:
        shutil.rmtree(self._folder / "adapters", ignore_errors=True)  # of a trainer that was killed
        decoder = load_model(self._model_folder, self._dtype, self._device)
        self._learner = Learner(decoder, self._store, self._device, self._config.token_budget)
        self._vocab_size = decoder.head.shape[0]

    def _statistics(self) -> messages.TrainerStatistics:
        tiers = self._store.statistics()
        adapters = {"device": tiers.device, "host": tiers.host, "disk": tiers.disk}
        return messages.TrainerStatistics(os.getpid(), adapters, self._steps, self._tokens_trained, self._busy_seconds)

    # ---- an adapter's life ----

    def _add(self, message: messages.AddAdapter) -> messages.AdapterAdded:
        config = build(AdapterConfig, message.config)
        present = self._adapters.get(config.name)
        if present is not None and present.ref.lineage == message.lineage:
            if present.config != config:
                raise ValueError(f"adapter {config.name!r} is here with other settings: drop it, or give it a new lineage")
            return messages.AdapterAdded(num_parameters=present.layout.numel)
        lora = config.lora
        modules = resolve_targets(self._shapes, lora.target_modules, lora.exclude_modules)
        layout = SlabLayout.build(self._shapes, modules, lora.rank)
        if lora.warm_start is not None:
            master = read_peft_folder(Path(lora.warm_start), layout, lora.alpha)
        else:
            master = torch.empty(layout.numel)
            init_pairs(layout, master, torch.Generator().manual_seed(_seed(config)))
        if present is not None:
            self._store.drop(config.name)
        self._store.add(config.name, master)
        self._adapters[config.name] = Adapter(config, AdapterRef(config.name, message.lineage, 0), layout)
        return messages.AdapterAdded(num_parameters=layout.numel)

    def _drop(self, message: messages.DropAdapter) -> messages.Done:
        if self._adapters.pop(message.name, None) is not None:
            self._store.drop(message.name)
        return messages.Done()

    def _find(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise ValueError(f"adapter {name!r} is not in this trainer, which has {sorted(self._adapters)}")
        return self._adapters[name]

    def _at(self, ref: AdapterRef) -> Adapter:
        adapter = self._find(ref.name)
        assert adapter.ref == ref, f"{ref} is asked for, the trainer has {adapter.ref}"
        return adapter

    # ---- training ----

    def _train_step(self, message: messages.TrainStep) -> messages.StepResults:
        return self._launches(message.batches, step=True)

    def _forward_backward(self, message: messages.ForwardBackward) -> messages.StepResults:
        return self._launches(message.batches, step=False)

    def _launches(self, batches: Sequence[TrainBatch], step: bool) -> messages.StepResults:
        """Those refused have a fault; the others go through together, as many at once as the device tier holds."""
        began = time.perf_counter()
        names = [batch.ref.name for batch in batches]
        assert len(set(names)) == len(names), f"two batches of one adapter in a step: {names}"
        faults = {batch.ref.name: self._refusal(batch) for batch in batches}
        results = {batch.ref.name: StepResult(batch.ref, 0, {}, faults[batch.ref.name]) for batch in batches}
        ready = [batch for batch in batches if not faults[batch.ref.name]]
        at_once = self._store.device_capacity
        for first in range(0, len(ready), at_once):
            some = ready[first : first + at_once]
            adapters = [self._adapters[batch.ref.name] for batch in some]
            for adapter, batch, metrics in zip(adapters, some, self._learner.forward_backward(adapters, some), strict=True):
                self._tokens_trained += len(batch.tokens)
                result = StepResult(adapter.ref, len(batch.tokens), metrics, adapter.fault)
                if step:
                    stepped = self._step(adapter)
                    result = replace(stepped, tokens=result.tokens, metrics={**metrics, **stepped.metrics})
                results[adapter.name] = result
        return messages.StepResults(tuple(results[name] for name in names), time.perf_counter() - began)

    def _optim_step(self, message: messages.OptimStep) -> messages.StepResults:
        began = time.perf_counter()
        results = tuple(self._step(self._find(name)) for name in message.names)
        return messages.StepResults(results, time.perf_counter() - began)

    def _step(self, adapter: Adapter) -> StepResult:
        """One optimizer step. A fault belongs to the gradient, which is gone now: the next one starts afresh."""
        metrics = self._learner.optim_step(adapter)
        fault, adapter.fault = adapter.fault, ""
        self._steps += not fault
        return StepResult(adapter.ref, 0, metrics, fault)

    def _refusal(self, batch: TrainBatch) -> str:
        """Why this batch must not train its adapter: empty if it may."""
        adapter = self._adapters.get(batch.ref.name)
        if adapter is None:
            return f"adapter {batch.ref.name!r} is not in this trainer"
        if adapter.ref != batch.ref:
            return f"a batch for {batch.ref}, the trainer has {adapter.ref}"
        try:
            check_batch(batch, self._vocab_size)
        except ValueError as error:
            return str(error)
        sampled = batch.versions[batch.mask & (batch.versions != UNSAMPLED)]
        oldest, bound = (int(sampled.min()) if len(sampled) else batch.ref.version), adapter.config.max_staleness
        if batch.ref.version - oldest > bound:
            return f"a token of version {oldest} in a batch for {batch.ref}: staler than max_staleness={bound}"
        return ""

    def _score(self, message: messages.Score) -> messages.Scores:
        adapter = self._at(message.batch.ref)
        check_batch(message.batch, self._vocab_size)
        return self._learner.score(adapter, message.batch)

    # ---- weights out and in ----

    def _publish(self, message: messages.Publish) -> messages.SlabHandle:
        adapter = self._at(message.ref)
        self._slabs_written += 1
        ref = message.ref
        # a number of its own: what takes the slab of an earlier publish of this version removes that file, never this one
        path = self._slab_folder / f"{ref.name}-{ref.lineage}-{ref.version}-{os.getpid()}-{self._slabs_written}.slab"
        with self._store.hold([ref.name]) as (slabs,):
            canary = self._learner.canary(adapter, slabs)
            raw = slabs.weights.cpu().view(torch.uint8).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        raw.tofile(part)
        part.replace(path)
        return messages.SlabHandle(
            ref=ref,
            nbytes=raw.nbytes,
            dtype=str(self._dtype).removeprefix("torch."),
            rank=adapter.layout.rank,
            scale=adapter.config.lora.scale,
            modules=adapter.layout.modules,
            canary_logprob=canary,
            base_logprob=self._learner.base_canary,
            host=socket.gethostname(),
            path=str(path),
        )

    def _save(self, message: messages.Save) -> messages.Saved:
        adapter = self._at(message.ref)
        with self._store.hold([adapter.name]) as (slabs,):
            tensors = {"master": slabs.master, "exp_avg": slabs.exp_avg, "exp_avg_sq": slabs.exp_avg_sq}
            tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        folder = Path(message.folder)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{STATE_FILE}"
        header = {**_identity(adapter, adapter.ref), "seed": _seed(adapter.config)}
        save_file(tensors, part, metadata={"weft": json.dumps(header)})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        part.replace(folder / STATE_FILE)
        return messages.Saved({STATE_FILE: checksum})

    def _load(self, message: messages.Load) -> messages.Done:
        """Raises CheckpointError for a file that is not whole, ValueError for one of another adapter, shape or version."""
        adapter = self._find(message.ref.name)
        path = Path(message.folder) / STATE_FILE
        state, identity = _read_state(path)
        for key, own in _identity(adapter, message.ref).items():
            if identity.get(key) != own:
                raise ValueError(f"checkpoint {path}: {key}={identity.get(key)!r} there, {own!r} here")
        with self._store.hold([adapter.name]) as (slabs,):
            slabs.replace_state(state)
        adapter.ref, adapter.fault = message.ref, ""
        return messages.Done()

    def _export(self, message: messages.Export) -> messages.Done:
        adapter = self._at(message.ref)
        with self._store.hold([adapter.name]) as (slabs,):
            base = str(self._model_folder.resolve())
            write_peft_folder(Path(message.folder), adapter.layout, slabs.master, adapter.config.lora.alpha, base)
        return messages.Done()


def _seed(config: AdapterConfig) -> int:
    """Of an adapter's first weights: the same for every lineage, machine and run. Nothing is drawn later."""
    return int.from_bytes(hashlib.sha256(f"{config.name}/{config.sampling.seed}".encode()).digest()[:7])


def _identity(adapter: Adapter, ref: AdapterRef) -> dict[str, Any]:
    """What a checkpoint must agree on to be loaded as `ref`."""
    return {"version": ref.version, "rank": adapter.layout.rank, "modules": list(adapter.layout.modules)}


def _read_state(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """-> fp32 [3, D], and the header."""
    try:
        with safe_open(path, framework="pt") as file:
            state = torch.stack([file.get_tensor(name) for name in ("master", "exp_avg", "exp_avg_sq")])
            return state, json.loads((file.metadata() or {})["weft"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is cut short or altered: {error}") from error
