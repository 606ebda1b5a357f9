"""What only sockets can do; what they share with the twin in memory is in test_session.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import runpy
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from weft.transport import channel
from weft.transport.codec import encode
from weft.transport.errors import PeerDiedError
from weft.transport.messages import AdapterRef, Done, DropAdapter, Install
from weft.transport.session import Kind, seal

LONG_S = 100.0  # a deadline that nothing here may reach
AT_ONCE_S = 25.0  # on a busy machine; that a connection has gone silent is noticed after 30 s


async def echo(message: object) -> object:
    return message


def install(version: int) -> Install:
    return Install(AdapterRef("a", 0, version))


@pytest.mark.parametrize("first", [b"\xff", b"\x00", b"\x05", b"G"])  # ZeroMQ's own greeting, its oldest one's, none
def test_bytes_that_are_not_even_zeromq_do_not_end_the_server(sockets: Any, first: bytes):
    async def scenario() -> None:
        async with sockets.pair(echo) as (_, client):
            port = int(client._endpoint.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(first + random.Random(0).randbytes(4096))
                assert await client.request(Done(), LONG_S) == Done()
            assert await client.request(Done(), LONG_S) == Done()

    sockets.run(scenario)


def test_a_caller_that_has_gone_is_counted_not_raised(sockets: Any):
    async def scenario() -> None:
        async with sockets.pair(echo) as (server, client):
            await client.request(Done(), LONG_S)
            server._responder.receive(b"gone", seal(Kind.REQUEST, 1, encode(Done())))
            assert await client.request(Done(), LONG_S) == Done()
            assert server.statistics().undeliverable == 1

    sockets.run(scenario)


def test_a_server_listens_on_loopback_unless_told_otherwise(sockets: Any):
    async def scenario() -> None:
        server = channel.Server(echo)
        assert (await server.start()).startswith("tcp://127.0.0.1:")
        await server.aclose()

    sockets.run(scenario)


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Of this test alone, and nobody listens there yet: bound here, the port is given to nobody who asks for any."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{reserved.getsockname()[1]}"


def test_kill_9_ends_pending_requests_at_once_and_a_successor_never_runs_them(sockets: Any, endpoint: str):
    async def scenario() -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["pytest", "weft.transport.channel", "weft.transport.memory", "uvloop"])

        async def start() -> tuple[multiprocessing.Process, Any]:
            ours, theirs = forks.Pipe()
            arguments = (__file__, {"READY": theirs, "ENDPOINT": endpoint}, "__main__")
            process = forks.Process(target=runpy.run_path, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that its death ends what waits for its word
            assert await asyncio.to_thread(ours.recv) == endpoint
            return process, ours

        first, heard = await start()
        client = channel.Client(endpoint)
        asking = asyncio.gather(*(client.request(install(number), None) for number in range(10)), return_exceptions=True)
        assert await asyncio.to_thread(heard.recv) == 0
        os.kill(first.pid, signal.SIGKILL)
        async with asyncio.timeout(AT_ONCE_S):
            assert {type(error) for error in await asking} == {PeerDiedError}
            with pytest.raises(PeerDiedError):
                await client.request(install(11), None)
        second, heard = await start()
        asking = asyncio.gather(client.request(DropAdapter("only this"), None), return_exceptions=True)
        assert await asyncio.to_thread(heard.recv) == "only this"
        os.kill(second.pid, signal.SIGKILL)
        assert {type(error) for error in await asking} == {PeerDiedError}
        await client.aclose()
        first.join()
        second.join()

    sockets.run(scenario)


async def _serve_and_never_answer(endpoint: str, ready: Any) -> None:
    async def tell(message: Any) -> Done:
        ready.send(message.ref.version if isinstance(message, Install) else message.name)
        await asyncio.Event().wait()
        return Done()

    server = channel.Server(tell)
    ready.send(await server.start(endpoint))
    await server.serve()


if __name__ == "__main__":
    asyncio.run(_serve_and_never_answer(ENDPOINT, READY))  # type: ignore[name-defined]  # noqa: F821 given by the test
