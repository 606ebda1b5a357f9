"""What a relay does where NCCL forms no group: samplers in this process, gloo, and a group that never meets in NCCL's place."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from weft.actors import fan_out
from weft.actors.fan_out import FanOut, Peer
from weft.configs.schema import SyncConfig
from weft.transport import memory, messages
from weft.transport.broadcast import BroadcastGroup
from weft.transport.errors import RendezvousError, WeftError
from weft.transport.messages import AdapterRef, Done, SlabHandle

LONG_S = 120.0  # a deadline that nothing here may reach
SLAB = torch.arange(200, dtype=torch.uint8)
HANDLE, OTHER, THIRD = (SlabHandle(AdapterRef(name, 0, 1), len(SLAB), "float32", 1, 1.0, (), 0.0, 0.0) for name in "abc")


class Unmet:
    """A group over NCCL that nobody else comes to."""

    def __init__(self, store: str, epoch: str, rank: int, world_size: int, backend: str, deadline_s: float) -> None:
        self._said = f"group {epoch} did not form in {deadline_s} s: ranks [0] of {world_size} came"

    def broadcast(self, tensor: torch.Tensor) -> None:
        raise RendezvousError(self._said)

    def close(self) -> None:
        """Nothing to leave."""


class PlainSampler:
    """Takes part, over gloo, in what is broadcast over `comes_over`, and keeps it."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.comes_over = {"gloo"}
        self.backends: list[str] = []
        self.installed: torch.Tensor | None = None
        self._tasks = tasks
        self._coming: asyncio.Task[torch.Tensor | None] | None = None
        self._links: dict[str, BroadcastGroup] = {}

    def leave(self) -> None:
        for link in self._links.values():
            link.close()

    async def handle(self, message: object) -> object:
        match message:
            case messages.Receive(backend=backend):
                self.backends.append(backend)
                if backend in self.comes_over:
                    self._coming = self._tasks.create_task(asyncio.to_thread(self._receive, message))
            case messages.Install():
                assert self._coming is not None
                self.installed = await self._coming
        return Done()

    def _receive(self, message: messages.Receive) -> torch.Tensor | None:
        """None when its group has come to nothing."""
        slab = torch.empty(message.handle.nbytes, dtype=torch.uint8)
        group = (message.store, message.epoch, message.rank, message.world_size, "gloo", LONG_S)
        if message.epoch not in self._links:
            self._links[message.epoch] = BroadcastGroup(*group)
        try:
            self._links[message.epoch].broadcast(slab)
        except WeftError:
            return None
        return slab


@pytest.fixture
def nccl_that_never_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    def group(store: str, epoch: str, rank: int, world_size: int, backend: str, deadline_s: float) -> Any:
        kind = Unmet if backend == "nccl" else BroadcastGroup
        return kind(store, epoch, rank, world_size, backend, deadline_s)

    monkeypatch.setattr(fan_out, "check_backend", lambda backend: None)  # there is no GPU here
    monkeypatch.setattr(fan_out, "BroadcastGroup", group)
    monkeypatch.setattr(FanOut, "_placed", lambda self, slab: slab)


def run(backend: str, law: Callable[..., Awaitable[None]], samplers: int = 1) -> None:
    """law: takes the FanOut, then a Peer of each sampler, then each PlainSampler."""

    async def bounded() -> None:
        async with asyncio.timeout(2 * LONG_S), asyncio.TaskGroup() as tasks:
            plain = [PlainSampler(tasks) for _ in range(samplers)]
            servers = [memory.Server(sampler.handle) for sampler in plain]
            endpoints = [await server.start() for server in servers]
            serving = [tasks.create_task(server.serve()) for server in servers]
            peers = [Peer(index, endpoint, memory.Client(endpoint)) for index, endpoint in enumerate(endpoints)]
            fan = FanOut(SyncConfig(backend=backend, deadline_s=LONG_S), "127.0.0.1")
            try:
                await law(fan, *peers, *plain)
            finally:
                fan.dissolve()
                for sampler in plain:
                    sampler.leave()
                for peer, server, task in zip(peers, servers, serving, strict=True):
                    await peer.client.aclose()
                    await server.aclose()
                    task.cancel()

    asyncio.run(bounded())


def test_a_group_that_has_a_slab_under_way_makes_way_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def law(fan: FanOut, one: Peer, other: Peer, first: PlainSampler, second: PlainSampler) -> None:
        asked, may_go = threading.Event(), threading.Event()

        def slab() -> torch.Tensor:
            asked.set()
            assert may_go.wait(LONG_S)
            return SLAB

        await fan.send(HANDLE, lambda: SLAB, [one])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fan.send(OTHER, slab, [one]))
            await asyncio.to_thread(asked.wait, LONG_S)
            sending = tasks.create_task(fan.send(HANDLE, lambda: SLAB, [other]))
            while not second.backends:  # noqa: ASYNC110  until its group is formed, of which the relay tells nobody
                await asyncio.sleep(0)
            may_go.set()
            await sending
        assert (first.backends, second.backends, fan.epoch) == (["gloo"] * 2, ["gloo"], 2)

    monkeypatch.setattr(fan_out, "MAX_GROUPS", 1)
    run("gloo", law, samplers=2)


def test_while_a_group_forms_no_slab_is_announced_in_another() -> None:
    """Who is told of a slab enters its broadcast, ahead of its turn: NCCL could not set the new group up on that card."""

    async def law(fan: FanOut, one: Peer, other: Peer, first: PlainSampler, second: PlainSampler) -> None:
        asked, may_go = threading.Event(), threading.Event()

        def slab() -> torch.Tensor:
            asked.set()
            assert may_go.wait(LONG_S)
            return SLAB

        await fan.send(HANDLE, lambda: SLAB, [one])
        async with asyncio.TaskGroup() as tasks:
            forming = tasks.create_task(fan.send(OTHER, slab, [one, other]))
            await asyncio.to_thread(asked.wait, LONG_S)
            later = tasks.create_task(fan.send(THIRD, lambda: SLAB, [one]))
            while not second.backends:  # noqa: ASYNC110  until it has been told of the new group
                await asyncio.sleep(0)
            await one.client.request(messages.GetStatistics(), LONG_S)  # what went to `first` before has come
            assert first.backends == ["gloo"] * 2  # the first slab, and the new group's
            may_go.set()
            await forming
            await later
        assert (first.backends, second.backends, fan.epoch) == (["gloo"] * 3, ["gloo"], 2)

    run("gloo", law, samplers=2)


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


def test_a_sampler_that_leaves_while_its_group_forms_is_no_fault_of_nccls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is the first to see that the group has ended: what is tried again is tried over NCCL."""
    ended = threading.Event()

    class Formed(BroadcastGroup):
        """A group over gloo in the place of one over NCCL."""

        def __init__(self, store: str, epoch: str, rank: int, world_size: int, backend: str, deadline_s: float) -> None:
            super().__init__(store, epoch, rank, world_size, "gloo", deadline_s)

        def broadcast(self, tensor: torch.Tensor) -> None:
            try:
                super().broadcast(tensor)
            finally:
                ended.set()

    async def law(fan: FanOut, stays: Peer, goes: Peer, here: PlainSampler, gone: PlainSampler) -> None:
        dissolve = fan._store.dissolve

        def dissolved_and_seen(epoch: str) -> None:
            dissolve(epoch)
            assert ended.wait(LONG_S)

        monkeypatch.setattr(fan._store, "dissolve", dissolved_and_seen)
        here.comes_over.add("nccl")
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(fan.send(HANDLE, lambda: SLAB, [stays, goes]))
            came = [f"{fan._run}-1/came/{rank}" for rank in (0, 1)]
            await asyncio.to_thread(fan._store._store.wait, came, timedelta(seconds=LONG_S))
            goes.leave()
            fan.dissolve(lambda peer: peer is goes)
            await sending
        assert here.installed is not None and torch.equal(here.installed, SLAB)
        assert (here.backends, gone.backends) == (["nccl"] * 2, ["nccl"])
        assert fan.backend == "nccl" and not fan.notice

    monkeypatch.setattr(fan_out, "check_backend", lambda backend: None)  # there is no GPU here
    monkeypatch.setattr(fan_out, "BroadcastGroup", Formed)
    monkeypatch.setattr(FanOut, "_placed", lambda self, slab: slab)
    run("nccl-or-gloo", law, samplers=2)


@pytest.mark.usefixtures("nccl_that_never_forms")
def test_where_it_is_not_allowed_the_sync_fails_and_says_which_ranks_came() -> None:
    async def law(fan: FanOut, peer: Peer, sampler: PlainSampler) -> None:
        with pytest.raises(RendezvousError, match=r"ranks \[0\] of 2 came"):
            await fan.send(HANDLE, lambda: SLAB, [peer])
        assert sampler.backends == ["nccl"] * fan_out.ROUNDS
        assert sampler.installed is None

    run("nccl", law)
