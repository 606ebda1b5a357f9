"""LoRA by groups inside vLLM on a CPU: the same as token by token."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers.utils import LoRAMapping

from weft.actors.sampler_lora import GroupedLora

SLOTS, RANK, INPUT = 5, 8, 12
RANKS = (3, 8, 1, 5, 2)  # of the adapter in each slot; the rest of a place is zero
IDS = [11, 12, 13, 14, 15]


@pytest.fixture(autouse=True)
def the_same_numbers_each_time() -> None:
    """Of many sums one rounds worse than all before it."""
    torch.manual_seed(0)


def stacks(widths: tuple[int, ...], seed: int = 0) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUT, generator=generator) for _ in widths)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in widths)
    for slot, rank in enumerate(RANKS):
        for part in a:
            part[slot, 0, rank:] = 0
        for part in b:
            part[slot, 0, :, rank:] = 0
    return a, b


def wanted(y: torch.Tensor, x: torch.Tensor, slots: list[int], a: tuple, b: tuple, scale: float = 1.0) -> torch.Tensor:
    """Each token alone."""
    result = y.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            result[token] += scale * torch.cat([bs[slot, 0] @ (as_[slot, 0] @ x[token]) for as_, bs in zip(a, b, strict=True)])
    return result


def wrapper(slots: list[int]) -> GroupedLora:
    made = GroupedLora(128, 128, "cpu")
    mapped(made, slots)
    return made


def mapped(made: GroupedLora, slots: list[int]) -> None:
    ids = tuple(IDS[slot] if slot >= 0 else 0 for slot in slots)
    made.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(IDS), SLOTS + 1, 100)


@pytest.mark.parametrize(
    "slots",
    [
        [0],
        [3, 3, 3],
        [4, 0, 2, 0, 4, 4, 1],
        [-1, 2, -1, 2],
        [-1, 1, 0, 1, -1],
        [1] * 60 + [0, 2, 3, 4],
        [1] * 60 + [0, -1, 2, 3, 4],
        [-1, -1],
    ],
)
@pytest.mark.parametrize("widths", [(7,), (6, 4, 4)])
def test_every_token_gets_its_own_adapter_and_no_other(slots: list[int], widths: tuple[int, ...]) -> None:
    a, b = stacks(widths)
    x, y = torch.randn(len(slots), INPUT), torch.randn(len(slots), sum(widths))
    found = y.clone()
    wrapper(slots).add_lora_linear(found, x, a, b, 0.5, widths)
    torch.testing.assert_close(found, wanted(y, x, slots, a, b, 0.5), rtol=1e-5, atol=1e-5)


def test_places_that_no_token_names_are_never_read() -> None:
    a, b = stacks((6, 4))
    for part in (*a, *b):
        part[3] = float("nan")
    slots = [0, 1, 2, 4, 0]
    x, y = torch.randn(5, INPUT), torch.zeros(5, 10)
    wrapper(slots).add_lora_linear(y, x, a, b, 1.0, (6, 4))
    assert y.isfinite().all()


def test_a_version_put_into_a_place_is_seen_at_once_and_so_is_a_change_of_the_batch() -> None:
    (a, b), slots = stacks((7,)), [0, 1, 0]
    made, x = wrapper(slots), torch.randn(3, INPUT)

    def check(slots: list[int]) -> None:
        y = torch.zeros(3, 7)
        made.add_lora_linear(y, x, a, b, 1.0, (7,))
        torch.testing.assert_close(y, wanted(torch.zeros(3, 7), x, slots, a, b), rtol=1e-5, atol=1e-5)

    check(slots)
    a[0][1, 0, :7].copy_(torch.randn(7, INPUT))
    b[0][1, 0].copy_(torch.randn(7, RANK))
    check(slots)
    mapped(made, [2, 1, 4])
    check([2, 1, 4])


@pytest.mark.parametrize("later", [[2], [0, 2, 2], [4] * 60, [4] * 60 + [0], [-1, 2, 0]])
def test_a_batch_of_fewer_adapters_than_the_last_is_no_different(later: list[int]) -> None:
    a, b = stacks((6, 4))
    made = wrapper([0, 2, 3, 4, 4])
    for slots in ([0, 2, 3, 4, 4], later, [1, 4]):
        mapped(made, slots)
        x, y = torch.randn(len(slots), INPUT), torch.randn(len(slots), 10)
        found = y.clone()
        made.add_lora_linear(found, x, a, b, 1.0, (6, 4))
        torch.testing.assert_close(found, wanted(y, x, slots, a, b), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_zeros_adds_nothing() -> None:
    a, b = stacks((7,))
    a[0].zero_()
    y = torch.ones(2, 7)
    wrapper([0, 1]).add_lora_linear(y, torch.randn(2, INPUT), a, b, 1.0, (7,))
    assert (y == 1).all()
