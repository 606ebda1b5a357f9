"""What only sockets can do; what they share with the twin in memory is in test_session.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import runpy
import signal
import socket
from typing import Any

import pytest

from weft.transport import channel
from weft.transport.codec import encode
from weft.transport.errors import PeerDiedError
from weft.transport.messages import AdapterRef, Done, DropAdapter, Install
from weft.transport.session import Kind, seal


async def echo(message: object) -> object:
    return message


def install(version: int) -> Install:
    return Install(AdapterRef("a", 0, version))


def test_bytes_that_are_not_even_zeromq_do_not_end_the_server(sockets: Any):
    async def scenario() -> None:
        async with sockets.pair(echo) as (_, client):
            port = int(client._endpoint.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(os.urandom(4096))
                assert await client.request(Done(), 5) == Done()
            assert await client.request(Done(), 5) == Done()

    sockets.run(scenario)


def test_a_caller_that_has_gone_is_counted_not_raised(sockets: Any):
    async def scenario() -> None:
        async with sockets.pair(echo) as (server, client):
            await client.request(Done(), 5)
            server._responder.receive(b"gone", seal(Kind.REQUEST, 1, encode(Done())))
            assert await client.request(Done(), 5) == Done()
            assert server.statistics().undeliverable == 1

    sockets.run(scenario)


def test_a_server_listens_on_loopback_unless_told_otherwise(sockets: Any):
    async def scenario() -> None:
        server = channel.Server(echo)
        assert (await server.start()).startswith("tcp://127.0.0.1:")
        await server.aclose()

    sockets.run(scenario)


def test_kill_9_ends_pending_requests_at_once_and_a_successor_never_runs_them(sockets: Any):
    async def scenario() -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["pytest", "weft.transport.channel", "weft.transport.memory", "uvloop"])

        async def start(endpoint: str) -> tuple[multiprocessing.Process, str, Any]:
            ours, theirs = forks.Pipe()
            arguments = (__file__, {"READY": theirs, "ENDPOINT": endpoint}, "__main__")
            process = forks.Process(target=runpy.run_path, args=arguments, daemon=True)
            process.start()
            return process, await asyncio.to_thread(ours.recv), ours

        first, endpoint, heard = await start("tcp://127.0.0.1:0")
        client = channel.Client(endpoint)
        asking = asyncio.gather(*(client.request(install(number), None) for number in range(10)), return_exceptions=True)
        assert await asyncio.to_thread(heard.recv) == 0
        os.kill(first.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            assert {type(error) for error in await asking} == {PeerDiedError}
            with pytest.raises(PeerDiedError):
                await client.request(install(11), None)
        second, _, heard = await start(endpoint)
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
