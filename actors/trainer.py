"""The trainer: weights, gradients and moments of many adapters on one frozen base, behind messages.

    handle(message) ──> thread of training: TrainStep, TrainShare, ForwardBackward, OptimStep, Score
                  |──> thread of canaries: AskCanary (canaries.py)
                  |──> thread of state: Publish, Load, DropAdapter
                  |──> threads of files: AddAdapter, Save, Export
                  `──> GetStatistics is answered at once

So one adapter's new version is on its way while others train, are made or are written: a publish takes milliseconds, all else
may take seconds. Each adapter's lock lets one thread at it, and who asks waits for one answer before the next.
What concerns one adapter alone (a stale batch, a loss that is not finite) comes back as the fault of its StepResult, and the
others' step is taken.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.actors.adapter_store import AdapterStore
from weft.actors.blame import blamed_on
from weft.actors.canaries import Canaries, Found
from weft.actors.launch import check_batch
from weft.actors.learner import Adapter, Learner
from weft.actors.lora import SlabLayout, init_pairs, linear_shapes, resolve_targets
from weft.actors.model import load_model, read_config
from weft.actors.outgoing import Outgoing
from weft.actors.peft_folder import read_peft_folder, write_peft_folder
from weft.actors.shared_step import SharedSteps
from weft.actors.slab_ipc import Boxes
from weft.actors.trainer_state import first_seed, identity, read_state, write_state
from weft.actors.warm_up import WarmUp, keep_freed_memory
from weft.configs.build import build
from weft.configs.schema import AdapterConfig, TrainerConfig
from weft.transport import messages
from weft.transport.errors import VersionError
from weft.transport.messages import UNSAMPLED, AdapterRef, StepResult, TrainBatch

SWITCH_S = 5e-4  # after which a thread that launches lets one that publishes have its turn
WITH_STEP = 2  # adapters of a launch whose slabs come with its results: of many each would wait for all, and take a box
FILES = 8  # adapters made or written at once, each with a copy of its state in memory


@dataclass(eq=False)
class _Making:
    """An adapter that is being made, and whether it has been dropped meanwhile."""

    name: str
    dropped: bool = False


class Trainer:
    """One process's part of the trainer pool. `start` before the first message, `aclose` after the last."""

    def __init__(
        self,
        model_folder: str,
        model_dtype: str,
        config: TrainerConfig,
        folder: str,
        slab_folder: str,
        device: str = "cpu",
        base_precision: str = "full",
        shares_device: bool = False,
        ranks: Collection[int] = (),
    ) -> None:
        """folder: of the store's disk tier, this trainer's own; emptied at the start. slab_folder: where published slabs are
        written, best in shared memory; whoever takes a slab removes its file. shares_device: slabs stay on the GPU, and the
        file says where. ranks: that are known to come; what they need compiled is compiled at the start."""
        self._model_folder, self._dtype = Path(model_folder), getattr(torch, model_dtype)
        self._base_precision, self._config = base_precision, config
        self._folder = Path(folder)
        self._device = torch.device(device)
        self._store = AdapterStore(
            self._device, self._dtype, config.device_adapters, config.host_adapters, self._folder / "adapters"
        )
        threads = functools.partial(torch.set_num_threads, config.num_threads)  # a setting of the thread that computes
        self._training = ThreadPoolExecutor(1, "weft-training", initializer=threads)
        self._state = ThreadPoolExecutor(1, "weft-state", initializer=functools.partial(_own_stream, self._device))
        self._files = ThreadPoolExecutor(FILES, "weft-files", initializer=functools.partial(_own_stream, self._device))
        self._canaries = Canaries(self._canaries_of, functools.partial(_own_stream, self._device))
        self._adapters: dict[str, Adapter] = {}
        self._making, self._registering = list[_Making](), threading.Lock()
        self._shared = SharedSteps(self._store)
        self._outgoing = Outgoing(Path(slab_folder), Boxes(self._device) if shares_device else None)
        self._ranks = ranks
        self._shapes = linear_shapes(read_config(self._model_folder))
        self._warm_up: WarmUp | None = None
        self._steps = self._tokens_trained = 0
        self._busy_seconds = 0.0
        training: dict[type, Callable[[Any], Any]] = {
            messages.TrainStep: self._train_step,
            messages.TrainShare: self._train_share,
            messages.ForwardBackward: self._forward_backward,
            messages.OptimStep: self._optim_step,
            messages.Score: self._score,
        }
        state: dict[type, Callable[[Any], Any]] = {
            messages.DropAdapter: self._drop,
            messages.Publish: self._publish,
            messages.Load: self._load,
        }
        files: dict[type, Callable[[Any], Any]] = {
            messages.AddAdapter: self._add,
            messages.Save: self._save,
            messages.Export: self._export,
        }
        self._calls = {kind: (self._training, call) for kind, call in training.items()}
        self._calls |= {kind: (self._state, call) for kind, call in state.items()}
        self._calls |= {kind: (self._files, call) for kind, call in files.items()}

    async def start(self) -> None:
        """Load the base. Raises ValueError for a folder that holds no model, and for a device that has no FP8 products."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._training, self._load_base)
        await loop.run_in_executor(self._canaries.thread, self._learner.score_base)  # a thread's first products take long

    async def handle(self, message: Any) -> Any:
        """The reply that the message's docstring names. Raises ValueError for an adapter that is unknown, AdapterFault for one
        whose weights cannot be made."""
        if isinstance(message, messages.GetStatistics):
            return self._statistics()
        if isinstance(message, messages.EndShare):
            self._shared.end(message.epoch)
            return messages.Done()
        if isinstance(message, messages.AskCanary):
            return await self._canaries.ask(message)
        assert type(message) in self._calls, f"no message to a trainer: {type(message).__name__}"
        if isinstance(message, messages.DropAdapter):
            for making in self._making:
                making.dropped |= making.name == message.name
        loop, (thread, call) = asyncio.get_running_loop(), self._calls[type(message)]
        if isinstance(message, messages.AddAdapter):
            if self._warm_up is not None and self._warm_up.lacks(ranks := [build(AdapterConfig, message.config).lora.rank]):
                await loop.run_in_executor(self._training, self._warm_up.run, ranks)
            self._making.append(making := _Making(str(message.config["name"])))
            try:
                return await loop.run_in_executor(thread, self._add, message, making)
            except asyncio.CancelledError:
                making.dropped = True  # whoever asked has given up
                raise
            finally:
                self._making.remove(making)
        with self._canaries.handing_over() if isinstance(message, messages.Publish) else nullcontext():
            return await loop.run_in_executor(thread, call, message)

    async def aclose(self) -> None:
        """Ends after what is being computed; the disk tier is removed."""
        for thread in (self._training, self._state, self._files, self._canaries.thread):
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)
        shutil.rmtree(self._folder / "adapters", ignore_errors=True)

    def _load_base(self) -> None:
        if self._device.type == "cpu":
            keep_freed_memory()
        shutil.rmtree(self._folder / "adapters", ignore_errors=True)  # of a trainer that was killed
        decoder = load_model(self._model_folder, self._dtype, self._device)
        decoder.use_fp8(self._base_precision == "fp8")
        self._learner = Learner(decoder, self._store, self._device, self._config.token_budget)
        self._vocab_size = decoder.head.shape[0]
        if self._device.type == "cuda":  # nothing else is compiled, nor launched by Python while another thread publishes
            sys.setswitchinterval(SWITCH_S)
            self._warm_up = WarmUp(self._learner, self._store, self._shapes, self._dtype.itemsize)
            self._warm_up.run(self._ranks)

    def _statistics(self) -> messages.TrainerStatistics:
        tiers = self._store.statistics()
        adapters = {"device": tiers.device, "host": tiers.host, "disk": tiers.disk}
        return messages.TrainerStatistics(os.getpid(), adapters, self._steps, self._tokens_trained, self._busy_seconds)

    # ---- an adapter's life ----

    def _add(self, message: messages.AddAdapter, making: _Making) -> messages.AdapterAdded:
        config = build(AdapterConfig, message.config)
        present = self._adapters.get(config.name)
        if present is not None and present.ref.lineage == message.lineage:
            if present.config != config:
                raise ValueError(f"adapter {config.name!r} is here with other settings: drop it, or give it a new lineage")
            return messages.AdapterAdded()
        with blamed_on(config.name, "making its weights"):
            layout, master = self._first_weights(config)
            self._drop(messages.DropAdapter(config.name))
            self._store.add(config.name, master)  # where there is no room for it, it alone is refused
        with self._registering:
            if not making.dropped:
                self._adapters[config.name] = Adapter(config, AdapterRef(config.name, message.lineage, 0), layout)
                return messages.AdapterAdded()
        self._store.drop(config.name)
        raise ValueError(f"adapter {config.name!r} was dropped while it was made")

    def _first_weights(self, config: AdapterConfig) -> tuple[SlabLayout, Tensor]:
        """Its layout, and the masters of version 0: fp32 [D]. Raises ValueError for targets or a warm start that cannot be."""
        lora = config.lora
        modules = resolve_targets(self._shapes, lora.target_modules, lora.exclude_modules)
        layout = SlabLayout.build(self._shapes, modules, lora.rank)
        if lora.warm_start is not None:
            return layout, read_peft_folder(Path(lora.warm_start), layout, lora.alpha)
        master = torch.empty(layout.numel)
        init_pairs(layout, master, torch.Generator().manual_seed(first_seed(config)))
        return layout, master

    def _drop(self, message: messages.DropAdapter) -> messages.Done:
        with self._registering:  # one that is not here yet knows by now that it is dropped
            here = message.name in self._adapters
        if here:
            with self._locked([message.name]):
                del self._adapters[message.name]
                self._store.drop(message.name)
                self._outgoing.forget(message.name)
        return messages.Done()

    @contextmanager
    def _locked(self, names: Collection[str]) -> Iterator[None]:
        """Those of these adapters that are here, for this thread alone until the block ends."""
        with ExitStack() as stack:
            for name in sorted(set(names)):  # one order everywhere, so that no two threads wait for each other
                while (adapter := self._adapters.get(name)) is not None:
                    adapter.lock.acquire()
                    if self._adapters.get(name) is adapter:
                        stack.callback(adapter.lock.release)
                        break
                    adapter.lock.release()  # dropped, perhaps replaced, while we waited
            yield

    @contextmanager
    def _own(self, name: str) -> Iterator[Adapter]:
        """This adapter, for this thread alone until the block ends. Raises ValueError when it is not here."""
        with self._locked([name]):
            if name not in self._adapters:
                raise ValueError(f"adapter {name!r} is not in this trainer, which has {sorted(self._adapters)}")
            yield self._adapters[name]

    @contextmanager
    def _own_version(self, ref: AdapterRef) -> Iterator[Adapter]:
        with self._own(ref.name) as adapter:
            if adapter.ref != ref:
                raise VersionError(f"{ref} is asked for, the trainer has {adapter.ref}")
            yield adapter

    # ---- training ----

    def _train_step(self, message: messages.TrainStep) -> messages.StepResults:
        return self._launches(message.batches, step=True)

    def _forward_backward(self, message: messages.ForwardBackward) -> messages.StepResults:
        return self._launches(message.batches, step=False)

    def _train_share(self, message: messages.TrainShare) -> messages.StepResults:
        began, batch = time.perf_counter(), message.batch
        with self._locked([batch.ref.name]):
            adapter, refusal = self._adapters.get(batch.ref.name), self._refusal(batch)
            result = self._shared.step(message, adapter, refusal, self._learner, self._step)
        self._tokens_trained += result.tokens
        self._busy_seconds += time.perf_counter() - began
        return messages.StepResults((result,), time.perf_counter() - began)

    def _launches(self, batches: Sequence[TrainBatch], step: bool) -> messages.StepResults:
        """Those refused have a fault; the others go through together, as many at once as the device tier holds."""
        began = time.perf_counter()
        names = [batch.ref.name for batch in batches]
        assert len(set(names)) == len(names), f"two batches of one adapter in a step: {names}"
        with self._locked(names):
            faults = {batch.ref.name: self._refusal(batch) for batch in batches}
            results = {batch.ref.name: StepResult(batch.ref, 0, {}, faults[batch.ref.name]) for batch in batches}
            ready = [batch for batch in batches if not faults[batch.ref.name]]
            at_once = self._store.device_capacity
            for first in range(0, len(ready), at_once):
                results |= {result.ref.name: result for result in self._launch(ready[first : first + at_once], step)}
        seconds = time.perf_counter() - began
        self._busy_seconds += seconds
        return messages.StepResults(tuple(results[name] for name in names), seconds)

    def _launch(self, batches: Sequence[TrainBatch], step: bool) -> Iterator[StepResult]:
        adapters = [self._adapters[batch.ref.name] for batch in batches]
        all_metrics = self._learner.forward_backward(adapters, batches)
        held = [StepResult(adapter.ref, 0, {}, adapter.fault) for adapter in adapters]
        for batch, metrics, result in zip(batches, all_metrics, self._step(adapters) if step else held, strict=True):
            tokens = len(batch.tokens)
            self._tokens_trained += tokens
            slab = self._slab_of(result) if step and len(adapters) <= WITH_STEP else None
            yield replace(result, tokens=tokens, metrics={**metrics, **result.metrics}, slab=slab)

    def _slab_of(self, result: StepResult) -> messages.SlabHandle | None:
        """Where it costs no more than a copy on the GPU. None else, and where it cannot be: who asks for it is told why."""
        if not result.fault and self._outgoing.on_device:
            with suppress(OSError, RuntimeError), self._store.hold([result.ref.name]) as (slabs,):
                return self._outgoing.hand_over(self._adapters[result.ref.name], slabs.weights, self._learner.base_canary)
        return None

    def _optim_step(self, message: messages.OptimStep) -> messages.StepResults:
        began = time.perf_counter()
        results = []
        for name in message.names:
            with self._own(name) as adapter:
                results += self._step([adapter])
        seconds = time.perf_counter() - began
        self._busy_seconds += seconds
        return messages.StepResults(tuple(results), seconds)

    def _step(self, adapters: Sequence[Adapter]) -> list[StepResult]:
        """One optimizer step of each. A fault belongs to the gradient, which is gone now: the next one starts afresh."""
        results = list[StepResult]()
        for adapter, metrics in zip(adapters, self._learner.optim_steps(adapters), strict=True):
            fault, adapter.fault = adapter.fault, ""
            self._steps += not fault
            results.append(StepResult(adapter.ref, 0, metrics, fault))
        return results

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
        check_batch(message.batch, self._vocab_size)
        with self._own_version(message.batch.ref) as adapter:
            return self._learner.score(adapter, message.batch)

    # ---- weights out and in ----

    def _publish(self, message: messages.Publish) -> messages.SlabHandle:
        with self._own_version(message.ref) as adapter, self._store.hold([adapter.name]) as (slabs,):
            return self._outgoing.hand_over(adapter, slabs.weights, self._learner.base_canary)

    def _canaries_of(self, asked: Sequence[messages.AskCanary]) -> dict[messages.AskCanary, Found]:
        """By one forward, but for their noise. Of a version that is not here any more: why there is none."""
        with self._locked([one.ref.name for one in asked]):
            here = {name: self._adapters[name] for name in {one.ref.name for one in asked} & self._adapters.keys()}
            found: dict[messages.AskCanary, Found] = {
                one: VersionError(f"{one.ref} is not here any more: no canary")
                for one in asked
                if one.ref.name not in here or here[one.ref.name].ref != one.ref
            }
            logprobs = self._learner.canaries(list(here.values()))
            for one in (one for one in asked if one not in found):
                noise = self._learner.canary_noise(here[one.ref.name]) if one.closely else 0.0
                found[one] = messages.Canary(one.ref, logprobs[one.ref.name], noise)
        return found

    def _save(self, message: messages.Save) -> messages.Saved:
        with self._own_version(message.ref) as adapter, self._store.hold([adapter.name]) as (slabs,):
            state = slabs.state.cpu().clone()
        header = {**identity(adapter.layout, message.ref), "seed": first_seed(adapter.config)}
        return messages.Saved(write_state(Path(message.folder), state, header))

    def _load(self, message: messages.Load) -> messages.Done:
        """Raises CheckpointError for a file that is not whole, ValueError for one of another shape or version."""
        with self._own(message.ref.name) as adapter:
            state, written = read_state(Path(message.folder))
            for key, own in identity(adapter.layout, message.ref).items():
                if written.get(key) != own:
                    raise ValueError(f"checkpoint {message.folder}: {key}={written.get(key)!r} there, {own!r} here")
            with self._store.hold([adapter.name]) as (slabs,):
                slabs.replace_state(state)
                if self._device.type == "cuda":  # what trains next is on another stream
                    torch.cuda.current_stream(self._device).synchronize()
            adapter.ref, adapter.fault = message.ref, ""
        return messages.Done()

    def _export(self, message: messages.Export) -> messages.Done:
        with self._own_version(message.ref) as adapter, self._store.hold([adapter.name]) as (slabs,):
            master = slabs.master.cpu().clone()
        base = str(self._model_folder.resolve())
        write_peft_folder(Path(message.folder), adapter.layout, master, adapter.config.lora.alpha, base)
        return messages.Done()


def _own_stream(device: torch.device) -> None:
    """Of a thread beside training: on a GPU what it does passes by the launch that computes. What it reads is done: training
    lets go of an adapter only after the device has finished with it, and so does who brings it there."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))
