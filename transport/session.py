"""The law of request and reply, without a wire: channel.py puts it on ZeroMQ, memory.py on the event loop alone.

    Caller                                    Responder
    request(message) ── REQUEST id ─────────> a handler's task, in the TaskGroup of serve()
       |             <── REPLY | ERROR id ──  returned | raised
       |             <── REFUSED id ────────  too many in flight, no message of ours, closing
    deadline, cancelled ── CANCEL id ───────> the task is cancelled

Every request ends in exactly one of: its reply, its handler's exception, DeadlineError, BusyError, PeerDiedError,
cancellation. What arrives later than that is counted and dropped. Handlers of one caller start in the order of its requests.
"""

from __future__ import annotations

import asyncio
import copy
import enum
import itertools
import struct
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from weft.transport import errors
from weft.transport.codec import Buffer, decode, encode
from weft.transport.errors import BusyError, CodecError, DeadlineError, PeerDiedError, RemoteError, TransportError, WeftError

MAX_IN_FLIGHT = 4096
ENVELOPE = struct.Struct("!2sBQ")  # magic, kind, request id
_MAGIC = b"W1"
_ERRORS = {name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, WeftError)}

Handler = Callable[[Any], Awaitable[Any]]
Frames = list[Buffer]


class Kind(enum.IntEnum):
    """What a set of frames is; the rest of the frames in brackets."""

    REQUEST = 1  # [message]
    CANCEL = 2  # []
    REPLY = 3  # [message]
    ERROR = 4  # [class, message, kind, traceback] the handler raised
    REFUSED = 5  # the same; the handler never ran, or was cut off


@dataclass(frozen=True)
class ClientStatistics:
    """in_flight: now; late: replies to requests that had ended; bad: frames that were none of ours."""

    requests: int
    replies: int
    failures: int
    in_flight: int
    late: int
    bad: int


@dataclass(frozen=True)
class ServerStatistics:
    """in_flight: now; refused: beyond max_in_flight; bad: frames that were none of ours; undeliverable: the caller had gone."""

    requests: int
    replies: int
    failures: int
    cancelled: int
    in_flight: int
    refused: int
    bad: int
    undeliverable: int


def seal(kind: Kind, request: int, payload: Sequence[Buffer] = ()) -> Frames:
    return [ENVELOPE.pack(_MAGIC, kind, request), *payload]


def unseal(frames: Sequence[Buffer]) -> tuple[Kind, int, Sequence[Buffer]]:
    """Raises CodecError for what `seal` did not make."""
    try:
        magic, kind, request = ENVELOPE.unpack(frames[0])
        if magic != _MAGIC:
            raise ValueError(f"magic {magic!r}")
        return Kind(kind), request, frames[1:]
    except (ValueError, IndexError, struct.error) as error:
        raise CodecError(f"no envelope of ours: {error}") from error


def pack_error(error: BaseException) -> Buffer:
    """An exception as it travels. A group of one is that one; an error that already came from afar keeps its origin."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = str(error.args[0]) if isinstance(error, RemoteError) and error.args else str(error)
    kind = getattr(error, "kind", "") or type(error).__name__
    trace = getattr(error, "traceback", "") or "".join(traceback.format_exception(error))
    fields = [type(error).__name__, text, str(kind), str(trace)]
    packed: bytes = msgpack.packb(fields, unicode_errors="replace")
    return packed


def unpack_error(kind: Kind, payload: Sequence[Buffer], peer: str) -> WeftError:
    """The exception to raise here. A handler's TransportError was about a third party: here it is a RemoteError."""
    try:
        name, text, origin, trace = msgpack.unpackb(payload[0])
    except (ValueError, IndexError, TypeError, msgpack.UnpackException) as error:
        return CodecError(f"{peer} sent an error that cannot be read: {error}")
    cls = _ERRORS.get(name)
    if kind is Kind.REFUSED:
        return (cls or TransportError)(text)
    if cls is not None and issubclass(cls, RemoteError):
        return cls(text, kind=origin, traceback=trace)
    if cls is None or issubclass(cls, TransportError):
        return RemoteError(f"{name} at {peer}: {text}", kind=origin, traceback=trace)
    failure = cls(text)
    failure.add_note(f"raised at {peer}:\n{trace}")
    return failure


class Caller:
    """The client's half. `send` puts frames on the wire and never blocks; the wire hands what comes to `receive`."""

    def __init__(self, peer: str, send: Callable[[Frames], None], max_in_flight: int = MAX_IN_FLIGHT) -> None:
        assert max_in_flight > 0
        self._peer = peer
        self._send = send
        self._max_in_flight = max_in_flight
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._failure: WeftError | None = None
        self._lost = asyncio.Event()  # of the present connection; another one for the next
        self._requests = self._replies = self._failures = self._late = self._bad = 0

    async def request(self, message: object, deadline_s: float | None) -> Any:
        """The handler's reply, or one of the exceptions above."""
        if self._failure is not None:
            raise copy.copy(self._failure)
        if len(self._pending) >= self._max_in_flight:
            raise BusyError(f"{len(self._pending)} requests to {self._peer} are in flight: it admits no more")
        payload = encode(message)
        loop = asyncio.get_running_loop()
        number, future = next(self._ids), loop.create_future()
        self._pending[number] = future
        timer = None
        try:
            self._send(seal(Kind.REQUEST, number, payload))
            self._requests += 1
            if deadline_s is not None:
                timer = loop.call_later(deadline_s, self._expire, number, type(message).__name__, deadline_s)
            reply = await future
            self._replies += 1
            return reply
        except BaseException:
            self._failures += 1
            if future.cancelled() and self._pending.pop(number, None) is not None:
                self._send(seal(Kind.CANCEL, number))
            raise
        finally:
            self._pending.pop(number, None)
            if timer is not None:
                timer.cancel()
            if future.done() and not future.cancelled():
                future.exception()  # a request that is cancelled just as it fails leaves no unread exception behind

    def receive(self, frames: Sequence[Buffer]) -> None:
        """What came from the peer."""
        try:
            kind, number, payload = unseal(frames)
        except CodecError:
            self._bad += 1
            return
        future = self._pending.pop(number, None)
        if future is None or future.done():
            self._late += 1
            return
        try:
            if kind is Kind.REPLY:
                future.set_result(decode(payload))
            elif kind in (Kind.ERROR, Kind.REFUSED):
                future.set_exception(unpack_error(kind, payload, self._peer))
            else:
                raise CodecError(f"{self._peer} sent a {kind.name} where a reply was due")
        except CodecError as error:
            self._bad += 1
            future.set_exception(error)

    def fail_pending(self, error: WeftError) -> None:
        """End every request in flight with `error`. Later ones are tried."""
        self._lost.set()
        self._lost = asyncio.Event()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(copy.copy(error))

    def fail(self, error: WeftError) -> None:
        """End every request in flight, and every later one, with `error`."""
        self._failure = self._failure or error
        self.fail_pending(error)

    async def wait_lost(self) -> None:
        """Wait until the present connection is lost; at once after `fail`."""
        if self._failure is None:
            await self._lost.wait()

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(
            requests=self._requests,
            replies=self._replies,
            failures=self._failures,
            in_flight=len(self._pending),
            late=self._late,
            bad=self._bad,
        )

    def _expire(self, number: int, name: str, deadline_s: float) -> None:
        future = self._pending.pop(number, None)
        if future is not None and not future.done():
            future.set_exception(DeadlineError(f"no reply to {name} from {self._peer} within {deadline_s:g} s"))
            self._send(seal(Kind.CANCEL, number))


class Responder:
    """The server's half. `send` puts frames on the wire to one peer and says whether that peer could be reached."""

    def __init__(self, handler: Handler, send: Callable[[bytes, Frames], bool], max_in_flight: int = MAX_IN_FLIGHT) -> None:
        assert max_in_flight > 0
        self._handler = handler
        self._send = send
        self._max_in_flight = max_in_flight
        self._running: dict[tuple[bytes, int], asyncio.Task[None]] = {}
        self._abandoned: set[tuple[bytes, int]] = set()  # of those running: their callers wait no more
        self._tasks: asyncio.TaskGroup | None = None
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._requests = self._replies = self._failures = self._cancelled = 0
        self._refused = self._bad = self._undeliverable = 0

    async def serve(self, listen: Callable[[], None]) -> None:
        """Handle requests until `aclose`. `listen` is called once handlers can run: from then on the wire calls `receive`."""
        assert self._tasks is None, "one serve() a server"
        if self._closing.is_set():
            return
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    listen()
                    await self._closing.wait()
                finally:
                    self._closing.set()
                    for task in self._running.values():
                        task.cancel()
        finally:
            self._ended.set()

    async def aclose(self) -> bool:
        """Cancel the handlers that run (their callers get PeerDiedError) and wait for them. A handler itself may call this:
        then it is not over yet, and this says False."""
        self._closing.set()
        if self._tasks is None:
            return True
        if asyncio.current_task() in self._running.values():
            return False
        await self._ended.wait()
        return True

    def receive(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """What came from `peer`. Nothing that a peer sends raises here."""
        try:
            kind, number, payload = unseal(frames)
        except CodecError:
            self._bad += 1
            return
        running = self._running.get((peer, number))
        if kind is Kind.CANCEL:
            if running is not None and (peer, number) not in self._abandoned:
                self._cancelled += 1
                self._abandoned.add((peer, number))
                running.cancel()
        elif kind is not Kind.REQUEST or running is not None:
            self._bad += 1
        elif self._closing.is_set():
            self._refuse(peer, number, PeerDiedError("it has closed"))
        elif len(self._running) >= self._max_in_flight:
            self._refused += 1
            self._refuse(peer, number, BusyError(f"{len(self._running)} requests are in flight: it admits no more"))
        else:
            self._admit(peer, number, payload)

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(
            requests=self._requests,
            replies=self._replies,
            failures=self._failures,
            cancelled=self._cancelled,
            in_flight=len(self._running),
            refused=self._refused,
            bad=self._bad,
            undeliverable=self._undeliverable,
        )

    def _admit(self, peer: bytes, number: int, payload: Sequence[Buffer]) -> None:
        try:
            message = decode(payload)
        except CodecError as error:
            self._bad += 1
            self._refuse(peer, number, error)
            return
        assert self._tasks is not None, "nothing is received before serve()"
        self._requests += 1
        task = self._tasks.create_task(self._run(peer, number, message))
        self._running[peer, number] = task
        task.add_done_callback(lambda _: self._end(peer, number))  # also when it was cancelled before it began

    def _end(self, peer: bytes, number: int) -> None:
        self._running.pop((peer, number), None)
        self._abandoned.discard((peer, number))

    async def _run(self, peer: bytes, number: int, message: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            answer = seal(Kind.REPLY, number, encode(await self._handler(message)))
            self._replies += 1
        except asyncio.CancelledError as error:
            if (peer, number) in self._abandoned:
                raise
            self._failures += 1
            if task.cancelling() == 0:
                answer = seal(Kind.ERROR, number, [pack_error(error)])  # the handler's own: its caller still waits
            else:
                cut = PeerDiedError(f"it closed while it handled {type(message).__name__}")
                answer = seal(Kind.REFUSED, number, [pack_error(cut)])
        except Exception as error:  # noqa: BLE001 whatever a handler raises is its caller's to know, and ends no other request
            self._failures += 1
            answer = seal(Kind.ERROR, number, [pack_error(error)])
        if (peer, number) not in self._abandoned:
            self._put(peer, answer)

    def _refuse(self, peer: bytes, number: int, error: TransportError) -> None:
        self._put(peer, seal(Kind.REFUSED, number, [pack_error(error)]))

    def _put(self, peer: bytes, frames: Frames) -> None:
        if not self._send(peer, frames):
            self._undeliverable += 1
