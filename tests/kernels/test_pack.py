"""kernels.pack: a slab into one slot of stacked buffers."""

import pytest
import torch
from torch import Tensor

from weft.kernels.pack import Places, pair_targets, scatter_slab

torch.set_num_threads(1)
SHAPES = ((5, 3), (7, 5), (1, 9))  # (out, in) of each linear
SLOTS, WIDEST = 4, 8


def stacks(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Of each linear A [N, S, I] and B [N, O, S], poisoned."""
    empty = {"fill_value": torch.nan, "dtype": dtype}
    return [(torch.full((SLOTS, WIDEST, i), **empty), torch.full((SLOTS, o, WIDEST), **empty)) for o, i in SHAPES]


def places_of(stacked: list[tuple[Tensor, Tensor]], rank: int, absent: int | None = None) -> Places:
    targets, offset = [], 0
    for n, ((a, b), (o, i)) in enumerate(zip(stacked, SHAPES, strict=True)):
        targets += pair_targets(a, b, None if n == absent else offset, rank, i)
        offset += 0 if n == absent else rank * (o + i)
    return Places(tuple(targets))


def flat(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([tensor.flatten() for pair in pairs for tensor in pair])


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_lands_scaled_once_and_padding_is_zero(rank: int, dtype: torch.dtype) -> None:
    pairs = [(torch.randn(rank, i).to(dtype), torch.randn(o, rank).to(dtype)) for o, i in SHAPES]
    slab = flat(pairs)
    kept, stacked = slab.clone(), stacks(dtype)
    for _ in range(2):  # writing twice folds the scale once
        assert scatter_slab(slab, places_of(stacked, rank), 2, scale=2.5).item() == 0
    assert torch.equal(slab, kept)
    for (a, b), (a_all, b_all) in zip(pairs, stacked, strict=True):
        assert torch.equal(a_all[2, :rank], a)
        assert torch.equal(b_all[2, :, :rank], (b.float() * 2.5).to(dtype))
        assert not a_all[2, rank:].any()
        assert not b_all[2, :, rank:].any()
        assert a_all[[0, 1, 3]].isnan().all()
        assert b_all[[0, 1, 3]].isnan().all()


def test_a_linear_that_the_adapter_leaves_alone_is_zeroed() -> None:
    pairs = [(torch.randn(3, i), torch.randn(o, 3)) for o, i in SHAPES]
    stacked = stacks(torch.float32)
    scatter_slab(flat([pairs[0], pairs[2]]), places_of(stacked, 3, absent=1), 0, scale=1.0)
    assert not stacked[1][0][0].any() and not stacked[1][1][0].any()
    assert torch.equal(stacked[2][1][0, :, :3], pairs[2][1])


def test_one_of_several_samplers_gets_its_part_of_each_matrix() -> None:
    rank, (o, i) = 3, (6, 8)
    a, b = torch.randn(rank, i), torch.randn(o, rank)
    a_part, b_part = torch.full((1, 4, 4), torch.nan), torch.full((1, 2, 4), torch.nan)
    columns = Places(tuple(pair_targets(a_part, torch.empty(1, o, 4), 0, rank, i, column=4)))
    scatter_slab(flat([(a, b)]), columns, 0, scale=1.0)
    assert torch.equal(a_part[0, :rank], a[:, 4:])
    rows = Places((*pair_targets(torch.empty(1, 4, i), b_part, 0, rank, i, row=2), *columns.targets[1:]))
    scatter_slab(flat([(a, b)]), rows, 0, scale=2.0)
    assert torch.equal(b_part[0, :, :rank], 2 * b[2:4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_told(bad: float) -> None:
    slab = flat([(torch.randn(3, i), torch.randn(o, 3)) for o, i in SHAPES])
    slab[-1] = bad
    assert scatter_slab(slab, places_of(stacks(torch.float32), 3), 1, scale=1.0).item() == 1


def test_the_product_is_the_adapters_own() -> None:
    rank, scale, (o, i) = 3, 0.5, (7, 5)
    a, b, x = torch.randn(rank, i), torch.randn(o, rank), torch.randn(11, i)
    a_to, b_to = torch.full((1, 8, i), torch.nan), torch.full((1, o, 8), torch.nan)
    scatter_slab(flat([(a, b)]), Places(tuple(pair_targets(a_to, b_to, 0, rank, i))), 0, scale)
    torch.testing.assert_close(x @ a_to[0].T @ b_to[0].T, scale * (x @ a.T @ b.T))


def test_a_slab_that_is_too_short_is_refused() -> None:
    places = Places(tuple(pair_targets(torch.zeros(1, 2, 3), torch.zeros(1, 5, 2), 0, 2, 3)))
    with pytest.raises(AssertionError, match="slab has 10"):
        scatter_slab(torch.zeros(10), places, 0, 1.0)
