"""One tensor from rank 0 to all others, or everybody's sum to all, over gloo or NCCL. Only this file imports torch.distributed.

    relay    store = RendezvousStore("127.0.0.1")                       sampler's worker
             group = BroadcastGroup(store.address, "7", 0, 3, "gloo", 30.0)    BroadcastGroup(address, "7", 1, 3, "gloo", 30.0)
             group.broadcast(slab)                                             .broadcast(buffer)

Calls block, so callers use a side thread. Neither a peer's death nor NCCL, which knows no timeout, can make them hang: the
work is done on a thread of the group's own, which is left behind when the deadline passes; and before it, when the store says
that the group is dissolved, or is gone itself, for NCCL tells the survivors of a death nothing, and its kernel would keep their
cards busy. Groups are stateless: they are no default process group, and leave the one that vLLM has in the same process alone.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from weft.transport import rendezvous
from weft.transport.errors import DeadlineError, PeerDiedError, RendezvousError, WeftError
from weft.transport.variables import variables

_Work = Callable[[torch.Tensor], Any]  # begins it in the process group
# of what, until when, how it went, and the stream of the caller, if any
_Job = tuple[torch.Tensor, _Work, float, "queue.SimpleQueue[BaseException | None]", Any]
dist: Any = torch.distributed  # its type hints leave out half of what is used here
BACKENDS = ("gloo", "nccl")
_GRACE_S = 0.5  # gloo's own timeout comes first and says more
_LOOK_S = 0.5  # after which it is looked whether the group is still there, and so often from then on
_NEVER = timedelta(days=365)
# A watchdog of torch's ends the whole process when a peer dies. Here it is a vLLM worker with requests of all adapters.
_NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


@dataclass(frozen=True)
class BroadcastStatistics:
    """seconds: inside broadcasts, waiting for members included."""

    broadcasts: int
    nbytes: int
    seconds: float


def check_backend(backend: str) -> None:
    """Raises ValueError for a backend that this process cannot use."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise ValueError("backend='nccl': needs a GPU and a torch with NCCL, and this process has not both (gloo it has)")


class RendezvousStore:
    """The key store that groups form on, hosted by this process on `host` alone."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Raises OSError for an address that cannot be had."""
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise OSError(error.errno, f"cannot host a rendezvous store at {host}:{port}: {error.strerror}") from error
        chosen = listener.getsockname()[1]
        # Handing the socket over is what keeps it off other interfaces: on its own, the store listens on all of them.
        self._store = dist.TCPStore(host, chosen, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        self.address = f"{host}:{chosen}"

    def dissolve(self, epoch: str) -> None:
        """Whoever waits for the group of `epoch`, or comes later, gets RendezvousError; who waits in it, PeerDiedError soon."""
        rendezvous.dissolve(self._store, epoch)


class BroadcastGroup:
    """Member `rank` of the group `epoch`; rank 0 sends. Forms at the first broadcast. One broadcast at a time."""

    def __init__(
        self, store: str, epoch: str, rank: int, world_size: int, backend: str = "gloo", deadline_s: float = 30.0
    ) -> None:
        """store: "host:port" of a RendezvousStore; deadline_s: of each broadcast, forming included. Raises ValueError."""
        self._host, self._port = rendezvous.split_address(store)
        check_backend(backend)
        assert 0 <= rank < world_size, (rank, world_size)
        assert deadline_s > 0, deadline_s
        self._epoch, self._rank, self._world_size = epoch, rank, world_size
        self._backend, self._deadline_s = backend, deadline_s
        self._group: Any = None
        self._store: Any = None
        self._broken: str = ""
        self._left = threading.Event()
        self._stream: Any = None  # NCCL's work waits for the stream that asks for it: not for the one that a model runs on
        self._outcome: queue.SimpleQueue[BaseException | None] | None = None
        self._jobs: queue.SimpleQueue[_Job | None] | None = None  # of the group's thread, once there is one
        self._broadcasts, self._nbytes, self._seconds = 0, 0, 0.0

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's bytes into every other rank's tensor: contiguous, any dtype, as many bytes at each end. Blocking. On a GPU
        it begins when the caller's stream has done what it was given, and what came is there for every stream.

        Raises RendezvousError (the group did not form), PeerDiedError (a member went, the group was dissolved, or its store is
        gone), DeadlineError. After any of them the group is of no more use: close it and form another under a new epoch.
        """
        self._do(tensor, self._begin_broadcast)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The sum of all ranks' tensors in place of each, the same bits everywhere. Contiguous, of one type and length.
        Blocking; raises as `broadcast` does."""
        self._do(tensor, self._begin_all_reduce)

    def _do(self, tensor: torch.Tensor, work: _Work) -> None:
        assert tensor.is_contiguous(), "a slab is one flat buffer"
        assert self._outcome is None, "one broadcast at a time"
        outcome = self._outcome = queue.SimpleQueue()
        if self._broken or tensor.numel() == 0 or self._world_size == 1:  # `close` marks it before it looks for who waits
            self._outcome = None
            if self._broken:
                raise PeerDiedError(f"group {self._epoch} is of no more use: {self._broken}")
            return
        start = time.monotonic()
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(self._jobs,), name=f"broadcast-{self._epoch}", daemon=True).start()
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._jobs.put((tensor, work, start + self._deadline_s, outcome, stream))
        if self._left.is_set():  # and `close` may not have seen the thread
            self._jobs.put(None)
        try:
            error = self._wait(outcome)
        finally:
            self._outcome = None
        self._seconds += time.monotonic() - start
        if error is not None:
            self._broken = self._broken or str(error)
            raise error
        self._broadcasts += 1
        self._nbytes += tensor.nbytes

    def _wait(self, outcome: queue.SimpleQueue[BaseException | None]) -> BaseException | None:
        """How it went, or why it is not waited for any longer."""
        at_once = min(_LOOK_S, self._deadline_s)
        with contextlib.suppress(queue.Empty):
            return outcome.get(timeout=at_once)
        threading.Thread(target=self._look, args=(outcome,), name=f"look-{self._epoch}", daemon=True).start()
        with contextlib.suppress(queue.Empty):
            return outcome.get(timeout=self._deadline_s + _GRACE_S - at_once)
        if self._is_forming():
            return RendezvousError(f"group {self._epoch} did not form in {self._deadline_s:g} s")
        return DeadlineError(f"group {self._epoch}: no broadcast within {self._deadline_s:g} s")

    def _look(self, outcome: queue.SimpleQueue[BaseException | None]) -> None:
        """Tell whoever waits for `outcome` when the group is no more. On a thread of its own while that lasts, and on a
        connection of its own: on the group's, torch may be waiting for what the dead would have said."""
        why = "it was dissolved"
        try:
            store = self._connect(self._deadline_s)
            while self._outcome is outcome and not rendezvous.is_dissolved(store, self._epoch):
                self._left.wait(_LOOK_S)
        except RendezvousError as error:
            why = str(error)
        if self._outcome is outcome:
            outcome.put((RendezvousError if self._is_forming() else PeerDiedError)(f"group {self._epoch}: {why}"))

    def _is_forming(self) -> bool:
        """Whoever is the first to see that it will come to nothing says what the others would: RendezvousError."""
        return self._group is None and not self._left.is_set()

    def close(self) -> None:
        """Leave the group. From another thread: ends the broadcast that is under way there with PeerDiedError."""
        self._broken = self._broken or "it was closed"
        if (outcome := self._outcome) is not None:  # first: the roll call, which hears of it by what follows, has another word
            outcome.put(PeerDiedError(f"group {self._epoch} was closed during a broadcast"))
        self._left.set()
        jobs, groups = self._jobs, [self._group] if self._group is not None else []
        self._group = self._store = None
        if jobs is not None:
            jobs.put(None)
        if groups:
            threading.Thread(target=_abandon, args=(groups,), name=f"abort-{self._epoch}", daemon=True).start()

    def statistics(self) -> BroadcastStatistics:
        return BroadcastStatistics(broadcasts=self._broadcasts, nbytes=self._nbytes, seconds=self._seconds)

    def _serve(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        """The group's thread, until `close`."""
        while (job := jobs.get()) is not None:
            self._run(*job)
            del job  # a slab is held no longer than it takes
        groups, self._group = [self._group], None
        if groups[0] is not None:  # it formed while `close` looked
            _abandon(groups)

    def _run(
        self,
        tensor: torch.Tensor,
        work: _Work,
        end: float,
        outcome: queue.SimpleQueue[BaseException | None],
        callers: Any,
    ) -> None:
        """The body of one broadcast, or of one sum."""
        try:
            with self._own_stream(tensor, callers):
                if self._group is None:
                    self._group = self._form(end)
                if self._broken:
                    raise PeerDiedError(f"group {self._epoch}: {self._broken}")
                self._finish(work(tensor.detach().view(-1)), tensor, end)
            outcome.put(None)
        except WeftError as error:
            outcome.put(error)
        except RuntimeError as error:  # torch's only word for a timeout and for a peer's death
            why = f"group {self._epoch}, rank {self._rank} of {self._world_size}: {str(error).partition(chr(10))[0]}"
            late = RendezvousError if self._is_forming() else DeadlineError
            outcome.put(late(why) if time.monotonic() >= end else PeerDiedError(why))
        except BaseException as error:  # noqa: BLE001 this thread has no one else to tell; broadcast() raises it
            outcome.put(error)

    def _own_stream(self, tensor: torch.Tensor, callers: Any) -> contextlib.AbstractContextManager[Any]:
        if not tensor.is_cuda:
            return contextlib.nullcontext()
        torch.cuda.set_device(tensor.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device, priority=-1)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(callers)  # the memory may be one that it still works on
        return torch.cuda.stream(self._stream)

    def _form(self, end: float) -> Any:
        """Meet the others, then open the process group."""
        store = self._store = self._connect(_remaining(end))  # the group's threads use it until they end
        rendezvous.answer(store, self._epoch, self._rank, self._world_size, _remaining(end), self._left)
        prefix = dist.PrefixStore(f"{self._epoch}/group", store)
        if self._backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _NEVER  # the deadline is ours
            with variables(_NCCL_ENVIRONMENT):
                return dist.ProcessGroupNCCL(prefix, self._rank, self._world_size, options)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_route(self._host, self._port))]
        options._timeout = timedelta(seconds=_remaining(end))
        return dist.ProcessGroupGloo(prefix, self._rank, self._world_size, options)

    def _connect(self, limit_s: float) -> Any:
        """A connection to the store."""
        try:
            socket.create_connection((self._host, self._port), timeout=limit_s).close()  # torch would try for long, and loudly
            return dist.TCPStore(self._host, self._port, is_master=False, timeout=timedelta(seconds=self._deadline_s))
        except (OSError, RuntimeError) as error:
            raise RendezvousError(f"no rendezvous store at {self._host}:{self._port}: {error}") from error

    def _begin_broadcast(self, flat: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._group.broadcast([flat.view(torch.uint8)], options)

    def _begin_all_reduce(self, flat: torch.Tensor) -> Any:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        return self._group.allreduce([flat], options)

    def _finish(self, work: Any, tensor: torch.Tensor, end: float) -> None:
        if self._backend == "gloo":
            work.wait(timedelta(seconds=_remaining(end)))
            return
        work.wait()  # this stream waits for NCCL's, and this thread for this stream, without Python's lock: in a sampler the
        torch.cuda.current_stream(tensor.device).synchronize()  # thread that decodes has it, and each look would wait for it
        if self._broken or not work.is_completed():  # an abort ends the wait as well; a fault is raised by the question
            raise PeerDiedError(f"group {self._epoch}: {self._broken or 'its broadcast was given up'}")


def _remaining(end: float) -> float:
    """Seconds until then, and never none: what takes a time limit takes no other."""
    return max(end - time.monotonic(), 0.001)


def _abandon(groups: list[Any]) -> None:
    """NCCL's abort can wait for a dead peer, and gloo's end, when the last that has it lets go, for a silent one: nobody waits
    for them."""
    groups.pop().abort()


def _route(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
