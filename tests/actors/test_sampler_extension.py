"""Slots of vLLM's stacked buffers, without an engine: what stands in them is what was published, or it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from weft.actors import sampler_extension as extension
from weft.actors.checksum import checksum
from weft.actors.lora import SlabLayout
from weft.kernels.pack import Places, pair_targets

SHAPES = {"up": (24, 16), "down": (16, 24)}
RANK, SLOTS = 4, 2


class Manager:
    """vLLM's tables."""

    def __init__(self) -> None:
        self.lora_slots = SLOTS
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self._registered_adapters: dict[int, Any] = {}
        self._active_adapters: dict[int, None] = {}

    def remove_adapter(self, lora_id: int) -> None:
        self._registered_adapters.pop(lora_id, None)


class Worker(extension.SamplerExtension):
    def __init__(self) -> None:
        self.device, self.rank = torch.device("cpu"), 0
        self.lora_config = type("LoraConfig", (), {"max_lora_rank": RANK})
        self.weft_manager = Manager()
        self.layout = SlabLayout.build(SHAPES, tuple(SHAPES), RANK)
        self.stacks, targets = [], []
        for entry in self.layout.entries:
            out, into = SHAPES[entry.name]
            a, b = torch.zeros(SLOTS, RANK, into), torch.zeros(SLOTS, out, RANK)
            self.stacks += [a, b]
            targets += pair_targets(a, b, entry.a_offset, RANK, into)
        self.weft_forms[tuple(SHAPES), RANK] = extension._Form(self.layout, Places(tuple(targets)))

    def receive(self, lora_id: int, change: Callable[[torch.Tensor], None] = lambda slab: None) -> str:
        """Announce a random slab, which comes at once, changed on its way; returns its key when that is over."""
        slab = torch.randn(self.layout.numel, generator=torch.Generator().manual_seed(lora_id))
        said = {"dtype": "float32", "rank": RANK, "scale": 2.0, "modules": list(SHAPES), "nbytes": slab.nbytes}
        said["checksum"], key = int(checksum(slab)), f"a/0/{lora_id}"
        change(slab)
        self.slab_receive(key, said, None, slab.numpy().tobytes(), lora_id, 0)
        self.weft_arrivals[key].settled.exception(200)
        return key


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_what_was_packed_is_proven_until_somebody_writes_to_its_slot(worker: Worker) -> None:
    for lora_id in (1, 2):
        assert worker.slab_install(worker.receive(lora_id), lora_id) == extension.INSTALLED
    assert [worker.slab_prove(lora_id) for lora_id in (1, 2)] == ["", ""]
    worker.stacks[3][0, 5, 1] += 1e-3
    assert "slot 0 has been written to since" in worker.slab_prove(1)
    assert worker.slab_prove(2) == ""
    worker.weft_manager.lora_index_to_id[1] = 7
    assert "slot 1 has become that of 7" in worker.slab_prove(2)
    for lora_id in (1, 2):
        worker.slab_remove(lora_id)
    assert not worker.weft_proofs


def swap_two(slab: torch.Tensor) -> None:
    slab[3], slab[200] = slab[200].clone(), slab[3].clone()


@pytest.mark.parametrize("change", [swap_two, lambda slab: slab[5].mul_(1.5)])
def test_bytes_that_changed_on_their_way_are_refused_and_their_slot_is_free(worker: Worker, change: Any) -> None:
    key = worker.receive(1, change)
    with pytest.raises(ValueError, match="a/0/1: the bytes that came are not those that the trainer published"):
        worker.slab_install(key, 1)
    assert not worker.weft_manager._registered_adapters and worker.weft_manager.lora_index_to_id == [None] * SLOTS
    assert worker.slab_install(worker.receive(2), 2) == extension.INSTALLED


def test_a_slot_that_another_writer_reaches_while_it_is_filled_is_refused(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = extension.scatter_slab

    def packing(slab: torch.Tensor, places: Places, slot: int, scale: float, sums: torch.Tensor) -> torch.Tensor:
        fault = pack(slab, places, slot, scale, sums)
        worker.stacks[0][slot, 1].zero_()
        return fault

    monkeypatch.setattr(extension, "scatter_slab", packing)
    key = worker.receive(1)
    with pytest.raises(ValueError, match="what stands in the engine's buffers is not what was packed into them"):
        worker.slab_install(key, 1)
    assert not worker.weft_manager._registered_adapters and worker.weft_manager.lora_index_to_id == [None] * SLOTS
