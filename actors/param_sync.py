"""The relay: takes one slab from a trainer, sends it to the samplers that need it, answers when all of them have installed it.

    Distribute ──> fan_out.py, which takes the slab (the trainer goes on) ──> every sampler has installed it: it is the newest
               ──> Retire(supersedes) ──> Distributed
    Serve      ──> the newest of one adapter, to a sampler that is to serve it from now on ──> Done;  Withdraw: no more

What it keeps is the newest slab of each adapter, newest being what every serving sampler has acknowledged. Syncs of one adapter
go in order; those of different adapters overlap, except that one slab at a time is broadcast.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weft.actors.fan_out import Client, FanOut, Peer, Times, ask_all
from weft.actors.slab_ipc import Taker
from weft.configs.schema import SyncConfig
from weft.transport import channel
from weft.transport.errors import InstallError, PeerDiedError
from weft.transport.messages import (
    AdapterRef,
    AwaitSent,
    Canary,
    Distribute,
    Distributed,
    Done,
    DropAdapter,
    GetStatistics,
    JoinSampler,
    LeaveSampler,
    Retire,
    Serve,
    SlabHandle,
    SyncStatistics,
    Withdraw,
)

QUIET_S = 0.05  # after which a canary waits for no other slab: somebody's version waits for it
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MMAP_BYTES = 128 << 10
DEVICE_BYTES = 8 << 30  # of slabs that are kept on a GPU, which is a trainer's; more go to the host, those not sent for longest


@dataclass(frozen=True)
class _Held:
    """The newest slab of one adapter: the handle without its place, and the bytes uint8 [nbytes]."""

    handle: SlabHandle
    slab: torch.Tensor

    def give(self) -> torch.Tensor:
        return self.slab


class _Taking:
    """A slab on its way from its trainer: taken when it is first wanted, while the samplers hear of it."""

    def __init__(self, handle: SlabHandle, taker: Taker) -> None:
        self.slab: torch.Tensor | None = None
        self._handle, self._taker = handle, taker
        self._taking = threading.Lock()

    def __call__(self) -> torch.Tensor:
        with self._taking:
            if self.slab is None:
                self.slab = _take(self._handle, self._taker)
            return self.slab


def _return_freed_slabs() -> None:
    """glibc keeps freed blocks of up to 32 MB in its heap once it has seen some; slabs of several sizes leave holes there."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not everywhere
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


@dataclass
class _Way:
    """What is known of a slab while it is distributed."""

    canary: asyncio.Future[Canary] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    times: Times = field(default_factory=Times)


class ParamSync:
    """One relay. `await start()`, then any number of `handle` at once, then `await aclose()`."""

    def __init__(self, config: SyncConfig, connect: Callable[[str], Client] = channel.Client, host: str = "127.0.0.1") -> None:
        """connect: a client of a sampler's endpoint; host: where the rendezvous store listens."""
        self._config = config
        self._connect = connect
        self._host = host
        self._peers: dict[int, Peer] = {}
        self._held: dict[str, _Held] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # by adapter
        self._fan_out: FanOut | None = None
        self._taker = Taker()
        self._ways: dict[AdapterRef, _Way] = {}
        self._distributed = 0

    async def start(self) -> None:
        """Host the rendezvous store. Raises OSError if it cannot be."""
        _return_freed_slabs()
        self._fan_out = FanOut(self._config, self._host)

    async def handle(self, message: Any) -> Any:
        """Raises InstallError (it names the samplers), RendezvousError, ValueError for a message that is not for a relay."""
        match message:
            case Distribute():
                return await self._distribute(message)
            case JoinSampler():
                return await self._join(message)
            case Canary(ref):
                if (way := self._ways.get(ref)) is not None and not way.canary.done():
                    way.canary.set_result(message)
                return Done()
            case AwaitSent(ref):
                return await self._await_sent(ref)
            case Serve():
                return await self._serve(message)
            case Withdraw():
                return await self._withdraw(message)
            case LeaveSampler():
                return await self._leave(message.sampler)
            case DropAdapter():
                return await self._drop(message.name)
            case GetStatistics():
                return self._statistics()
        raise ValueError(f"{type(message).__name__} is no message for a parameter sync")

    async def aclose(self) -> None:
        for sampler in list(self._peers):
            await self._leave(sampler)
        if self._fan_out is not None:
            self._fan_out.dissolve()

    async def _distribute(self, message: Distribute) -> Distributed:
        handle, way = message.handle, _Way()
        self._ways[handle.ref] = way
        if handle.canary_logprob is not None:
            way.canary.set_result(Canary(handle.ref, handle.canary_logprob, handle.canary_noise))
        try:
            return await self._send(message, way)
        finally:
            way.times.sent.set()  # or never
            if self._ways.get(handle.ref) is way:
                del self._ways[handle.ref]

    async def _await_sent(self, ref: AdapterRef) -> Done:
        """Those of others, too, that are on their way now, but not for long."""
        if ref in self._ways:
            await self._ways[ref].times.sent.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIET_S):
                    for way in list(self._ways.values()):
                        await way.times.sent.wait()
        return Done()

    async def _send(self, message: Distribute, way: _Way) -> Distributed:
        started = time.monotonic()
        handle = message.handle
        lock = self._lock(handle.ref.name)
        async with lock:
            taking, told = _Taking(handle, self._taker), replace(handle, host="", path="", on_device=False, data=None)
            # One that has left, or never came, is not waited for: what it misses it gets when it joins.
            peers = [self._peers[sampler] for sampler in sorted(message.samplers) if sampler in self._peers]
            times = await self._fan().send(told, taking, peers, way.canary if handle.audited else None, way.times)
            way.times.sent.set()  # if nobody is left to send it to
            if handle.audited:
                came = await way.canary  # who joins late is told at once
                told = replace(told, canary_logprob=came.logprob, canary_noise=came.noise)
            held = _Held(told, taking.slab if taking.slab is not None else await asyncio.to_thread(taking))
            self._fan().home = self._taker.home or self._fan().home
            self._held.pop(handle.ref.name, None)
            self._held[handle.ref.name] = held  # the last is the one sent last
            await self._trim()
            if message.supersedes is not None and message.supersedes != handle.ref:
                await self._retire(message.supersedes, peers)
        self._distributed += 1
        notice, self._fan().notice = self._fan().notice, ""
        return Distributed(time.monotonic() - started, times.broadcast, times.install, notice)

    async def _trim(self) -> None:
        """Keep DEVICE_BYTES on the GPU at most."""
        there = [(name, held) for name, held in self._held.items() if held.slab.is_cuda]
        excess = sum(held.slab.nbytes for _, held in there) - DEVICE_BYTES
        for name, held in there:
            if excess <= 0:
                return
            excess -= held.slab.nbytes
            host = await asyncio.to_thread(held.slab.cpu)
            if self._held.get(name) is held:
                self._held[name] = replace(held, slab=host)

    async def _retire(self, ref: AdapterRef, peers: list[Peer]) -> None:
        serving = [peer for peer in peers if peer.serving]
        errors = await ask_all(serving, Retire(ref), self._config.deadline_s)
        for peer, error in errors.items():
            if not isinstance(error, PeerDiedError):  # a dead one holds nothing any more
                raise InstallError(f"{peer} did not retire {ref}: {error}") from error

    async def _join(self, message: JoinSampler) -> Done:
        await self._leave(message.sampler)
        peer = Peer(message.sampler, message.endpoint, self._connect(message.endpoint), message.workers)
        self._peers[message.sampler] = peer
        error = await peer.ask(GetStatistics(), self._config.deadline_s)
        if error is not None or not peer.serving:
            if self._peers.get(message.sampler) is peer:
                await self._leave(message.sampler)
            raise InstallError(f"{peer} was lost while it joined: {error}")
        return Done()

    async def _serve(self, message: Serve) -> Done:
        lock = self._lock(message.name)
        async with lock:
            peer, held = self._peers.get(message.sampler), self._held.get(message.name)
            if peer is None or held is None:
                raise InstallError(f"the relay has no {message.name if peer else f'sampler {message.sampler}'}")
            if self._lacks(peer, held):
                await self._fan().send(held.handle, held.give, [peer])
            if not peer.serving:
                raise InstallError(f"{peer} was lost while it was given {held.handle.ref}")
        return Done()

    async def _withdraw(self, message: Withdraw) -> Done:
        lock = self._lock(message.ref.name)
        async with lock:
            peer = self._peers.get(message.sampler)
            if peer is not None:
                peer.installed.pop(message.ref.name, None)
                await self._retire(message.ref, [peer])
        return Done()

    def _lacks(self, peer: Peer, held: _Held) -> bool:
        return peer.installed.get(held.handle.ref.name) != held.handle.ref

    async def _leave(self, sampler: int) -> Done:
        peer = self._peers.pop(sampler, None)
        if peer is not None:
            peer.leave()
            self._fan().dissolve(lambda other: other is peer)
            await peer.client.aclose()
        return Done()

    async def _drop(self, name: str) -> Done:
        lock = self._lock(name)
        async with lock:
            self._held.pop(name, None)
            for peer in self._peers.values():
                peer.installed.pop(name, None)
        return Done()

    def _lock(self, name: str) -> asyncio.Lock:
        """The adapter's lock; it lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _fan(self) -> FanOut:
        assert self._fan_out is not None, "start() comes first"
        return self._fan_out

    def _statistics(self) -> SyncStatistics:
        return SyncStatistics(
            pid=os.getpid(),
            held=tuple(sorted(str(held.handle.ref) for held in self._held.values())),
            distributed=self._distributed,
            epoch=self._fan().epoch,
            bytes_sent=self._fan().bytes_sent,
            backend=self._fan().backend,
        )


def _take(handle: SlabHandle, taker: Taker) -> torch.Tensor:
    """A copy of the slab's bytes, uint8 [nbytes], on the GPU that it comes from, if it does; the trainer's file is removed.
    Raises InstallError."""
    if handle.data is not None:
        if handle.data.nbytes != handle.nbytes:
            raise InstallError(f"slab of {handle.ref}: {handle.data.nbytes} bytes came, its handle says {handle.nbytes}")
        return torch.from_numpy(handle.data.reshape(-1).view(np.uint8))
    if handle.host not in ("", socket.gethostname()):
        raise InstallError(f"slab of {handle.ref} is on {handle.host}, this relay on {socket.gethostname()}")
    path = Path(handle.path)
    if handle.on_device:
        try:
            return taker.take(path, handle.nbytes)
        except (OSError, ValueError, RuntimeError) as error:
            raise InstallError(f"slab of {handle.ref} cannot be taken from its trainer's GPU: {error}") from error
    slab = torch.empty(handle.nbytes, dtype=torch.uint8)
    try:
        size = path.stat().st_size
        if size != handle.nbytes:
            raise InstallError(f"slab of {handle.ref}: {path} holds {size} bytes, its handle says {handle.nbytes}")
        with path.open("rb") as file:
            file.readinto(slab.numpy().data)
    except OSError as error:
        raise InstallError(f"slab of {handle.ref} cannot be read: {error}") from error
    finally:
        path.unlink(missing_ok=True)
    return slab
