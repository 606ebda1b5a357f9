"""The channel's twin in one process and on one event loop: same codec, same law (session.py), no socket and no thread.

Endpoints are "memory://name"; "memory://" picks a free name. Frames are copied as they pass, so the two ends share no
memory, and each delivery is a turn of the event loop, so it works in virtual time.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import Any

from weft.transport.errors import PeerDiedError, TransportError, WeftError
from weft.transport.session import MAX_IN_FLIGHT, Caller, ClientStatistics, Frames, Handler, Responder, ServerStatistics

_SCHEME = "memory://"
_servers: dict[str, Server] = {}
_names = itertools.count()


class Server:
    """`await start(endpoint)`, then `await serve()` runs until `aclose`."""

    def __init__(self, handler: Handler, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._responder = Responder(handler, self._send, max_in_flight)
        self._clients: dict[bytes, Client] = {}
        self._waiting: list[tuple[bytes, Frames]] | None = []  # what came between start() and serve()
        self._endpoint = ""

    async def start(self, endpoint: str = _SCHEME) -> str:
        """The endpoint that clients name. Raises ValueError for another scheme, OSError for a name in use."""
        if not endpoint.startswith(_SCHEME):
            raise ValueError(f"endpoint={endpoint!r}: must start with {_SCHEME}")
        if endpoint == _SCHEME:
            endpoint = f"{_SCHEME}{next(_names)}"
        if endpoint in _servers:
            raise OSError(errno.EADDRINUSE, f"cannot listen at {endpoint}: it is in use")
        _servers[endpoint] = self
        self._endpoint = endpoint
        return endpoint

    async def serve(self) -> None:
        try:
            await self._responder.serve(self._listen)
        finally:
            self._disconnect()

    async def aclose(self) -> None:
        if await self._responder.aclose():
            self._disconnect()

    def statistics(self) -> ServerStatistics:
        return self._responder.statistics()

    def _listen(self) -> None:
        waiting, self._waiting = self._waiting or [], None
        for peer, frames in waiting:
            self._responder.receive(peer, frames)

    def _receive(self, client: Client, frames: Frames) -> None:
        if _servers.get(self._endpoint) is not self:
            client._disconnected(f"{self._endpoint} has closed")
            return
        self._clients[client._name] = client
        if self._waiting is None:
            self._responder.receive(client._name, frames)
        else:
            self._waiting.append((client._name, frames))

    def _send(self, peer: bytes, frames: Frames) -> bool:
        client = self._clients.get(peer)
        if client is None:
            return False
        asyncio.get_running_loop().call_soon(client._receive, _copies(frames))
        return True

    def _disconnect(self) -> None:
        if _servers.get(self._endpoint) is self:
            del _servers[self._endpoint]
        clients, self._clients = self._clients, {}
        for client in clients.values():
            asyncio.get_running_loop().call_soon(client._disconnected, f"{self._endpoint} has closed")


class Client:
    """`await request(message, deadline_s)`; any number at once. Belongs to the event loop of its first request."""

    def __init__(self, endpoint: str, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        if not endpoint.startswith(_SCHEME):
            raise ValueError(f"endpoint={endpoint!r}: must start with {_SCHEME}")
        self._endpoint = endpoint
        self._name = b"client-%d" % next(_names)
        self._server: Server | None = None
        self._caller = Caller(endpoint, self._send, max_in_flight)

    async def request(self, message: object, deadline_s: float | None) -> Any:
        return await self._caller.request(message, deadline_s)

    def fail(self, error: WeftError) -> None:
        """End every request in flight, and every later one, with `error`."""
        self._caller.fail(error)

    async def wait_lost(self) -> None:
        """Wait until the present connection is lost; at once after `fail`. Says nothing before the first request."""
        await self._caller.wait_lost()

    async def aclose(self) -> None:
        self.fail(TransportError(f"this side has closed its client of {self._endpoint}"))
        if self._server is not None:
            self._server._clients.pop(self._name, None)

    def statistics(self) -> ClientStatistics:
        return self._caller.statistics()

    def _send(self, frames: Frames) -> None:
        loop = asyncio.get_running_loop()
        server = self._server = self._server or _servers.get(self._endpoint)
        if server is None:
            loop.call_soon(self._disconnected, f"nobody listens at {self._endpoint}")
        else:
            loop.call_soon(server._receive, self, _copies(frames))

    def _receive(self, frames: Frames) -> None:
        self._caller.receive(frames)

    def _disconnected(self, why: str) -> None:
        self._server = None
        self._caller.fail_pending(PeerDiedError(why))


def _copies(frames: Frames) -> Frames:
    return [bytearray(frame) for frame in frames]
