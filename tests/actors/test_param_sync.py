"""The relay over the real channel and gloo, with samplers in processes of their own: each test may kill theirs.

Run as a program, this file is such a sampler, which holds slabs in plain buffers, or a relay. They are forked from a server
that has imported torch, since to import it takes longer than all the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import runpy
import signal
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.actors.param_sync import ParamSync
from weft.configs.schema import SyncConfig
from weft.transport import messages
from weft.transport.broadcast import BroadcastGroup
from weft.transport.channel import Client, Server
from weft.transport.errors import InstallError, PeerDiedError, RemoteError, WeftError
from weft.transport.messages import AdapterRef, Distribute, Done, JoinSampler, LeaveSampler, Serve, SlabHandle, Withdraw

RELAY = "relay"
CANARY = -1.0
DEADLINE_S = 120.0  # far above what any test takes: what ends at once must not end by this


class PlainSampler:
    """Receives on side threads, one per group; installs by keeping the bytes. `fault`: what happens at which version."""

    def __init__(self, fault: str) -> None:
        self._stage, _, version = fault.partition(":")
        self._version = int(version or -1)
        self._groups: dict[str, tuple[BroadcastGroup, asyncio.Lock]] = {}
        self._coming: dict[AdapterRef, asyncio.Task[tuple[torch.Tensor, WeftError | None]]] = {}
        self._installed: dict[AdapterRef, int] = {}
        self._canaries: dict[AdapterRef, asyncio.Future[float]] = {}
        self._audited: dict[AdapterRef, bool] = {}
        self.tasks: asyncio.TaskGroup | None = None

    async def handle(self, message: object) -> object:
        match message:
            case messages.Receive():
                self._fault("die-at-receive", message.handle.ref)
                assert self.tasks is not None
                self._coming[message.handle.ref] = self.tasks.create_task(self._receive(message))
                self._audited[message.handle.ref] = message.handle.audited
                canary = self._canaries[message.handle.ref] = asyncio.get_running_loop().create_future()
                if message.handle.canary_logprob is not None:
                    canary.set_result(message.handle.canary_logprob)
            case messages.Canary(ref, logprob):
                self._canaries[ref].set_result(logprob)
            case messages.Install(ref):
                self._fault("die-at-install", ref)
                (slab, error), audited = await self._coming.pop(ref), self._audited.pop(ref)
                if error is not None:
                    raise InstallError(f"{ref} did not come: {error}")
                if self._stage == "refuse" and ref.version == self._version:
                    raise InstallError("the canary samples as the base")
                assert not audited or await self._canaries[ref] == CANARY
                self._installed[ref] = zlib.crc32(slab.numpy())
            case messages.Retire(ref):
                del self._installed[ref]
            case messages.GetStatistics():
                live = tuple(sorted(f"{ref}={crc}" for ref, crc in self._installed.items()))
                return messages.SamplerStatistics(os.getpid(), os.getpid(), live, 0, 0, len(live), 0.0)
        return Done()

    def _fault(self, stage: str, ref: AdapterRef) -> None:
        if self._stage == stage and ref.version == self._version:
            os.kill(os.getpid(), signal.SIGKILL)

    async def _receive(self, message: messages.Receive) -> tuple[torch.Tensor, WeftError | None]:
        slab = torch.empty(message.handle.nbytes, dtype=torch.uint8)
        if message.epoch not in self._groups:
            link = BroadcastGroup(
                message.store, message.epoch, message.rank, message.world_size, message.backend, message.deadline_s
            )
            self._groups[message.epoch] = link, asyncio.Lock()
        link, turn = self._groups[message.epoch]
        async with turn:
            if self._stage == "die-at-broadcast" and message.handle.ref.version == self._version:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                await asyncio.to_thread(link.broadcast, slab)
            except WeftError as error:
                return slab, error
        return slab, None


async def _be_a_sampler(fault: str, ready: Connection) -> None:
    torch.set_num_threads(1)
    sampler = PlainSampler(fault)
    server = Server(sampler.handle)
    ready.send(await server.start())
    async with asyncio.TaskGroup() as sampler.tasks:
        await server.serve()


async def _be_a_relay(ready: Connection) -> None:
    sync = ParamSync(SyncConfig(deadline_s=DEADLINE_S))
    await sync.start()
    server = Server(sync.handle)
    ready.send(await server.start())
    await server.serve()


class SamplerProcess:
    """A sampler as the tests hold it."""

    def __init__(self, fault: str = "") -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["pytest", "weft.actors.param_sync"])
        self._ready, ready = forks.Pipe(duplex=False)
        arguments = (__file__, {"FAULT": fault, "READY": ready}, "__main__")
        self.process = forks.Process(target=runpy.run_path, args=arguments, daemon=True)
        self.process.start()
        ready.close()
        self._endpoint = ""

    @property
    def endpoint(self) -> str:
        """Waits until it listens."""
        self._endpoint = self._endpoint or self._ready.recv()
        return self._endpoint

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    async def live(self) -> list[str]:
        client = Client(self.endpoint)
        statistics = await client.request(messages.GetStatistics(), DEADLINE_S)
        await client.aclose()
        return list(statistics.live_versions)


@pytest.fixture
def sampler() -> object:
    """Makes sampler processes, all of which end with the test."""
    started: list[SamplerProcess] = []

    def make(fault: str = "") -> SamplerProcess:
        started.append(SamplerProcess(fault))
        return started[-1]

    yield make
    for process in started:
        process.kill()


Make = Callable[..., SamplerProcess]


@contextlib.asynccontextmanager
async def relay(*samplers: SamplerProcess) -> AsyncIterator[ParamSync]:
    """A relay that these samplers have joined as 0, 1, ..."""
    sync = ParamSync(SyncConfig(deadline_s=DEADLINE_S))
    await sync.start()
    try:
        for index, process in enumerate(samplers):
            await sync.handle(JoinSampler(index, process.endpoint))
        yield sync
    finally:
        await sync.aclose()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(3 * DEADLINE_S):
            await test()

    asyncio.run(within())


def slab_of(ref: AdapterRef, nbytes: int) -> np.ndarray:
    return np.random.default_rng([ref.version, len(ref.name), nbytes]).integers(0, 256, nbytes, dtype=np.uint8)


def handle_of(name: str, version: int, nbytes: int = 10_007, path: Path | None = None, lineage: int = 0) -> SlabHandle:
    ref = AdapterRef(name, lineage, version)
    data: np.ndarray | None = slab_of(ref, nbytes)
    if path is not None:
        data.tofile(path)
        data = None
    where = "" if path is None else str(path)
    return SlabHandle(ref, nbytes, "bfloat16", 8, 2.0, ("q_proj",), CANARY, -2.0, path=where, data=data)


def as_live(*handles: SlabHandle) -> list[str]:
    """What a sampler with these versions, intact, says."""
    return sorted(f"{handle.ref}={zlib.crc32(slab_of(handle.ref, handle.nbytes))}" for handle in handles)


def test_every_sampler_has_the_version_to_the_bit_when_distribute_returns_and_the_file_is_gone(sampler: Make, tmp_path: Path):
    async def test() -> None:
        samplers = [sampler() for _ in range(3)]
        async with relay(*samplers) as sync:
            first, second = handle_of("a", 0, path=tmp_path / "0"), handle_of("a", 1, 100_001, path=tmp_path / "1")
            done = await sync.handle(Distribute(first, (0, 1, 2)))
            assert [await process.live() for process in samplers] == [as_live(first)] * 3
            assert done.seconds >= done.broadcast_seconds + done.install_seconds > 0
            await sync.handle(Distribute(second, (0, 1, 2), supersedes=first.ref))
            assert [await process.live() for process in samplers] == [as_live(second)] * 3
            assert os.listdir(tmp_path) == []
            statistics = await sync.handle(messages.GetStatistics())
            assert (statistics.held, statistics.distributed, statistics.epoch) == (("a/0/1",), 2, 1)
            assert statistics.bytes_sent == 3 * (10_007 + 100_001)

    run(test)


def test_adapters_overlap_and_each_ones_versions_come_in_order(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        async with relay(*samplers) as sync:
            last = {}
            async with asyncio.TaskGroup() as tasks:
                for version in range(5):
                    for name in ("a", "bb", "ccc", "dddd"):
                        last[name] = handle = handle_of(name, version, 5_000 + version)
                        before = AdapterRef(name, 0, version - 1) if version else None
                        tasks.create_task(sync.handle(Distribute(handle, (0, 1), before)))
            assert [await process.live() for process in samplers] == [as_live(*last.values())] * 2

    run(test)


def test_weights_go_before_their_canary_and_nobody_has_installed_them_without_it(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        async with relay(*samplers) as sync:
            whole = handle_of("a", 1)
            handle = messages.SlabHandle(**{**vars(whole), "canary_logprob": None})
            async with asyncio.TaskGroup() as tasks:
                syncing = tasks.create_task(sync.handle(Distribute(handle, (0,))))
                await asyncio.sleep(0)
                await sync.handle(messages.AwaitSent(whole.ref))
                assert (await sync.handle(messages.GetStatistics())).bytes_sent == whole.nbytes
                await sync.handle(messages.Canary(AdapterRef("a", 0, 0), -5.0))  # of another version
                assert await samplers[0].live() == [] and not syncing.done()
                await sync.handle(messages.Canary(whole.ref, CANARY))
            assert await samplers[0].live() == as_live(whole)
            await sync.handle(Serve(1, "a"))  # who comes late waits for none
            assert await samplers[1].live() == as_live(whole)

    run(test)


def test_a_version_that_is_not_audited_waits_for_no_canary_nor_does_who_comes_late(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        async with relay(*samplers) as sync:
            whole = handle_of("a", 1)
            handle = messages.SlabHandle(**{**vars(whole), "canary_logprob": None, "audited": False})
            await sync.handle(Distribute(handle, (0,)))
            await sync.handle(Serve(1, "a"))
            assert [await one.live() for one in samplers] == [as_live(whole)] * 2

    run(test)


@pytest.mark.parametrize("fault", [None, "die-at-receive:1", "die-at-broadcast:1"])
def test_a_slab_that_nobody_is_left_to_receive_waits_for_no_broadcast(sampler: Make, fault: str | None):
    async def test() -> None:
        samplers = [] if fault is None else [sampler(fault)]
        async with relay(*samplers) as sync:
            whole = handle_of("a", 1)
            handle = messages.SlabHandle(**{**vars(whole), "canary_logprob": None})
            async with asyncio.timeout(DEADLINE_S / 2), asyncio.TaskGroup() as tasks:
                tasks.create_task(sync.handle(Distribute(handle, (0,))))
                await asyncio.sleep(0)
                await sync.handle(messages.AwaitSent(whole.ref))
                await sync.handle(messages.Canary(whole.ref, CANARY))
            late = sampler()
            await sync.handle(JoinSampler(1, late.endpoint))
            await sync.handle(Serve(1, "a"))
            assert await late.live() == as_live(whole)

    run(test)


@pytest.mark.parametrize("fault", ["die-at-receive:1", "die-at-broadcast:0", "die-at-broadcast:1", "die-at-install:1"])
def test_a_sampler_that_dies_in_between_delays_nobody_and_the_others_have_the_version(sampler: Make, fault: str):
    async def test() -> None:
        samplers = [sampler(), sampler(fault), sampler()]
        async with relay(*samplers) as sync:
            for version in range(3):
                handle = handle_of("a", version, 300_001)
                async with asyncio.timeout(DEADLINE_S / 2):  # by its death, not by a deadline
                    await sync.handle(Distribute(handle, (0, 1, 2)))
            live = as_live(*(handle_of("a", version, 300_001) for version in range(3)))
            assert [await samplers[index].live() for index in (0, 2)] == [live] * 2

    run(test)


def test_a_sampler_gets_the_newest_of_the_adapters_that_it_is_to_serve_and_of_no_other(sampler: Make):
    async def test() -> None:
        early, late = sampler(), sampler()
        async with relay(early, late) as sync:
            for version in (0, 1):
                for name in ("a", "bb"):
                    await sync.handle(Distribute(handle_of(name, version), (0,)))
            newest = [handle_of("a", 1), handle_of("bb", 1)]
            assert await late.live() == []
            await sync.handle(Serve(1, "a"))
            await sync.handle(Serve(1, "a"))  # told twice is told once
            assert await late.live() == as_live(newest[0])
            early.kill()
            again = sampler()
            await sync.handle(JoinSampler(0, again.endpoint))
            assert await again.live() == []
            for name in ("a", "bb"):
                await sync.handle(Serve(0, name))
            assert await again.live() == as_live(*newest)
            await sync.handle(Distribute(handle_of("a", 2), (0, 1), supersedes=newest[0].ref))
            assert await again.live() == as_live(handle_of("a", 2), newest[1])
            assert await late.live() == as_live(handle_of("a", 2))
            for unknown in (Serve(0, "c"), Serve(7, "a")):
                with pytest.raises(InstallError, match="the relay has no"):
                    await sync.handle(unknown)

    run(test)


def test_a_sampler_that_serves_an_adapter_no_more_retires_it_and_gets_it_again_when_it_does(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        async with relay(*samplers) as sync:
            old, new = handle_of("a", 0), handle_of("a", 1)
            await sync.handle(Distribute(old, (0, 1)))
            await sync.handle(Distribute(new, (0,), supersedes=old.ref))
            assert [await one.live() for one in samplers] == [as_live(new), as_live(old)], "it may have rollouts of the old one"
            await sync.handle(Withdraw(1, old.ref))
            assert await samplers[1].live() == []
            await sync.handle(Serve(1, "a"))
            assert await samplers[1].live() == as_live(new)

    run(test)


def test_a_sampler_that_has_left_is_not_waited_for(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        async with relay(*samplers) as sync:
            await sync.handle(Distribute(handle_of("a", 0), (0, 1)))
            samplers[1].signal(signal.SIGSTOP)  # its process is there and silent, as behind a broken network
            async with asyncio.timeout(DEADLINE_S / 2), asyncio.TaskGroup() as tasks:
                syncing = tasks.create_task(sync.handle(Distribute(handle_of("a", 1), (0, 1))))
                await asyncio.sleep(0)
                assert await sync.handle(LeaveSampler(1)) == Done()
                await syncing
                await sync.handle(Distribute(handle_of("a", 2), (0, 1, 7)))
            assert await samplers[0].live() == as_live(*(handle_of("a", version) for version in range(3)))

    run(test)


def test_a_refusal_names_the_sampler_and_supersedes_nothing(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler("refuse:1")]
        async with relay(*samplers) as sync:
            first = handle_of("a", 0)
            await sync.handle(Distribute(first, (0, 1)))
            with pytest.raises(InstallError, match=r"a/0/1 .*sampler 1 .*the canary samples as the base"):
                await sync.handle(Distribute(handle_of("a", 1), (0, 1), supersedes=first.ref))
            assert (await sync.handle(messages.GetStatistics())).held == ("a/0/0",)
            assert await samplers[1].live() == as_live(first)
            await sync.handle(Distribute(handle_of("a", 2), (0, 1), supersedes=first.ref))
            assert await samplers[1].live() == as_live(handle_of("a", 2))

    run(test)


def test_a_relay_that_is_started_again_serves_samplers_that_outlived_it(sampler: Make):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        for version in range(3):
            async with relay(*samplers) as sync:
                before = AdapterRef("a", 0, version - 1) if version else None
                await sync.handle(Distribute(handle_of("a", version), (0, 1), before))
        assert [await process.live() for process in samplers] == [as_live(handle_of("a", 2))] * 2

    run(test)


@pytest.mark.parametrize("moment_s", [0.0, 0.005, 0.02])
def test_a_relay_killed_at_any_moment_of_a_sync_leaves_samplers_that_its_successor_serves(sampler: Make, moment_s: float):
    async def test() -> None:
        samplers = [sampler(), sampler()]
        newest = handle_of("a", 1, 3_000_001)
        for attempt in range(2):
            process = sampler(RELAY)
            client = Client(process.endpoint)
            for index, one in enumerate(samplers):
                await client.request(JoinSampler(index, one.endpoint), DEADLINE_S)
            async with asyncio.timeout(DEADLINE_S / 2), asyncio.TaskGroup() as tasks:
                syncing = tasks.create_task(_outcome(client.request(Distribute(newest, (0, 1)), None)))
                if attempt == 0:
                    await asyncio.sleep(moment_s)  # not a wait: any moment is as good as another
                    process.kill()
            await client.aclose()
        assert isinstance(await syncing, messages.Distributed)
        assert [await one.live() for one in samplers] == [as_live(newest)] * 2

    run(test)


async def _outcome(request: Awaitable[object]) -> object:
    try:
        return await request
    except PeerDiedError as error:
        return error


def test_a_dropped_adapter_is_forgotten_and_may_come_again(sampler: Make):
    async def test() -> None:
        process = sampler()
        async with relay(process) as sync:
            await sync.handle(Distribute(handle_of("a", 0), (0,)))
            await sync.handle(messages.DropAdapter("a"))
            assert (await sync.handle(messages.GetStatistics())).held == ()
            await sync.handle(Distribute(handle_of("a", 0), (0,)))
            assert (await sync.handle(messages.GetStatistics())).bytes_sent == 2 * 10_007

    run(test)


def test_a_slab_that_is_not_what_its_handle_says_is_refused(tmp_path: Path):
    async def test() -> None:
        async with relay() as sync:
            short = handle_of("a", 0, path=tmp_path / "short")
            os.truncate(tmp_path / "short", 10)
            for wrong, why in (
                (short, "holds 10 bytes, its handle says 10007"),
                (handle_of("a", 0, path=tmp_path / "elsewhere"), "on another"),
                (handle_of("a", 0, path=tmp_path / "missing"), "No such file"),
            ):
                (tmp_path / "missing").unlink(missing_ok=True)
                host = "another" if why == "on another" else ""
                with pytest.raises(InstallError, match=why):
                    await sync.handle(Distribute(messages.SlabHandle(**{**vars(wrong), "host": host}), ()))

    run(test)


def test_what_a_relay_does_not_do_is_a_value_error_over_the_channel():
    async def test() -> None:
        async with relay() as sync, asyncio.TaskGroup() as tasks:
            server = Server(sync.handle)
            client = Client(await server.start())
            serving = tasks.create_task(server.serve())
            with pytest.raises(RemoteError, match="Retire is no message for a parameter sync"):
                await client.request(messages.Retire(AdapterRef("a", 0, 0)), DEADLINE_S)
            await client.aclose()
            await server.aclose()
            await serving

    run(test)


if __name__ == "__main__":
    fault, ready = FAULT, READY  # type: ignore[name-defined]  # noqa: F821 given by SamplerProcess
    asyncio.run(_be_a_relay(ready) if fault == RELAY else _be_a_sampler(fault, ready))
