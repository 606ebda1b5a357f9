"""The roll call, on a store in memory and on the real one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from weft.transport.errors import RendezvousError
from weft.transport.rendezvous import answer, dissolve, split_address

LONG_S = 100.0  # a deadline that nothing here may reach


class DictStore:
    """A key store in memory; `gone`: as torch's is when its host has died."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.gone = False

    def set(self, key: str, value: str) -> None:
        self._there()
        self.keys[key] = value

    def check(self, keys: list[str]) -> bool:
        self._there()
        return all(key in self.keys for key in keys)

    def _there(self) -> None:
        if self.gone:
            raise RuntimeError("Connection reset by peer\nframe #0: ...")


def test_everybody_goes_on_when_the_last_has_come():
    store, order = DictStore(), []

    def member(rank: int) -> None:
        answer(store, "1", rank, 8, LONG_S)
        order.append(rank)

    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(member, rank) for rank in range(7)]
        while len(store.keys) < 7:
            time.sleep(0.001)
        assert order == []
        member(7)
        for one in waiting:
            one.result()
    assert sorted(order) == list(range(8))


def test_a_member_that_never_comes_is_named_by_who_came_within_the_deadline():
    store = DictStore()
    store.set("1/came/2", "1")
    started = time.monotonic()
    with pytest.raises(RendezvousError, match=r"group 1 did not form in 0.2 s: ranks \[0, 2\] of 4 came"):
        answer(store, "1", 0, 4, 0.2)
    assert 0.2 <= time.monotonic() - started < LONG_S


def test_dissolving_ends_those_that_wait_and_those_that_come_late():
    store = DictStore()
    timer = threading.Timer(0.05, dissolve, (store, "1"))
    timer.start()
    with pytest.raises(RendezvousError, match="group 1 was dissolved while rank 1 waited"):
        answer(store, "1", 1, 3, LONG_S)
    answers = [f"1/came/{rank}" for rank in (0, 2)]
    for key in answers:
        store.set(key, "1")
    with pytest.raises(RendezvousError, match="group 1 is dissolved: rank 1 came too late"):
        answer(store, "1", 1, 3, LONG_S)
    timer.join()


def test_a_member_that_leaves_waits_no_more():
    left = threading.Event()
    left.set()
    with pytest.raises(RendezvousError, match="rank 0 left group 1 before it formed"):
        answer(DictStore(), "1", 0, 2, LONG_S, left)


def test_epochs_do_not_hear_each_other():
    store = DictStore()
    answer(store, "1", 0, 1, 1)
    with pytest.raises(RendezvousError, match=r"ranks \[1\] of 2 came"):
        answer(store, "2", 1, 2, 0.02)


def test_a_store_that_is_gone_is_a_rendezvous_error_of_one_line():
    store = DictStore()
    store.gone = True
    with pytest.raises(RendezvousError, match="the rendezvous store of group 1 is gone: Connection reset by peer$"):
        answer(store, "1", 0, 2, LONG_S)


@pytest.mark.parametrize(("address", "parts"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("::1:65535", ("::1", 65535))])
def test_an_address_is_a_host_and_a_port(address: str, parts: tuple[str, int]):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:port", "host:0", "host:65536"])
def test_what_is_no_address_is_a_value_error(address: str):
    with pytest.raises(ValueError, match="must be host:port"):
        split_address(address)
