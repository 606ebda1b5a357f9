"""What a relay does where NCCL forms no group: samplers in this process, gloo, and a group that never meets in NCCL's place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from weft.actors import fan_out
from weft.actors.fan_out import FanOut, Peer
from weft.configs.schema import SyncConfig
from weft.transport import memory, messages
from weft.transport.broadcast import BroadcastGroup
from weft.transport.errors import RendezvousError
from weft.transport.messages import AdapterRef, Done, SlabHandle

SLAB = torch.arange(200, dtype=torch.uint8)
HANDLE = SlabHandle(AdapterRef("a", 0, 1), len(SLAB), "float32", 1, 1.0, (), 0.0, 0.0)


class Unmet:
    """A group over NCCL that nobody else comes to."""

    def __init__(self, store: str, epoch: str, rank: int, world_size: int, backend: str, deadline_s: float) -> None:
        self._said = f"group {epoch} did not form in {deadline_s} s: ranks [0] of {world_size} came"

    def broadcast(self, tensor: torch.Tensor) -> None:
        raise RendezvousError(self._said)

    def close(self) -> None:
        """Nothing to leave."""


class PlainSampler:
    """Takes part in what is broadcast over gloo, and keeps it."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.backends: list[str] = []
        self.installed: torch.Tensor | None = None
        self._tasks = tasks
        self._coming: asyncio.Task[torch.Tensor] | None = None

    async def handle(self, message: object) -> object:
        match message:
            case messages.Receive(backend=backend):
                self.backends.append(backend)
                if backend == "gloo":
                    self._coming = self._tasks.create_task(asyncio.to_thread(self._receive, message))
            case messages.Install():
                assert self._coming is not None
                self.installed = await self._coming
        return Done()

    def _receive(self, message: messages.Receive) -> torch.Tensor:
        slab = torch.empty(message.handle.nbytes, dtype=torch.uint8)
        link = BroadcastGroup(message.store, message.epoch, message.rank, message.world_size, message.backend, 20.0)
        link.broadcast(slab)
        link.close()
        return slab


@pytest.fixture
def nccl_that_never_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    def group(store: str, epoch: str, rank: int, world_size: int, backend: str, deadline_s: float) -> Any:
        kind = Unmet if backend == "nccl" else BroadcastGroup
        return kind(store, epoch, rank, world_size, backend, deadline_s)

    monkeypatch.setattr(fan_out, "check_backend", lambda backend: None)  # there is no GPU here
    monkeypatch.setattr(fan_out, "BroadcastGroup", group)
    monkeypatch.setattr(FanOut, "_placed", lambda self, slab: slab)


def run(backend: str, law: Callable[[FanOut, Peer, PlainSampler], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            sampler = PlainSampler(tasks)
            server = memory.Server(sampler.handle)
            endpoint = await server.start()
            serving = tasks.create_task(server.serve())
            client = memory.Client(endpoint)
            fan = FanOut(SyncConfig(backend=backend, deadline_s=20.0), "127.0.0.1")
            try:
                await law(fan, Peer(0, endpoint, client), sampler)
            finally:
                fan.dissolve()
                await client.aclose()
                await server.aclose()
                serving.cancel()

    asyncio.run(bounded())


@pytest.mark.usefixtures("nccl_that_never_forms")
def test_where_it_is_allowed_the_slab_goes_through_the_host_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def law(fan: FanOut, peer: Peer, sampler: PlainSampler) -> None:
        await fan.send(HANDLE, lambda: SLAB, [peer])
        assert sampler.installed is not None and torch.equal(sampler.installed, SLAB)
        assert sampler.backends == ["nccl", "gloo"]  # the first has taken a whole deadline
        assert fan.backend == "gloo"
        assert "through the host (gloo) from now on" in fan.notice

    with caplog.at_level(logging.WARNING):
        run("nccl-or-gloo", law)
    assert "through the host (gloo) from now on" in caplog.text
    assert "ranks [0] of 2 came" in caplog.text


@pytest.mark.usefixtures("nccl_that_never_forms")
def test_where_it_is_not_allowed_the_sync_fails_and_says_which_ranks_came() -> None:
    async def law(fan: FanOut, peer: Peer, sampler: PlainSampler) -> None:
        with pytest.raises(RendezvousError, match=r"ranks \[0\] of 2 came"):
            await fan.send(HANDLE, lambda: SLAB, [peer])
        assert sampler.backends == ["nccl"] * fan_out.ROUNDS
        assert sampler.installed is None

    run("nccl", law)
