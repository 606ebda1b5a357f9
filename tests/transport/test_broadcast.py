"""Groups over gloo between processes; each test may kill its own. Run as a program, this file is one member."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from weft.transport import broadcast, rendezvous
from weft.transport.broadcast import BroadcastGroup, RendezvousStore
from weft.transport.errors import DeadlineError, PeerDiedError, RendezvousError, WeftError

LONG_S = 120.0  # a deadline that nothing here may reach, however slowly processes start
SIZES = (1, 7, 1_000_003)


class MemberProcess:
    """One member in a process of its own, forked from a server that has imported torch. It does as it is told."""

    def __init__(self) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["pytest", "weft.transport.broadcast"])
        self._pipe, theirs = forks.Pipe()
        self._process = forks.Process(target=runpy.run_path, args=(__file__, {"PIPE": theirs}, "__main__"), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, *words: Any) -> None:
        self._pipe.send(words)

    def hear(self) -> Any:
        assert self._pipe.poll(LONG_S), "the member says nothing"
        return self._pipe.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _be_a_member(pipe: Connection) -> None:
    torch.set_num_threads(1)
    groups: dict[str, BroadcastGroup] = {}
    hosted: list[RendezvousStore] = []
    for word, *rest in iter(pipe.recv, ("end",)):
        if word == "join":
            store, epoch, rank, size, deadline_s = rest
            groups[epoch] = BroadcastGroup(store, epoch, rank, size, "gloo", deadline_s)
        elif word == "receive":
            epoch, size, dtype = rest
            tensor = torch.zeros(size, dtype=dtype)
            try:
                groups[epoch].broadcast(tensor)
                pipe.send(tensor.view(torch.uint8).numpy().tobytes())
            except WeftError as error:
                pipe.send(error)
        elif word == "host":
            hosted.append(RendezvousStore())
            pipe.send(hosted[-1].address)
        elif word == "default-group":
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            pipe.send(dist.get_backend())
        elif word == "reduce":
            one = torch.ones(1)
            dist.all_reduce(one)
            pipe.send(one.item())


@pytest.fixture
def member() -> Iterator[Callable[[], MemberProcess]]:
    started: list[MemberProcess] = []

    def make() -> MemberProcess:
        started.append(MemberProcess())
        return started[-1]

    yield make
    for process in started:
        process.kill()


@pytest.fixture
def store() -> RendezvousStore:
    return RendezvousStore()


Make = Callable[[], MemberProcess]


def formed(store: RendezvousStore | str, epoch: str, members: list[MemberProcess]) -> BroadcastGroup:
    """Rank 0 of a group of these, through its first broadcast."""
    size, address = len(members) + 1, store if isinstance(store, str) else store.address
    for rank, process in enumerate(members, 1):
        process.tell("join", address, epoch, rank, size, LONG_S)
        process.tell("receive", epoch, 1, torch.uint8)
    root = BroadcastGroup(address, epoch, 0, size, "gloo", LONG_S)
    root.broadcast(torch.tensor([5], dtype=torch.uint8))
    assert [process.hear() for process in members] == [b"\x05"] * len(members)
    return root


def test_every_dtype_and_odd_size_arrives_to_the_bit(member: Make, store: RendezvousStore):
    members = [member() for _ in range(3)]
    root = formed(store, "1", members)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for size in SIZES:
            bits = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
            for process in members:
                process.tell("receive", "1", size, dtype)
            root.broadcast(bits.view(dtype))
            assert {process.hear() for process in members} == {bits.numpy().tobytes()}
    statistics = root.statistics()
    assert (statistics.broadcasts, statistics.nbytes) == (10, 1 + 7 * sum(SIZES))
    root.close()


def test_a_tensor_of_any_shape_is_its_bytes_and_an_empty_one_is_nothing(member: Make, store: RendezvousStore):
    process = member()
    root = formed(store, "1", [process])
    process.tell("receive", "1", 6, torch.float32)
    root.broadcast(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    assert process.hear() == torch.arange(6, dtype=torch.float32).numpy().tobytes()
    process.tell("receive", "1", 0, torch.float32)
    root.broadcast(torch.zeros(0))
    assert process.hear() == b""
    root.close()


def test_a_group_of_one_needs_nobody():
    BroadcastGroup("127.0.0.1:1", "1", 0, 1).broadcast(torch.ones(3))


def test_a_member_that_never_comes_is_told_by_the_ranks_that_came(member: Make, store: RendezvousStore, monkeypatch):
    monkeypatch.setattr(broadcast, "_GRACE_S", LONG_S)  # the roll call is the first to say it, however busy the machine
    process = member()
    process.tell("join", store.address, "1", 2, 3, LONG_S)
    process.tell("receive", "1", 1, torch.uint8)
    store._store.wait(["1/came/2"], timedelta(seconds=LONG_S))
    root = BroadcastGroup(store.address, "1", 0, 3, "gloo", 5.0)
    with pytest.raises(RendezvousError, match=r"group 1 did not form in .* s: ranks \[0, 2\] of 3 came"):
        root.broadcast(torch.zeros(1, dtype=torch.uint8))
    store.dissolve("1")
    error = process.hear()  # long before its own deadline
    assert type(error) is RendezvousError and "dissolved" in str(error)
    root.close()


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roll call that looks at nothing but whether its member has left."""

    def answer(*words: Any) -> None:
        words[-1].wait(LONG_S)
        raise RendezvousError("it has left")

    monkeypatch.setattr(rendezvous, "answer", answer)


@pytest.mark.usefixtures("blind")
def test_a_group_dissolved_while_it_forms_is_a_rendezvous_error_whoever_sees_it_first(store: RendezvousStore):
    group = BroadcastGroup(store.address, "1", 0, 2, "gloo", LONG_S)
    store.dissolve("1")
    with pytest.raises(RendezvousError, match="group 1: it was dissolved"):
        group.broadcast(torch.zeros(1))
    group.close()


@pytest.mark.usefixtures("blind")
def test_a_group_that_does_not_form_in_time_is_a_rendezvous_error_whoever_sees_it_first(store: RendezvousStore):
    group = BroadcastGroup(store.address, "1", 0, 2, "gloo", 0.1)
    with pytest.raises(RendezvousError):  # that it did not form, or did not even come to the store
        group.broadcast(torch.zeros(1))
    group.close()


def test_a_deadline_that_has_passed_before_anything_is_done_is_a_rendezvous_error(store: RendezvousStore, monkeypatch):
    monkeypatch.setattr(broadcast, "_GRACE_S", LONG_S)  # it is the group's own thread that says it
    group = BroadcastGroup(store.address, "1", 0, 2, "gloo", 1e-6)
    with pytest.raises(RendezvousError):
        group.broadcast(torch.zeros(1))
    group.close()


def test_kill_9_in_the_middle_is_an_error_within_the_deadline_and_a_new_epoch_works(member: Make, store: RendezvousStore):
    members = [member() for _ in range(3)]
    root = formed(store, "1", members)
    members[1].kill()  # while the others wait for the next broadcast
    for index in (0, 2):
        members[index].tell("receive", "1", 1_000_003, torch.uint8)
    started = time.monotonic()
    with pytest.raises((PeerDiedError, DeadlineError)):
        for _ in range(100):  # the kernel may take the first ones for it
            root.broadcast(torch.zeros(1_000_003, dtype=torch.uint8))
    assert time.monotonic() - started < LONG_S
    with pytest.raises(PeerDiedError, match="is of no more use"):
        root.broadcast(torch.zeros(1))
    root.close()
    store.dissolve("1")  # as whoever hosts it does: rank 3 waits for rank 1, which may have got nothing to pass on
    survivors = [members[0], members[2]]
    for process in survivors:
        process.hear()
    formed(store, "2", [*survivors, member()]).close()


def test_who_waits_in_a_broadcast_hears_that_the_group_is_dissolved(member: Make, store: RendezvousStore):
    """Of a death NCCL tells the survivors nothing: their relay does, which knows of it."""
    process = member()
    root = formed(store, "1", [process])
    process.tell("receive", "1", 1, torch.uint8)
    store.dissolve("1")
    error = process.hear()  # long before its own deadline
    assert type(error) is PeerDiedError and "group 1: it was dissolved" in str(error)
    root.close()


def test_who_waits_in_a_broadcast_hears_that_the_stores_host_is_gone(member: Make):
    host, process = member(), member()
    host.tell("host")
    root = formed(host.hear(), "1", [process])
    process.tell("receive", "1", 1, torch.uint8)
    host.kill()
    error = process.hear()  # long before its own deadline
    assert type(error) is PeerDiedError and "rendezvous store" in str(error)
    root.close()


def test_a_member_that_falls_silent_ends_the_broadcast_by_the_deadline(member: Make, store: RendezvousStore):
    process = member()
    root = formed(store, "1", [process])
    root._deadline_s = 2.0  # of each broadcast from now on: it is not for how long processes start
    os.kill(process._process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises((DeadlineError, PeerDiedError)):
        for _ in range(100):  # the kernel may take the first ones for it
            root.broadcast(torch.zeros(10_000_019, dtype=torch.uint8))
    assert time.monotonic() - started < LONG_S / 2
    root.close()


def test_who_leaves_a_group_waits_for_no_silent_member(member: Make, store: RendezvousStore):
    process = member()
    root = formed(store, "1", [process])
    os.kill(process._process.pid, signal.SIGSTOP)
    store.dissolve("1")
    with pytest.raises(PeerDiedError):
        for _ in range(100):  # the kernel may take the first ones for it
            root.broadcast(torch.zeros(10_000_019, dtype=torch.uint8))
    started = time.monotonic()
    root.close()
    assert time.monotonic() - started < LONG_S / 2


def test_close_from_another_thread_ends_the_wait_and_nothing_else_has_the_first_word(store: RendezvousStore):
    root, ended = BroadcastGroup(store.address, "1", 0, 2, "gloo", LONG_S), threading.Event()

    class Left(threading.Event):
        """Whoever closes is held up here, and whoever looks for this has all the time to say what it makes of it."""

        def set(self) -> None:
            super().set()
            ended.wait(LONG_S)

    def close_meanwhile() -> None:
        store._store.wait(["1/came/0"], timedelta(seconds=LONG_S))
        root.close()

    root._left = Left()
    with ThreadPoolExecutor(1) as others:
        closing = others.submit(close_meanwhile)
        with pytest.raises(PeerDiedError, match="group 1 was closed during a broadcast"):
            root.broadcast(torch.zeros(1))
        ended.set()
        closing.result()


def test_a_group_that_forms_as_it_is_closed_is_left_too(member: Make, store: RendezvousStore, monkeypatch):
    """Those that wait in it hear that; and letting go of it, whenever that is, waits for nobody."""
    process, form = member(), BroadcastGroup._form
    process.tell("join", store.address, "1", 1, 2, LONG_S)
    process.tell("receive", "1", 1, torch.uint8)
    group = BroadcastGroup(store.address, "1", 0, 2, "gloo", LONG_S)

    def form_as_it_is_closed(self: BroadcastGroup, end: float) -> Any:
        made = form(self, end)
        self.close()
        return made

    monkeypatch.setattr(BroadcastGroup, "_form", form_as_it_is_closed)
    with pytest.raises(PeerDiedError, match="group 1"):
        group.broadcast(torch.zeros(1, dtype=torch.uint8))
    error = process.hear()  # long before its own deadline
    assert type(error) is PeerDiedError, error


@pytest.mark.parametrize("formed_before", [False, True])
def test_a_close_just_as_a_broadcast_begins_ends_it_at_once(member: Make, store: RendezvousStore, monkeypatch, formed_before):
    """The clock is what a broadcast looks at first: at that moment another thread closes the group."""
    root = formed(store, "1", [member()]) if formed_before else BroadcastGroup(store.address, "1", 0, 2, "gloo", LONG_S)
    now = time.monotonic

    def close_meanwhile() -> float:
        monkeypatch.setattr(time, "monotonic", now)
        closing = threading.Thread(target=root.close)
        closing.start()
        closing.join()
        return now()

    monkeypatch.setattr(time, "monotonic", close_meanwhile)
    with pytest.raises(PeerDiedError, match="group 1"):  # at its deadline it would be another
        root.broadcast(torch.zeros(1))


def test_a_store_that_is_not_there_is_a_rendezvous_error_at_once():
    with socket.socket() as taken:  # and nobody listens there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        group, started = BroadcastGroup(address, "1", 0, 2, "gloo", LONG_S), time.monotonic()
        with pytest.raises(RendezvousError, match=f"no rendezvous store at {address}"):
            group.broadcast(torch.zeros(1))
        assert time.monotonic() - started < LONG_S / 2
        group.close()


def test_the_default_group_of_the_process_is_left_alone(member: Make, store: RendezvousStore):
    process = member()
    process.tell("default-group")
    assert process.hear() == "gloo"
    before = dist.is_initialized()
    root = formed(store, "1", [process])
    root.close()
    process.tell("reduce")
    assert process.hear() == 1.0
    assert dist.is_initialized() == before


def test_a_groups_own_stream_waits_for_what_the_callers_has_queued(store: RendezvousStore, monkeypatch: pytest.MonkeyPatch):
    """What the caller's stream still works on may be the very memory that is to be written."""
    waited: list[tuple[object, object]] = []

    class Stream:
        def __init__(self, *_: object, **__: object) -> None: ...

        def wait_stream(self, other: object) -> None:
            waited.append((self, other))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    group = BroadcastGroup(store.address, "1", 0, 2)
    there = type("OnGpu", (), {"is_cuda": True, "device": "cuda:0"})()
    for callers in ("one", "another"):
        with group._own_stream(there, callers) as own:
            assert waited[-1] == (own, callers)


def test_the_store_listens_on_its_host_alone(store: RendezvousStore):
    host, port = store.address.split(":")
    assert host == "127.0.0.1"
    outward = host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):  # a machine without a network
        probe.connect(("192.0.2.1", 9))
        outward = probe.getsockname()[0]
    if outward != host:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((outward, int(port)), timeout=5)


def test_a_port_in_use_is_an_os_error_that_names_it(store: RendezvousStore):
    port = int(store.address.split(":")[1])
    with pytest.raises(OSError, match=f"cannot host a rendezvous store at 127.0.0.1:{port}"):
        RendezvousStore("127.0.0.1", port)


def test_a_backend_that_is_not_there_is_a_value_error(store: RendezvousStore):
    with pytest.raises(ValueError, match="backend='mpi': must be one of gloo, nccl"):
        BroadcastGroup(store.address, "1", 0, 2, "mpi")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend='nccl': needs a GPU"):
            BroadcastGroup(store.address, "1", 0, 2, "nccl")


if __name__ == "__main__":
    _be_a_member(PIPE)  # type: ignore[name-defined]  # noqa: F821 given by MemberProcess
