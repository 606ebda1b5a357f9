"""Typed messages over ZeroMQ: a ROUTER serves, DEALERs call. The one file that imports zmq; the law is in session.py.

    server = Server(handler)                              client = Client(endpoint)
    endpoint = await server.start("tcp://127.0.0.1:0")    reply = await client.request(message, deadline_s=5.0)
    await server.serve()          # until aclose          await client.aclose()

No task reads a socket: the event loop calls when ZeroMQ's descriptor tells, so a client needs no owner. A connection that
breaks, or finds nobody listening, ends what is in flight with PeerDiedError at once, and is replaced at the next request:
what was still queued in it is dropped, so that no successor of a dead server ever runs its requests.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from weft.transport.codec import Buffer
from weft.transport.errors import PeerDiedError, TransportError, WeftError
from weft.transport.session import (
    ENVELOPE,
    MAX_IN_FLIGHT,
    Caller,
    ClientStatistics,
    Frames,
    Handler,
    Responder,
    ServerStatistics,
)

CHUNK_BYTES = 8 << 20  # 132 MB on loopback: 70 ms in frames of 1-8 MiB, 138 ms in one (Xeon at 2.5 GHz)
_HEARTBEAT_MS, _SILENCE_MS = 5_000, 30_000  # answered by ZeroMQ's own thread, so a busy peer is not a silent one
_LINGER_MS = 1_000  # the last replies of a server, the last cancellations of a client
_DRAIN = 64  # messages taken from a socket before the rest of the event loop has its turn
_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class _Wire:
    """A ZeroMQ socket on the running event loop; `receive` is called with the frames of every message.

    The descriptor tells of a change once, not of a state: so all is drained whenever it tells, and looked at
    again after each send, which may have swallowed what it would have told.
    """

    def __init__(self, socket: zmq.Socket[bytes], receive: Callable[[list[Any]], None]) -> None:
        self.socket = socket
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.FD, self.drain)
        self._loop.call_soon(self.drain)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Raises zmq.ZMQError if the peer cannot be reached."""
        self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        if int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self.drain)

    def drain(self) -> None:
        for _ in range(_DRAIN):
            if self.socket.closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._receive(frames)
        self._loop.call_soon(self.drain)

    def close(self, linger_ms: int) -> None:
        if not self.socket.closed:
            self._loop.remove_reader(self.socket.FD)
            self.socket.close(linger_ms)


class Server:
    """`await start(endpoint)`, then `await serve()` runs until `aclose`."""

    def __init__(self, handler: Handler, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._responder = Responder(handler, self._send, max_in_flight)
        self._socket: zmq.Socket[bytes] | None = None
        self._wire: _Wire | None = None
        self._endpoint = ""

    async def start(self, endpoint: str = "tcp://127.0.0.1:0") -> str:
        """Listen; port 0 is any free one. The endpoint that clients name. Raises OSError for an address that cannot be had."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        _unbounded(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise OSError(error.errno, f"cannot listen at {endpoint}: {os.strerror(error.errno or 0)}") from error
        self._socket = socket
        self._endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return self._endpoint

    async def serve(self) -> None:
        """Handle requests until `aclose`; handlers run in a TaskGroup of this call, and end with it."""
        assert self._socket is not None, "start() comes before serve()"
        try:
            await self._responder.serve(self._listen)
        finally:
            self._close()

    async def aclose(self) -> None:
        """Stop: requests in flight are cancelled here and end with PeerDiedError at their callers."""
        if await self._responder.aclose():
            self._close()

    def statistics(self) -> ServerStatistics:
        return self._responder.statistics()

    def _listen(self) -> None:
        assert self._socket is not None
        self._wire = _Wire(self._socket, self._receive)

    def _receive(self, frames: list[Any]) -> None:
        self._responder.receive(frames[0].bytes, _join(frames[1:]))

    def _send(self, peer: bytes, frames: Frames) -> bool:
        assert self._wire is not None
        try:
            self._wire.send([peer, *_split(frames)])
        except zmq.ZMQError:
            return False
        return True

    def _close(self) -> None:
        if self._wire is not None:
            self._wire.close(_LINGER_MS)
        elif self._socket is not None:
            self._socket.close(0)


class Client:
    """`await request(message, deadline_s)`; any number at once. Belongs to the event loop of its first request."""

    def __init__(self, endpoint: str, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        if not endpoint.startswith("tcp://"):
            raise ValueError(f"endpoint={endpoint!r}: must be tcp://host:port")
        self._endpoint = endpoint
        self._caller = Caller(endpoint, self._send, max_in_flight)
        self._wire: _Wire | None = None
        self._monitor: _Wire | None = None

    async def request(self, message: object, deadline_s: float | None) -> Any:
        """The handler's reply. Raises what the handler raised (RemoteError and its kin, InstallError, ...), DeadlineError,
        BusyError, PeerDiedError, CodecError. Cancelling this cancels the handler. deadline_s None: until the peer dies."""
        return await self._caller.request(message, deadline_s)

    def fail(self, error: WeftError) -> None:
        """End every request in flight, and every later one, with `error`."""
        self._caller.fail(error)

    async def wait_lost(self) -> None:
        """Wait until the present connection is lost; at once after `fail`. Says nothing before the first request."""
        await self._caller.wait_lost()

    async def aclose(self) -> None:
        """Requests in flight, and later ones, raise TransportError."""
        self.fail(TransportError(f"this side has closed its client of {self._endpoint}"))
        self._disconnect(_LINGER_MS)

    def statistics(self) -> ClientStatistics:
        return self._caller.statistics()

    def _connect(self) -> _Wire:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _unbounded(socket)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
        self._monitor = _Wire(socket.get_monitor_socket(_GONE), self._lost)
        try:
            socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            self._monitor.close(0)
            socket.close(0)
            raise TransportError(f"cannot connect to {self._endpoint}: {error}") from error
        return _Wire(socket, lambda frames: self._caller.receive(_join(frames)))

    def _send(self, frames: Frames) -> None:
        if self._wire is None:
            self._wire = self._connect()
        self._wire.send(_split(frames))

    def _lost(self, frames: list[Any]) -> None:
        event = int.from_bytes(frames[0].bytes[:2], "little")
        if self._wire is None:
            return
        self._wire.drain()  # replies that came before the end
        self._disconnect(0)
        what = "the connection is lost" if event == zmq.EVENT_DISCONNECTED else "nobody listens"
        self._caller.fail_pending(PeerDiedError(f"{self._endpoint}: {what}"))

    def _disconnect(self, linger_ms: int) -> None:
        wire, monitor, self._wire, self._monitor = self._wire, self._monitor, None, None
        if wire is not None and monitor is not None:
            wire.socket.disable_monitor()  # first: ZeroMQ's thread would wait for ever to tell a monitor that is closed
            monitor.close(0)
            wire.close(linger_ms)


def _unbounded(socket: zmq.Socket[bytes]) -> None:
    """No high-water mark: what is queued is bounded by the requests in flight, and at a mark ROUTER would drop."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)


def _split(frames: Frames) -> Frames:
    """Cut frames above CHUNK_BYTES; how many pieces each has is appended to the envelope, if any has more than one."""
    if all(len(frame) <= CHUNK_BYTES for frame in frames):
        return frames
    counts, pieces = [], []
    for frame in frames[1:]:
        cut = [memoryview(frame)[start : start + CHUNK_BYTES] for start in range(0, max(len(frame), 1), CHUNK_BYTES)]
        counts.append(len(cut))
        pieces.extend(cut)
    return [bytes(frames[0]) + struct.pack(f"!{len(counts)}I", *counts), *pieces]


def _join(frames: list[Any]) -> Frames:
    """Undo `_split`. What does not add up is left as it is: the session refuses it."""
    if not frames:
        return []
    head = frames[0].bytes
    counts = head[ENVELOPE.size :]
    pieces = [frame.buffer for frame in frames[1:]]
    if not counts or len(counts) % 4:
        return [head, *pieces]
    numbers = struct.unpack(f"!{len(counts) // 4}I", counts)
    if sum(numbers) != len(pieces):
        return [head, *pieces]
    joined: Frames = [head[: ENVELOPE.size]]
    for number in numbers:
        taken, pieces = pieces[:number], pieces[number:]
        joined.append(taken[0] if number == 1 else bytearray().join(taken))
    return joined
