"""One slab to many samplers: announced, broadcast, installed; a sampler that dies in between holds nobody up.

    Receive to each, and at once the broadcast that they take part in ──> all have it ──> Install to each ──> all have answered
                             └──────────── one slab at a time ───────┘                 └── and its Canary, when that has come

The samplers that a slab goes to form one broadcast group, made when it is first needed and kept for the next slab. Slabs are
announced at any time, each with its number in the group, and broadcast in that order; but none while a new group awaits its
first. Whatever goes wrong in a group dissolves it before the next of its broadcasts could begin, and those that still wait get
their slabs under a new epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from weft.configs.schema import SyncConfig
from weft.transport.broadcast import BroadcastGroup, RendezvousStore, check_backend
from weft.transport.errors import DeadlineError, InstallError, PeerDiedError, RendezvousError, WeftError
from weft.transport.messages import AdapterRef, Canary, GetStatistics, Install, Receive, SlabHandle

T = TypeVar("T")
Slab = Callable[[], torch.Tensor]  # gives the bytes, uint8 [nbytes], on whatever thread it is called; again when called again
ROUNDS = 3  # broadcasts of one slab that may fail before it has failed
AHEAD = 16  # slabs announced and not yet broadcast: each takes a place in a sampler's queue
MAX_GROUPS = 12  # kept for the sets of samplers seen last, and all that are in use: adapters live on different ones
_log = logging.getLogger(__name__)


class Client(Protocol):
    """transport.channel.Client, or its twin in memory."""

    async def request(self, message: Any, deadline_s: float | None) -> Any: ...

    async def wait_lost(self) -> None: ...

    def fail(self, error: WeftError) -> None: ...

    async def aclose(self) -> None: ...


class Peer:
    """A sampler, as the relay sees it: one process at one endpoint. A process that is started again is another peer.

    workers: of its engine; each takes part in every broadcast.
    """

    def __init__(self, sampler: int, endpoint: str, client: Client, workers: int = 1) -> None:
        self.sampler = sampler
        self.endpoint = endpoint
        self.workers = workers
        self.client = client
        self.serving = True  # until it leaves, or its process is found dead
        self.installed: dict[str, AdapterRef] = {}  # by adapter: the last version that it acknowledged

    def __str__(self) -> str:
        return f"sampler {self.sampler} ({self.endpoint})"

    async def ask(self, message: Any, deadline_s: float) -> WeftError | None:
        """None when it has done so; else why not. Finds out whether a lost connection was a lost process."""
        try:
            await self.client.request(message, deadline_s)
        except PeerDiedError as error:
            await self._probe(deadline_s)
            return error
        except WeftError as error:
            return error
        return None

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.serving = False
        self.client.fail(PeerDiedError(f"{self} has left"))

    async def _probe(self, deadline_s: float) -> None:
        try:
            await self.client.request(GetStatistics(), deadline_s)
        except PeerDiedError:
            self.serving = False
        except WeftError:
            return  # it answers badly or not at all, so it is not known to be dead: the driver decides


@dataclass(eq=False)
class _Group:
    epoch: str
    peers: tuple[Peer, ...]
    link: BroadcastGroup
    announced: int = 0  # slabs
    under_way: int = 0  # of these


@dataclass
class Times:
    """Seconds of one slab's way, and whether its bytes are there."""

    broadcast: float = 0.0
    install: float = 0.0
    sent: asyncio.Event = field(default_factory=asyncio.Event)


class FanOut:
    """The broadcast groups of one relay."""

    def __init__(self, config: SyncConfig, host: str) -> None:
        """Raises ValueError for a backend that is not there, OSError if the rendezvous store cannot listen on `host`."""
        self.backend = "gloo" if config.backend == "gloo" else "nccl"  # in use
        check_backend(self.backend)
        self._config = config
        self._store = RendezvousStore(host)
        self._run = uuid.uuid4().hex[:8]  # samplers outlive relays, and an epoch is used once
        self._groups: dict[tuple[Peer, ...], _Group] = {}
        self._turn = asyncio.Lock()  # one slab at a time is broadcast: what is announced first comes first
        # Held while a new group awaits its first slab. What NCCL sets a group up with may wait for all that runs on a card: for
        # another group's broadcast too, which a sampler has entered ahead of its turn, and whose turn is after this.
        self._forming = asyncio.Lock()
        self._ahead = asyncio.Semaphore(AHEAD)
        self.epoch = 0
        self.bytes_sent = 0
        self.notice = ""  # what the user should know, until somebody has told him
        self.home = torch.device("cuda", max(torch.cuda.device_count() - 1, 0))  # for slabs that come from the host

    async def send(
        self,
        handle: SlabHandle,
        slab: Slab,
        peers: Sequence[Peer],
        canary: asyncio.Future[Canary] | None = None,
        times: Times | None = None,
    ) -> Times:
        """Returns when every peer that is still serving has installed the slab. It is announced before it is asked for.
        canary: for a handle without. times: to be filled in meanwhile, and returned.

        Raises InstallError naming the samplers that refuse it; RendezvousError, PeerDiedError or DeadlineError when
        ROUNDS broadcasts have failed: over NCCL, and then, if the configuration allows it, through the host too. A broadcast
        over NCCL that took the whole deadline is not tried again where there is the host to go through.
        """
        times, failures = times or Times(), list[WeftError]()
        refusals: dict[Peer, WeftError] = {}
        while waiting := [peer for peer in peers if peer not in refusals and self._waits(peer, handle.ref)]:
            if len(failures) >= ROUNDS or (failures and self._time_is_up(failures[-1])):
                self._fall_back(failures[-1])
                failures.clear()
            try:
                refusals |= await self._round(handle, slab, waiting, times, canary)
            except (PeerDiedError, RendezvousError, DeadlineError) as error:
                failures.append(error)
        if refusals:
            said = "; ".join(f"{peer}: {type(error).__name__}: {error}" for peer, error in refusals.items())
            raise InstallError(f"{handle.ref} is not installed everywhere: {said}")
        return times

    def dissolve(self, gone: Callable[[Peer], bool] = lambda _: True) -> None:
        """End every group with such a peer."""
        for group in [group for group in self._groups.values() if any(map(gone, group.peers))]:
            self._end(group)

    @property
    def _may_fall_back(self) -> bool:
        return self.backend == "nccl" and self._config.backend == "nccl-or-gloo"

    def _time_is_up(self, failure: WeftError) -> bool:
        """Whoever waits for this slab waits little longer than one deadline."""
        return self._may_fall_back and isinstance(failure, RendezvousError | DeadlineError)

    def _fall_back(self, failure: WeftError) -> None:
        """From now on through the host. Raises `failure` if there is nothing to fall back to, or it is not allowed."""
        if not self._may_fall_back:
            raise failure
        self.notice = f"parameter sync goes through the host (gloo) from now on, since over {self.backend}: {failure}"
        _log.warning("%s", self.notice)
        self.backend = "gloo"
        self.dissolve()

    def _waits(self, peer: Peer, ref: AdapterRef) -> bool:
        return peer.serving and peer.installed.get(ref.name) != ref

    async def _round(
        self, handle: SlabHandle, slab: Slab, peers: list[Peer], times: Times, canary: asyncio.Future[Canary] | None
    ) -> dict[Peer, WeftError]:
        """Why each that refuses it does. Raises when a peer died or the broadcast failed: those that still wait are asked
        again, since the dead one may have been between the root and these."""
        async with self._ahead, AsyncExitStack() as alone:
            await alone.enter_async_context(self._forming)
            group = self._groups.pop(tuple(peers), None) or self._form(tuple(peers))
            self._groups[group.peers] = group  # the last is the one used last
            group.under_way += 1
            if group.announced:
                await alone.aclose()
            try:
                errors = await self._guarded(group, self._announce_and_broadcast(handle, slab, group, times))
            finally:
                group.under_way -= 1
        if not errors:
            errors = await self._install(handle, peers, times, canary)
        if errors:
            self._end(group)
        for error in errors.values():
            if isinstance(error, PeerDiedError):
                raise error
        return errors

    async def _announce_and_broadcast(
        self, handle: SlabHandle, slab: Slab, group: _Group, times: Times
    ) -> dict[Peer, WeftError]:
        """Why those that cannot receive it cannot. The broadcast begins at once, and meets those that have been told of it."""
        started = time.monotonic()
        sequence = group.announced
        group.announced += 1
        failure: WeftError | None = None

        async def take() -> WeftError | None:
            try:
                await asyncio.to_thread(slab)  # while those before are broadcast
            except WeftError as error:
                return error
            return None

        async def broadcast() -> None:
            nonlocal failure
            async with self._turn:  # which those have who announced before
                try:
                    if (error := await taking) is not None:
                        raise error
                    await asyncio.to_thread(lambda: group.link.broadcast(self._placed(slab())))
                except WeftError as error:  # raised below, unless it is that the group was ended: a TaskGroup would wrap it
                    failure = error
                    self._end(group)  # or the next slab would come in place of this one
                except BaseException:
                    self._end(group)
                    raise

        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(take())
            tasks.create_task(broadcast())
            told = partial(self._receive, handle, group, sequence)
            errors = await _ask(group.peers, told, self._config.deadline_s)
            if errors:
                self._end(group)  # who was told waits no more, and is told again
        if errors:
            return errors
        if failure is not None:
            raise failure
        times.broadcast += time.monotonic() - started
        times.sent.set()
        self.bytes_sent += handle.nbytes * _workers(group.peers)
        return {}

    async def _install(
        self, handle: SlabHandle, peers: list[Peer], times: Times, canary: asyncio.Future[Canary] | None
    ) -> dict[Peer, WeftError]:
        """Why those that have not installed it have not."""
        started, ref = time.monotonic(), handle.ref

        async def tell() -> None:
            if handle.canary_logprob is None and canary is not None:
                came = await asyncio.shield(canary)  # this wait may be ended, and others wait for it too
                for peer, error in (await ask_all(peers, came, self._config.deadline_s)).items():
                    _log.warning("%s was not told the canary of %s: %s", peer, ref, error)  # its install says so in the end

        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(tell())
            errors = await _ask(peers, lambda _: Install(ref), self._config.deadline_s)
            telling.cancel()
        times.install += time.monotonic() - started
        for peer in peers:
            if peer not in errors:
                peer.installed[ref.name] = ref
        return errors

    async def _guarded(self, group: _Group, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` in this group. When a peer is lost meanwhile, or the work fails, the group ends, and with it the work."""

        async def watch(peer: Peer) -> None:
            await peer.client.wait_lost()
            self._end(group)

        failure: WeftError | None = None
        async with asyncio.TaskGroup() as tasks:
            watches = [tasks.create_task(watch(peer)) for peer in group.peers]
            try:
                result = await work
            except WeftError as error:  # raised below: a TaskGroup would wrap it
                self._end(group)
                failure = error
            except BaseException:
                self._end(group)
                raise
            finally:
                for task in watches:
                    task.cancel()
        if failure is not None:
            raise failure
        return result

    def _form(self, peers: tuple[Peer, ...]) -> _Group:
        self.epoch += 1
        epoch = f"{self._run}-{self.epoch}"
        size, config = _workers(peers) + 1, self._config
        link = BroadcastGroup(self._store.address, epoch, 0, size, self.backend, config.deadline_s)
        idle = [group for group in self._groups.values() if not group.under_way]
        for group in idle[: max(len(self._groups) + 1 - MAX_GROUPS, 0)]:  # those in use end by themselves
            self._end(group)
        return _Group(epoch, peers, link)

    def _end(self, group: _Group) -> None:
        if self._groups.get(group.peers) is group:
            del self._groups[group.peers]
            group.link.close()  # first: what sees it dissolved says that it did not form, for which NCCL would be to blame
            self._store.dissolve(group.epoch)

    def _receive(self, handle: SlabHandle, group: _Group, sequence: int, peer: Peer) -> Receive:
        return Receive(
            handle=handle,
            store=self._store.address,
            epoch=group.epoch,
            rank=1 + _workers(group.peers[: group.peers.index(peer)]),
            world_size=1 + _workers(group.peers),
            backend=self.backend,
            deadline_s=self._config.deadline_s,
            sequence=sequence,
        )

    def _placed(self, slab: torch.Tensor) -> torch.Tensor:
        if self.backend == "gloo":
            return slab.cpu()
        return slab if slab.is_cuda else slab.to(self.home)


def _workers(peers: Sequence[Peer]) -> int:
    return sum(peer.workers for peer in peers)


async def ask_all(peers: Sequence[Peer], message: Any, deadline_s: float) -> dict[Peer, WeftError]:
    """The same message to all at once; why each that has not done so has not."""
    return await _ask(peers, lambda _: message, deadline_s)


async def _ask(peers: Sequence[Peer], message: Callable[[Peer], Any], deadline_s: float) -> dict[Peer, WeftError]:
    async with asyncio.TaskGroup() as tasks:
        answers = {peer: tasks.create_task(peer.ask(message(peer), deadline_s)) for peer in peers}
    return {peer: error for peer, task in answers.items() if (error := task.result()) is not None}
