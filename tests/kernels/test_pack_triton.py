"""kernels.pack against the reference: through Triton's interpreter, or on the card."""

import pytest
import torch
from torch import Tensor

from weft.kernels.pack import Places, pair_targets, reference
from weft.kernels.pack import triton as kernels
from weft.kernels.pack.places import BLOCK

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter's bfloat16 rounds otherwise
SHAPES = ((70, 33), (64, 136), (1, 9), (24, 600))  # (out, in)


def places_of(stacked: list[tuple[Tensor, Tensor]], rank: int, absent: int = -1) -> Places:
    targets, offset = [], 0
    for n, ((a, b), (o, i)) in enumerate(zip(stacked, SHAPES, strict=True)):
        targets += pair_targets(a, b, None if n == absent else offset, rank, i)
        offset += 0 if n == absent else rank * (o + i)
    return Places(tuple(targets))


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("absent", [-1, 1])
@pytest.mark.parametrize(("narrow", "wide"), [(torch.float32, torch.float32), (torch.float32, NARROW), (NARROW, NARROW)])
def test_one_launch_writes_the_bits_of_the_reference(rank: int, absent: int, narrow: torch.dtype, wide: torch.dtype) -> None:
    numel = sum(rank * (o + i) for n, (o, i) in enumerate(SHAPES) if n != absent)
    slab = torch.randn(numel, device=DEVICE).to(narrow)
    empty = {"fill_value": torch.nan, "dtype": wide, "device": DEVICE}
    made = [[(torch.full((3, 16, i), **empty), torch.full((3, o, 16), **empty)) for o, i in SHAPES] for _ in range(2)]
    places = places_of(made[0], rank, absent)
    sums = places.sums()
    assert kernels.scatter_slab(slab, places, 1, 0.75, sums).item() == 0
    assert kernels.sum_slot(places, 1) == sums.sum() == reference.sum_slot(places, 1)
    reference.scatter_slab(slab, places_of(made[1], rank, absent), 1, 0.75)
    for found, wanted in zip(made[0], made[1], strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one[1], other[1])
            assert one[[0, 2]].isnan().all()


def test_what_changes_in_a_slot_changes_its_sum_and_so_do_two_elements_that_change_places() -> None:
    made = {"device": DEVICE, "dtype": NARROW}
    stacked = [(torch.randn(2, 16, i).to(**made), torch.randn(2, o, 16).to(**made)) for o, i in SHAPES]
    places = places_of(stacked, 5)
    before = int(kernels.sum_slot(places, 1))
    stacked[0][0][0].zero_()
    assert int(kernels.sum_slot(places, 1)) == before, "another slot"
    last = stacked[3][1][1].view(-1)
    last[-1] += 1
    assert int(kernels.sum_slot(places, 1)) != before
    last[-1] -= 1
    one, other = stacked[1][0][1, 3, 7].clone(), stacked[2][1][1, 0, 2].clone()
    before = int(kernels.sum_slot(places, 1))
    stacked[1][0][1, 3, 7], stacked[2][1][1, 0, 2] = other, one
    assert int(kernels.sum_slot(places, 1)) != before


@pytest.mark.parametrize("count", [1, 7, BLOCK, 3 * BLOCK + 5])
def test_a_sum_of_words_is_that_of_the_reference(count: int) -> None:
    words = torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16, device=DEVICE)
    assert kernels.sum_words(words) == reference.sum_words(words)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_told(bad: float) -> None:
    slab = torch.randn(sum(5 * (o + i) for o, i in SHAPES), device=DEVICE)
    slab[777] = bad
    stacked = [(torch.zeros(1, 16, i, device=DEVICE), torch.zeros(1, o, 16, device=DEVICE)) for o, i in SHAPES]
    assert kernels.scatter_slab(slab, places_of(stacked, 5), 0, 1.0).item() == 1
