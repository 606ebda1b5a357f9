"""What a sampler's worker receives over one broadcast group."""

import queue
import random

import torch

from weft.actors.slab_line import Line
from weft.transport.broadcast import BroadcastGroup, RendezvousStore
from weft.transport.errors import PeerDiedError

PATIENT_S = 200.0  # of what a quiet machine does within a second


def test_slabs_are_who_they_are_in_whatever_order_they_are_asked_for() -> None:
    store = RendezvousStore()
    root = BroadcastGroup(store.address, "1", 0, 2, "gloo", PATIENT_S)
    group = {"store": store.address, "epoch": "1", "rank": 1, "world_size": 2, "backend": "gloo", "deadline_s": PATIENT_S}
    line = Line(group, torch.device("cpu"), None)
    came: queue.Queue[tuple[int, torch.Tensor | BaseException]] = queue.Queue()
    slabs = [torch.full((number + 1,), number, dtype=torch.uint8) for number in range(12)]

    def ask(number: int, nbytes: int) -> None:
        line.receive(number, nbytes, lambda slab: came.put((number, slab)))

    order = list(range(12))
    random.Random(1).shuffle(order)
    for number in order:
        ask(number, len(slabs[number]))
    for slab in slabs:
        root.broadcast(slab)
    for expected, slab in enumerate(slabs):
        number, got = came.get(timeout=PATIENT_S)
        assert number == expected and isinstance(got, torch.Tensor) and torch.equal(got, slab)
    ask(13, 1)  # number 12 never comes
    line.close()
    number, error = came.get(timeout=PATIENT_S)
    assert number == 13 and isinstance(error, PeerDiedError)
    root.close()
