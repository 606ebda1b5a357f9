"""The law of request and reply, over ZeroMQ on both event loops and over its twin in memory (conftest.py)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from weft.transport import channel
from weft.transport.codec import encode
from weft.transport.errors import (
    AdapterFault,
    BusyError,
    CheckpointError,
    CodecError,
    DeadlineError,
    InstallError,
    PeerDiedError,
    RemoteError,
    TransportError,
)
from weft.transport.messages import AdapterRef, Done, Install, Retire, SlabHandle
from weft.transport.session import ENVELOPE, Kind, seal

LONG_S = 100.0  # a deadline that nothing here may reach


def install(version: int) -> Install:
    return Install(AdapterRef("a", 0, version))


async def echo(message: object) -> object:
    return message


class Gate:
    """A handler that waits until it is opened, and knows what became of each request."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, message: object) -> object:
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return message


def expire(client: Any) -> None:
    """The deadline of the one request in flight passes now."""
    (number,) = client._caller._pending
    client._caller._expire(number, "Done", LONG_S)


def test_a_reply_is_what_the_handler_returned(wire: Any):
    async def scenario() -> None:
        async with wire.pair(echo) as (server, client):
            assert await client.request(install(3), LONG_S) == install(3)
            assert client.statistics().replies == server.statistics().replies == 1

    wire.run(scenario)


def test_thousands_of_concurrent_requests_keep_their_replies_apart(wire: Any):
    async def shuffled(message: Install) -> Retire:
        for _ in range(random.Random(message.ref.version).randrange(5)):
            await asyncio.sleep(0)
        return Retire(message.ref)

    async def scenario() -> None:
        async with wire.pair(shuffled) as (server, client):
            replies = await asyncio.gather(*(client.request(install(number), LONG_S) for number in range(3000)))
            assert [reply.ref.version for reply in replies] == list(range(3000))
            assert (client.statistics().in_flight, server.statistics().in_flight) == (0, 0)

    wire.run(scenario)


def test_handlers_of_one_client_start_in_the_order_of_its_requests(wire: Any):
    async def scenario() -> None:
        seen = []

        async def note(message: Install) -> Done:
            seen.append(message.ref.version)
            await asyncio.sleep(0)
            return Done()

        async with wire.pair(note) as (_, client), asyncio.TaskGroup() as tasks:
            for number in range(200):
                tasks.create_task(client.request(install(number), LONG_S))
        assert seen == list(range(200))

    wire.run(scenario)


def test_large_arrays_arrive_to_the_bit(wire: Any):
    async def scenario() -> None:
        data = np.random.default_rng(0).integers(0, 256, 2 * channel.CHUNK_BYTES + 12_345, dtype=np.uint8)
        message = SlabHandle(AdapterRef("a", 0, 0), data.nbytes, "bfloat16", 8, 2.0, (), 0.0, 0.0, data=data)
        async with wire.pair(echo) as (_, client):
            for part in (data, data[: channel.CHUNK_BYTES], data[: channel.CHUNK_BYTES + 1], data[:0]):
                reply = await client.request(replace(message, data=part), LONG_S)
                assert np.array_equal(reply.data, part)
                reply.data[:] = 0  # nobody else's
        assert data.any()

    wire.run(scenario)


@pytest.mark.parametrize(
    ("raised", "arrives", "kind"),
    [
        (ValueError("rank"), RemoteError, "ValueError"),
        (AdapterFault("a's reward", kind="ZeroDivisionError", traceback="in reward()"), AdapterFault, "ZeroDivisionError"),
        (RemoteError("from afar", kind="KeyError", traceback="there"), RemoteError, "KeyError"),
        (InstallError("as the base"), InstallError, None),
        (CheckpointError("cut short"), CheckpointError, None),
        (PeerDiedError("a third party"), RemoteError, "PeerDiedError"),
        (DeadlineError("a third party"), RemoteError, "DeadlineError"),
        (asyncio.CancelledError(), RemoteError, "CancelledError"),
        (ExceptionGroup("of tasks", [ExceptionGroup("", [InstallError("as the base")])]), InstallError, None),
        (ExceptionGroup("of tasks", [ValueError("one"), ValueError("two")]), RemoteError, "ExceptionGroup"),
    ],
)
def test_what_a_handler_raises_is_raised_at_its_caller_alone(wire: Any, raised: BaseException, arrives: type, kind: str | None):
    async def fail(message: Install) -> Done:
        if message.ref.version:
            return Done()
        raise raised

    async def scenario() -> None:
        async with wire.pair(fail) as (server, client):
            bad, good = await asyncio.gather(
                client.request(install(0), LONG_S), client.request(install(1), LONG_S), return_exceptions=True
            )
            assert good == Done()
            assert type(bad) is arrives
            if kind is not None:
                assert bad.kind == kind
                assert bad.traceback == getattr(raised, "traceback", "") or "in fail" in bad.traceback
            else:
                assert str(bad) == "as the base" or str(bad) == "cut short"
                assert "in fail" in bad.__notes__[0] or isinstance(raised, ExceptionGroup)
            assert server.statistics().failures == 1

    wire.run(scenario)


def test_a_reply_that_is_no_message_is_the_handlers_failure(wire: Any):
    async def none(_: object) -> None:
        return None

    async def scenario() -> None:
        async with wire.pair(none) as (_, client):
            with pytest.raises(RemoteError, match="NoneType is no message"):
                await client.request(Done(), LONG_S)

    wire.run(scenario)


def test_cancelling_a_request_cancels_its_handler(wire: Any):
    async def scenario() -> None:
        gate = Gate()
        async with wire.pair(gate) as (server, client):
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(client.request(Done(), None))
                await gate.entered.wait()
                asking.cancel()
            await gate.cancelled.wait()
            gate.opened.set()
            assert await client.request(Done(), LONG_S) == Done()
            assert server.statistics().cancelled == 1
            assert server.statistics().in_flight == 0

    wire.run(scenario)


def test_a_deadline_ends_the_request_and_cancels_its_handler(wire: Any):
    async def scenario() -> None:
        gate = Gate()

        async def handle(message: object) -> object:
            return await gate(message) if isinstance(message, Done) else message

        async with wire.pair(handle) as (server, client):
            with pytest.raises(DeadlineError, match=r"no reply to Done from .* within 0.05 s"):
                await client.request(Done(), 0.05)
            assert client.statistics().in_flight == 0
            assert await client.request(install(1), LONG_S) == install(1)  # is served after what came before
            assert gate.cancelled.is_set() == gate.entered.is_set(), "it may have been cancelled before it began"
            assert (server.statistics().cancelled, server.statistics().in_flight) == (1, 0)

    wire.run(scenario)


def test_a_reply_after_its_deadline_is_counted_and_dropped(wire: Any):
    async def scenario() -> None:
        gate = Gate()

        async def stubborn(message: object) -> object:
            with contextlib.suppress(asyncio.CancelledError):
                return await gate(message)
            return message

        async with wire.pair(stubborn) as (server, client):
            asking = asyncio.gather(client.request(Done(), LONG_S), return_exceptions=True)
            await gate.entered.wait()
            expire(client)
            assert [type(error) for error in await asking] == [DeadlineError]
            await gate.cancelled.wait()
            gate.opened.set()
            assert await client.request(install(1), LONG_S) == install(1)
            assert (server.statistics().cancelled, server.statistics().in_flight) == (1, 0)

    wire.run(scenario)


def test_a_client_admits_no_more_than_its_bound(wire: Any):
    async def scenario() -> None:
        gate = Gate()
        async with wire.pair(gate) as (_, opened), asyncio.TaskGroup() as tasks:
            client = wire.module.Client(opened._endpoint, max_in_flight=2)
            asking = [tasks.create_task(client.request(install(number), LONG_S)) for number in range(2)]
            await gate.entered.wait()
            with pytest.raises(BusyError, match="2 requests to .* are in flight"):
                await client.request(Done(), LONG_S)
            gate.opened.set()
            await asyncio.gather(*asking)
            assert await client.request(Done(), LONG_S) == Done()
            await client.aclose()

    wire.run(scenario)


def test_a_server_admits_no_more_than_its_bound(wire: Any):
    async def scenario() -> None:
        gate = Gate()
        async with wire.pair(gate, max_in_flight=3) as (server, client), asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(client.request(install(number), LONG_S)) for number in range(3)]
            await gate.entered.wait()
            with pytest.raises(BusyError, match="3 requests are in flight"):
                await client.request(Done(), LONG_S)
            gate.opened.set()
            await asyncio.gather(*asking)
            assert server.statistics().refused == 1

    wire.run(scenario)


def test_fail_ends_every_pending_and_every_later_request(wire: Any):
    async def scenario() -> None:
        gate = Gate()
        async with wire.pair(gate) as (_, client):
            asking = asyncio.gather(*(client.request(install(number), None) for number in range(5)), return_exceptions=True)
            await gate.entered.wait()
            lost = asyncio.gather(client.wait_lost())
            await asyncio.sleep(0)
            client.fail(PeerDiedError("sampler-0 died"))
            client.fail(InstallError("the first word stays"))
            assert [str(error) for error in await asking] == ["sampler-0 died"] * 5
            await lost
            await client.wait_lost()
            with pytest.raises(PeerDiedError, match="sampler-0 died"):
                await client.request(Done(), LONG_S)

    wire.run(scenario)


def test_a_server_that_closes_ends_what_is_in_flight_with_peer_died(wire: Any):
    async def scenario() -> None:
        gate = Gate()
        async with wire.pair(gate) as (server, client):
            asking = asyncio.gather(*(client.request(install(number), None) for number in range(5)), return_exceptions=True)
            await gate.entered.wait()
            lost = asyncio.gather(client.wait_lost())
            await server.aclose()
            assert {type(error) for error in await asking} == {PeerDiedError}
            await lost
            assert gate.cancelled.is_set()
            with pytest.raises(PeerDiedError):
                await client.request(Done(), None)

    wire.run(scenario)


def test_a_handler_may_close_its_own_server(wire: Any):
    async def scenario() -> None:
        async def close(_: object) -> Done:
            await server.aclose()
            return Done()

        async with wire.pair(close) as (server, client):
            assert await client.request(Done(), LONG_S) == Done()

    wire.run(scenario)


def test_requests_that_come_before_serve_are_served(wire: Any):
    async def scenario() -> None:
        server = wire.module.Server(echo)
        client = wire.module.Client(await server.start())
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.request(install(1), LONG_S))
            await asyncio.sleep(0.01)
            serving = tasks.create_task(server.serve())
            assert await asking == install(1)
            await client.aclose()
            await server.aclose()
            await serving

    wire.run(scenario)


def test_a_closed_client_refuses(wire: Any):
    async def scenario() -> None:
        async with wire.pair(echo) as (_, client):
            await client.request(Done(), LONG_S)
            await client.aclose()
            with pytest.raises(TransportError, match="this side has closed"):
                await client.request(Done(), LONG_S)

    wire.run(scenario)


def test_nobody_at_an_endpoint_is_peer_died_not_a_wait(wire: Any):
    async def scenario() -> None:
        server = wire.module.Server(echo)
        client = wire.module.Client(await server.start())
        await server.aclose()
        with pytest.raises(PeerDiedError, match="nobody listens|connection is lost"):  # the port may be another's by now
            await client.request(Done(), None)
        await client.aclose()

    wire.run(scenario)


def test_an_endpoint_in_use_is_an_os_error_that_names_it(wire: Any):
    async def scenario() -> None:
        async with wire.pair(echo) as (_, client):
            with pytest.raises(OSError, match=client._endpoint):
                await wire.module.Server(echo).start(client._endpoint)

    wire.run(scenario)


def test_an_endpoint_of_another_kind_is_a_value_error(wire: Any):
    with pytest.raises(ValueError, match="endpoint='http://x'"):
        wire.module.Client("http://x")


def test_garbage_is_counted_and_neither_ends_the_server_nor_answers_others(wire: Any):
    async def scenario() -> None:
        async with wire.pair(echo) as (server, client):
            good = encode(Done())
            for frames in (
                [b""],
                [b"\x00" * ENVELOPE.size],
                [ENVELOPE.pack(b"W1", 77, 1)],
                seal(Kind.REPLY, 5, good),
                [seal(Kind.REQUEST, 6)[0] + b"\x00\x00\x00\x09", *good],
                [],
            ):
                await client.request(Done(), LONG_S)  # connected
                if client.__class__ is channel.Client:
                    client._wire.send(frames or [b"short"])
                else:
                    client._send(frames)
            client._caller._pending[900] = asyncio.get_running_loop().create_future()
            client._send(seal(Kind.REQUEST, 900, [b"\xc1"]))
            with pytest.raises(CodecError):
                await client._caller._pending[900]
            assert await client.request(install(2), LONG_S) == install(2)
            assert server.statistics().bad >= 6
            assert client.statistics().bad == 0

    wire.run(scenario)
