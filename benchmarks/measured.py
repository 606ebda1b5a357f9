"""The actors of param_sync.py: weft's own, which note when things happen (time.monotonic, one clock for all of a machine).

Each takes Save as "write your notes into this folder". The sampler takes Load as "have vLLM load this PEFT folder by itself",
the trainer takes one of nobody's as "hold so many adapters on the device".
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.actors.param_sync import ParamSync
from weft.actors.sampler import Sampler
from weft.actors.trainer import Trainer
from weft.transport.messages import (
    AskCanary,
    Distribute,
    Done,
    Install,
    Load,
    OptimStep,
    Publish,
    Receive,
    Save,
    Saved,
    TrainStep,
)

GAPS_FILE, NOTES_FILE, IDS_FILE = "gaps.npy", "notes.json", "ids.json"
NUMBERED = re.compile(r"a-(\d+)")  # the adapters of param_sync.py
THEIR_ID = 1_000_000  # of the adapter that vLLM loads itself: none of ours
Notes = dict[str, dict[str, float]]  # by version's name: when each hop was passed
CANARIES = ("canary_trainer", "canary_sampler", "canary_base")  # log-probabilities, among the notes of a version


class _Noting:
    """Notes of one process."""

    def __init__(self) -> None:
        self.notes: Notes = {}

    def note(self, ref: object, hop: str) -> None:
        self.notes.setdefault(str(ref), {})[hop] = time.monotonic()

    def write(self, folder: str) -> Saved:
        (Path(folder) / NOTES_FILE).write_text(json.dumps(self.notes))
        self.notes = {}
        return Saved({})


class MeasuredTrainer(Trainer):
    """optimized: the optimizer's kernels have run; stepped: the reply of the step goes out; handed: the slab is in its box;
    scored: its canary is known. And that canary, and the base's."""

    async def start(self) -> None:
        await super().start()
        self._noting = _Noting()
        optimize = self._learner.optim_steps

        def optim_steps(adapters: Sequence[Any]) -> Any:
            metrics = optimize(adapters)
            for adapter in adapters:
                self._noting.note(adapter.ref, "optimized")
            return metrics

        self._learner.optim_steps = optim_steps  # type: ignore[method-assign]

    async def handle(self, message: Any) -> Any:
        match message:
            case Save(ref, folder) if not ref.name:
                return self._noting.write(folder)
            case Load(ref, adapters) if not ref.name:
                return await asyncio.get_running_loop().run_in_executor(self._state, self._hold_on_device, int(adapters))
            case Publish(ref):
                self._noting.note(ref, "publish_began")
                handle = await super().handle(message)
                self._noting.note(ref, "handed")
                self._noting.notes[str(ref)]["canary_base"] = handle.base_logprob
                return handle
            case AskCanary(ref):
                canary = await super().handle(message)
                self._noting.note(ref, "scored")
                self._noting.notes[str(ref)]["canary_trainer"] = canary.logprob
                return canary
            case TrainStep() | OptimStep():
                results = await super().handle(message)
                for result in results.results:
                    self._noting.note(result.ref, "stepped")
                    if result.slab is not None:  # it is in its box, and nobody asks for it
                        for hop in ("publish_began", "handed"):
                            self._noting.note(result.ref, hop)
                        self._noting.notes[str(result.ref)]["canary_base"] = result.slab.base_logprob
                return results
        return await super().handle(message)

    def _hold_on_device(self, adapters: int) -> Saved:
        """0: none now, and one when it trains. Says the bytes that have moved since the start."""
        store = self._store
        with store._moving:
            store.device_capacity = adapters
            store._trim_device()
            store.device_capacity = max(adapters, 1)
        moved = store.statistics()
        return Saved({"bytes_up": str(moved.bytes_up), "bytes_down": str(moved.bytes_down)})


class MeasuredParamSync(ParamSync):
    """asked: Distribute is here; taken: the relay's copy of the slab is complete; distributed: installed everywhere."""

    async def start(self) -> None:
        await super().start()
        self._noting = _Noting()
        take = self._taker.take

        def taking(file: Path, nbytes: int) -> Any:
            slab = take(file, nbytes)
            name, lineage, version = file.name.rsplit("-", 4)[:3]
            self._noting.note(f"{name}/{lineage}/{version}", "taken")
            return slab

        self._taker.take = taking  # type: ignore[method-assign]

    async def handle(self, message: Any) -> Any:
        match message:
            case Save(_, folder):
                return self._noting.write(folder)
            case Distribute(handle):
                self._noting.note(handle.ref, "asked")
                done = await super().handle(message)
                self._noting.note(handle.ref, "distributed")
                return done
        return await super().handle(message)


class MeasuredSampler(Sampler):
    """heard: Receive is here; told, came, live: the worker's; install_began, applied: vLLM knows it; offered: its canary is
    right. And when tokens come, and each version's canary here."""

    async def start(self) -> None:
        await super().start()
        self._noting = _Noting()
        self._gaps: list[tuple[float, float, int]] = []  # when, seconds since the token before, the adapter's number
        theirs = self._engine._llm.generate

        async def generate(prompt: Any, params: Any, request_id: str, lora_request: Any = None) -> AsyncIterator[Any]:
            number = NUMBERED.fullmatch(lora_request.lora_name.split("/")[0])
            if params.max_tokens == 1 or number is None:  # a canary, or another benchmark's
                async for output in theirs(prompt, params, request_id, lora_request=lora_request):
                    yield output
                return
            from vllm.sampling_params import RequestOutputKind

            params.output_kind = RequestOutputKind.CUMULATIVE
            last, newest = 0.0, None
            async for output in theirs(prompt, params, request_id, lora_request=lora_request):
                now, newest = time.monotonic(), output
                if last:
                    self._gaps.append((now, now - last, int(number[1])))
                last = now
            yield newest

        self._engine._llm.generate = generate
        score = self._engine.score

        async def noting(tokens: Sequence[int], version: Any) -> float:
            found = await score(tokens, version)
            self._noting.notes.setdefault(str(version.ref), {})["canary_sampler"] = found
            return found

        self._engine.score = noting  # type: ignore[method-assign]

    async def _check_canary(self, version: Any, announced: Any) -> None:
        self._noting.note(version.ref, "applied")  # whether it is audited or not
        await super()._check_canary(version, announced)

    async def handle(self, message: object) -> object:
        match message:
            case Save(_, folder):
                np.save(Path(folder) / GAPS_FILE, np.array(self._gaps))
                self._gaps.clear()
                for key, times in (await self._engine.call("slab_statistics"))["times"].items():
                    if key in self._noting.notes:
                        self._noting.notes[key] |= dict(zip(("told", "came", "live"), times, strict=True))
                return self._noting.write(folder)
            case Load(_, folder):
                from vllm.lora.request import LoRARequest

                request = LoRARequest("theirs", THEIR_ID, folder)
                request.load_inplace = True
                await self._engine._llm.add_lora(request)
                return Done()
            case Receive(handle):
                self._noting.note(handle.ref, "heard")
            case Install(ref):
                self._noting.note(ref, "install_began")
                done = await super().handle(message)
                self._noting.note(ref, "offered")
                return done
        return await super().handle(message)


class TellingSampler(Sampler):
    """Says which ids its engine holds, when it is asked to save."""

    async def handle(self, message: object) -> object:
        if isinstance(message, Save):
            ids = (await self._engine.call("slab_statistics"))["lora_ids"]
            (Path(message.folder) / IDS_FILE).write_text(json.dumps(ids))
            return Saved({})
        return await super().handle(message)
