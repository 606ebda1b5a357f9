"""From the configuration to running pools: which class each process runs, with what, and who keeps it alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from weft.actors import heap
from weft.actors.affinity import Affinity, engine_places
from weft.actors.member import Connect, Member, Process, together
from weft.actors.preflight import max_lora_rank, model_folder
from weft.actors.sampler_pool import SamplerPool
from weft.actors.sync_pool import ParamSyncPool
from weft.actors.trainer_pool import TrainerPool
from weft.configs.schema import Config
from weft.transport.channel import Client

SAMPLER = "weft.actors.sampler.Sampler"
TRAINER = "weft.actors.trainer.Trainer"
PARAM_SYNC = "weft.actors.param_sync.ParamSync"


class Starter(Protocol):
    """cluster.Cluster, as far as the pools need it."""

    async def start(
        self,
        name: str,
        target: str,
        arguments: Mapping[str, Any],
        gpus: float = 0,
        environment: Mapping[str, str] | None = None,
    ) -> Process: ...


@dataclass(frozen=True)
class RunningPools:
    """All three, each kept alive by tasks of `open_pools`."""

    samplers: SamplerPool
    trainers: TrainerPool
    sync: ParamSyncPool
    members: Sequence[Member] = ()  # of them all

    async def wait_ready(self, tell: Callable[[str], None] = lambda name: None) -> None:
        """Returns when every process of every pool takes requests. tell: is called with the name of each that does."""

        async def tell_of(member: Member) -> None:
            await member.wait_ready()
            tell(member.name)

        await together(*(tell_of(member) for member in self.members))
        for pool in (self.trainers, self.sync, self.samplers):
            await pool.wait_ready()
        heap.freeze()


@asynccontextmanager
async def open_pools(
    config: Config, starter: Starter, shared_folder: str, connect: Connect = Client
) -> AsyncIterator[RunningPools]:
    """The pools of `config`, starting; their processes end with the block.

    A process that cannot be kept alive ends the block with an ExceptionGroup of StartError or PeerDiedError.
    """
    cluster = config.cluster
    threads = {"OMP_NUM_THREADS": str(cluster.trainer.num_threads)}
    sockets = {"VLLM_RPC_BASE_PATH": shared_folder}  # which vLLM leaves behind: they go with the folder

    def member(name: str, target: str, arguments: Mapping[str, Any], gpus: float, environment: Mapping[str, str]) -> Member:
        return Member(name, partial(starter.start, name, target, arguments, gpus, environment), connect)

    trainers = [
        member(f"trainer-{index}", TRAINER, trainer_arguments(config, index, shared_folder), cluster.gpus_per_trainer, threads)
        for index in range(cluster.trainers)
    ]
    samplers = [
        member(f"sampler-{index}", SAMPLER, sampler_arguments(config, index), cluster.gpus_per_sampler, sockets)
        for index in range(cluster.samplers)
    ]
    records = {"TORCH_FR_BUFFER_SIZE": "0"}  # which torch keeps of past collectives, and nobody reads
    relay = member("param-sync", PARAM_SYNC, param_sync_arguments(config), 0, records)
    trainer_pool = TrainerPool(trainers, cluster.start_deadline_s, shared_folder, cluster.sync.backend)
    clock = asyncio.get_running_loop().time
    affinity = Affinity(cluster.samplers, cluster.sampler.max_num_seqs, *version_places(config), clock)
    sync_pool = ParamSyncPool(relay, trainer_pool, affinity, cluster.sync.deadline_s, cluster.tensor_parallel)
    sampler_pool = SamplerPool(samplers, sync_pool, affinity, cluster.start_deadline_s)
    pools: list[tuple[_Pool, list[Member]]] = [(sampler_pool, samplers), (trainer_pool, trainers), (sync_pool, [relay])]
    async with asyncio.TaskGroup() as tasks:
        kept = [
            tasks.create_task(member.keep(partial(pool.prepare, member), partial(pool.lost, member)))
            for pool, members in pools
            for member in members
        ]
        try:
            yield RunningPools(sampler_pool, trainer_pool, sync_pool, [*trainers, relay, *samplers])
        finally:
            heap.thaw()  # the process may live on, and open others
            for task in kept:
                task.cancel()


class _Pool(Protocol):
    async def prepare(self, member: Member) -> None: ...

    async def lost(self, member: Member) -> None: ...


def version_places(config: Config) -> tuple[int, int]:
    """Places for versions in each engine, fixed when it starts, and how many of them are to spare (affinity.py)."""
    return engine_places([adapter.live_versions for adapter in config.adapters], config.cluster.samplers)


def sampler_arguments(config: Config, index: int) -> dict[str, Any]:
    """Of weft.actors.sampler.Sampler."""
    sampler = config.cluster.sampler
    return {
        "model_folder": model_folder(config.model),
        "model_dtype": config.model.tensors,
        "config": sampler,
        "index": index,
        "device": "cuda" if config.cluster.gpus_per_sampler else "cpu",
        "max_lora_rank": max_lora_rank(config),
        "max_live_versions": version_places(config)[0],
        "tensor_parallel": config.cluster.tensor_parallel,
        "largest_group": max(adapter.group_size for adapter in config.adapters),
    }


def trainer_arguments(config: Config, index: int, shared_folder: str) -> dict[str, Any]:
    """Of weft.actors.trainer.Trainer."""
    return {
        "model_folder": model_folder(config.model),
        "model_dtype": config.model.tensors,
        "config": config.cluster.trainer,
        "base_precision": config.model.base_precision,
        "folder": str(Path(config.run.dir).absolute() / "trainers" / str(index)),
        "slab_folder": shared_folder,
        "device": "cuda" if config.cluster.gpus_per_trainer else "cpu",
        "shares_device": config.cluster.sync.backend != "gloo",
        "ranks": sorted({adapter.lora.rank for adapter in config.adapters}),
    }


def param_sync_arguments(config: Config) -> dict[str, Any]:
    """Of weft.actors.param_sync.ParamSync."""
    return {"config": config.cluster.sync}
