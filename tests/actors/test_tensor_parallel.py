"""An engine split over two workers, real vLLM on this CPU, against the trainer; the parts of any split against vLLM's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from weft.actors.base_model import tiny_path
from weft.actors.sampler import Sampler
from weft.actors.shards import part_of
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig, EnvironmentConfig, LoraConfig, SamplerConfig, SamplingConfig
from weft.kernels.pack import Places, pair_targets, scatter_slab
from weft.transport import messages
from weft.transport.broadcast import BroadcastGroup, RendezvousStore
from weft.transport.errors import InstallError
from weft.transport.messages import AdapterRef, Group, SlabHandle, TrainBatch

WORKERS = 2
PATIENT_S = 200.0  # of what a quiet machine does within a second


@pytest.fixture
def one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM's own choice leaves no core for the second worker


class Both:
    """A trainer on the base that ships, and a sampler of two workers."""

    def __init__(self, bench: Any, sampler: Sampler) -> None:
        self.bench, self.sampler = bench, sampler

    def slab(self, ref: AdapterRef) -> SlabHandle:
        handle: SlabHandle = self.bench.ask(messages.Publish(ref))
        canary, path = self.bench.ask(messages.AskCanary(ref)), Path(handle.path)
        return replace(handle, path="", host="", data=np.fromfile(path, np.uint8), canary_logprob=canary.logprob)

    def check(self, group: Group) -> None:
        """Every token has the trainer's log-probability under the version that sampled it."""
        for sample in group.samples:
            length, mask = len(sample.tokens), sample.versions >= 0
            assert mask.any()
            batch = TrainBatch(
                group.ref, sample.tokens, np.array([0, length], np.int32), mask, sample.logprobs, sample.versions,
                np.ones(1, np.float32), np.zeros(1, np.int32), int(mask.sum()), 1,
            )  # fmt: skip
            scores = self.bench.ask(messages.Score(batch))
            assert np.abs(scores.logprobs - sample.logprobs)[mask].max() < 1e-3
            assert np.abs(scores.base_logprobs - sample.logprobs)[mask].max() > 1e-2, "it is not the base that samples"


def test_an_adapter_in_an_engine_of_two_workers_samples_with_the_trainers_log_probabilities(
    one_core_each: None, tmp_path: Path, trainer_bench: Callable[..., Any]
) -> None:
    config = AdapterConfig(
        "a",
        max_staleness=2,
        environment=EnvironmentConfig("calculator", {}),
        lora=LoraConfig(rank=8, alpha=16, exclude_modules=("down_proj",)),  # the last worker has the last rows
        sampling=SamplingConfig(max_tokens=16),
    )
    bench = trainer_bench(Path(tiny_path()), tmp_path, [config])
    bench.perturb("a")
    ref = AdapterRef("a", 0, 0)

    async def law() -> None:
        settings = SamplerConfig(max_num_seqs=16, max_model_len=256, kv_cache_gib=0.25)
        sampler = Sampler(tiny_path(), "float32", settings, 0, "cpu", 8, 3, tensor_parallel=WORKERS)
        await sampler.start()
        try:
            await sampler.handle(messages.AddAdapter(to_mapping(config)))
            both = Both(bench, sampler)
            wrong = await asyncio.to_thread(both.slab, ref)
            await sampler.handle(messages.Receive(replace(wrong, canary_logprob=-1.0), "", "", 1, 1, "gloo", PATIENT_S))
            with pytest.raises(InstallError, match="canary"):
                await sampler.handle(messages.Install(ref))
            await broadcast(sampler, await asyncio.to_thread(both.slab, ref))
            await sampler.handle(messages.Install(ref))  # which checks the canary
            group = await sampler.handle(messages.Rollout(ref, 0, 4))
            await asyncio.to_thread(both.check, group)
            await sampler.handle(messages.DropAdapter("a"))
            for found in await sampler._engine.call_each("slab_statistics"):
                assert found["lora_ids"] == []
        finally:
            await sampler.aclose()

    asyncio.run(law())


async def broadcast(sampler: Sampler, handle: SlabHandle) -> None:
    """As a relay does: to every worker, each a member of the group."""
    assert handle.data is not None
    store = RendezvousStore("127.0.0.1")
    link = BroadcastGroup(store.address, "test", 0, 1 + WORKERS, "gloo", PATIENT_S)
    sending = threading.Thread(target=link.broadcast, args=(torch.from_numpy(handle.data.copy()),))
    sending.start()
    receive = messages.Receive(replace(handle, data=None), store.address, "test", 1, 1 + WORKERS, "gloo", PATIENT_S)
    await sampler.handle(receive)
    await asyncio.to_thread(sending.join)
    link.close()


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_each_worker_gets_the_part_that_vllm_would_give_it_and_together_they_have_all(workers: int) -> None:
    from vllm.lora.layers import (
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
    )

    rank, slots, hidden, units, heads, key_value, width = 4, 2, 16, 48, 8, 2, 4
    replicas = max(1, workers // key_value)
    kinds: list[tuple[type, list[int], int]] = [
        (MergedQKVParallelLinearWithLoRA, [heads * width, key_value * width, key_value * width], hidden),
        (MergedColumnParallelLinearWithLoRA, [units, units], hidden),
        (RowParallelLinearWithLoRA, [hidden], units),
    ]
    for kind, outputs, inputs in kinds:
        pairs = [(torch.randn(rank, inputs), torch.randn(out, rank)) for out in outputs]
        slab = torch.cat([matrix.flatten() for pair in pairs for matrix in pair])
        whole = [torch.zeros_like(b) for _, b in pairs]
        for worker in range(workers):
            shards = (worker, worker // replicas, worker // replicas) if len(outputs) == 3 else (worker,) * len(outputs)
            row_parallel = kind is RowParallelLinearWithLoRA
            divisors = (workers, *[workers // replicas] * 2) if len(outputs) == 3 else (workers,) * len(outputs)
            sizes = outputs if row_parallel else [out // divisor for out, divisor in zip(outputs, divisors, strict=True)]
            layer: Any = SimpleNamespace(
                tp_rank=worker, output_slices=sizes, n_slices=len(outputs), input_size=inputs // workers
            )
            if not row_parallel:
                layer.output_ids = shards
            width_in = inputs // workers if row_parallel else inputs
            a_stacks = [torch.full((slots, rank, width_in), float("nan")) for _ in outputs]
            b_stacks = [torch.full((slots, size, rank), float("nan")) for size in sizes]
            targets, offset = [], 0
            for index, (a, b) in enumerate(zip(a_stacks, b_stacks, strict=True)):
                column, row = part_of(layer, index, a, b, inputs, outputs[index])
                targets += pair_targets(a, b, offset, rank, inputs, column, row)
                offset += rank * (inputs + outputs[index])
            scatter_slab(slab, Places(tuple(targets)), 1, 1.0)
            theirs_a: Any = [a for a, _ in pairs]
            theirs_b: Any = [b for _, b in pairs]
            if row_parallel:
                theirs_a = [kind.slice_lora_a(layer, theirs_a[0])]  # type: ignore[attr-defined]
            else:
                theirs_b = kind.slice_lora_b(layer, theirs_b)  # type: ignore[attr-defined]
            for mine, theirs in zip((*a_stacks, *b_stacks), (*theirs_a, *theirs_b), strict=True):
                assert torch.equal(mine[1], theirs)
            for index, b in enumerate(b_stacks):
                start = 0 if row_parallel else shards[index] * sizes[index]
                whole[index][start : start + sizes[index]] = b[1]
        assert all(torch.equal(found, b) for found, (_, b) in zip(whole, pairs, strict=True))
