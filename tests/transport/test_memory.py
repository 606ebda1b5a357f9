"""The twin in memory: what it shares with the channel is in test_session.py; here is what only it promises."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from weft.transport.errors import DeadlineError
from weft.transport.memory import Client, Server
from weft.transport.messages import AdapterRef, Done, Install, Scores


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing can run: straight to the next timer."""

    def __init__(self) -> None:
        super().__init__(_NoSelector(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class _NoSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._virtual = loop

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "everything waits for ever"
        self._virtual.now += timeout
        return []


def run_virtual(scenario: Callable[[], Awaitable[None]]) -> float:
    """Virtual seconds that it took."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
        return runner.get_loop().time()


async def echo(message: object) -> object:
    return message


def test_a_thousand_slow_requests_take_no_real_time_and_no_thread(monkeypatch: pytest.MonkeyPatch):
    async def slow(message: Install) -> Done:
        await asyncio.sleep(message.ref.version)
        return Done()

    async def scenario() -> None:
        server = Server(slow)
        client = Client(await server.start())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve())
            asking = (client.request(Install(AdapterRef("a", 0, number)), 500.5) for number in range(1000))
            replies = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(reply) for reply in replies] == [Done] * 501 + [DeadlineError] * 499
            await client.aclose()
            await server.aclose()

    begun, start = [], threading.Thread.start

    def note(thread: threading.Thread) -> None:
        begun.append(threading.current_thread())  # who begins it: others of this process may, at any moment
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    started = time.monotonic()
    assert run_virtual(scenario) == pytest.approx(500.5)
    assert threading.current_thread() not in begun
    assert time.monotonic() - started < 250


def test_the_two_ends_share_no_memory():
    async def scenario() -> None:
        kept = []

        async def keep(message: Scores) -> Scores:
            kept.append(message)
            message.logprobs[:] = 7
            return message

        server = Server(keep)
        client = Client(await server.start())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve())
            for size in (3, 100_000):
                sent = np.zeros(size, np.float32)
                reply = await client.request(Scores(sent, sent), 5)
                assert not sent.any()
                reply.logprobs[:] = 9
                assert (kept[-1].logprobs == 7).all()
            await client.aclose()
            await server.aclose()

    run_virtual(scenario)


def test_names_are_free_again_after_close_and_unnamed_servers_are_distinct():
    async def scenario() -> None:
        first, second = Server(echo), Server(echo)
        assert await first.start() != await second.start()
        await first.aclose()
        await second.aclose()
        for _ in range(2):
            server = Server(echo)
            assert await server.start("memory://relay") == "memory://relay"
            await server.aclose()
        with pytest.raises(ValueError, match="endpoint='tcp://127.0.0.1:0'"):
            await Server(echo).start("tcp://127.0.0.1:0")

    run_virtual(scenario)


def test_a_client_finds_the_next_server_of_a_name():
    async def scenario() -> None:
        client = Client("memory://again")
        for number in range(3):
            server = Server(echo)
            await server.start("memory://again")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(server.serve())
                message = Install(AdapterRef("a", 0, number))
                assert await client.request(message, 5) == message
                await server.aclose()
        await client.aclose()

    run_virtual(scenario)
