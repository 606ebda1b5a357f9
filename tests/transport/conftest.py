"""The kinds of channel that the transport's tests are tried on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from weft.transport import channel, memory

LIMIT_S = 120.0  # of a test that hangs


class Wire:
    """One kind of channel, and the event loop it is tried on."""

    def __init__(self, module: Any, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.module = module
        self._loop = loop

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def within() -> None:
            async with asyncio.timeout(LIMIT_S):
                await scenario()

        with asyncio.Runner(loop_factory=self._loop) as runner:
            runner.run(within())

    @contextlib.asynccontextmanager
    async def pair(self, handler: Callable[[Any], Awaitable[Any]], **limits: int) -> AsyncIterator[tuple[Any, Any]]:
        """A server at work and a client of it."""
        server = self.module.Server(handler, **limits)
        client = self.module.Client(await server.start())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve())
            try:
                yield server, client
            finally:
                await client.aclose()
                await server.aclose()


@pytest.fixture(params=["zmq-asyncio", "zmq-uvloop", "memory"])
def wire(request: pytest.FixtureRequest) -> Wire:
    kind = request.param
    loop = uvloop.new_event_loop if kind == "zmq-uvloop" else asyncio.new_event_loop
    return Wire(memory if kind == "memory" else channel, loop)


@pytest.fixture
def sockets() -> Wire:
    return Wire(channel, uvloop.new_event_loop)
