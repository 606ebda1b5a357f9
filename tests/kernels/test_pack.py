"""kernels.pack: a slab into one slot of stacked buffers."""

import pytest
import torch

from weft.kernels.pack import scatter_slab

torch.set_num_threads(1)
SHAPES = ((5, 3), (7, 5), (1, 9))


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_lands_scaled_once_and_padding_is_zero(rank: int, dtype: torch.dtype) -> None:
    pairs = [(torch.randn(rank, i).to(dtype), torch.randn(o, rank).to(dtype)) for o, i in SHAPES]
    slab = torch.cat([tensor.flatten() for pair in pairs for tensor in pair])
    kept = slab.clone()
    empty = {"fill_value": torch.nan, "dtype": dtype}
    stacked = [(torch.full((4, 8, i), **empty), torch.full((4, o, 8), **empty)) for o, i in SHAPES]
    for _ in range(2):  # writing twice folds the scale once
        scatter_slab(slab, SHAPES, rank, [(a[2], b[2]) for a, b in stacked], scale=2.5)
    assert torch.equal(slab, kept)
    for (a, b), (a_all, b_all) in zip(pairs, stacked, strict=True):
        assert torch.equal(a_all[2, :rank], a)
        assert torch.equal(b_all[2, :, :rank], (b.float() * 2.5).to(dtype))
        assert not a_all[2, rank:].any()
        assert not b_all[2, :, rank:].any()
        assert a_all[[0, 1, 3]].isnan().all()
        assert b_all[[0, 1, 3]].isnan().all()


def test_the_product_is_the_adapters_own() -> None:
    rank, scale, (o, i) = 3, 0.5, (7, 5)
    a, b, x = torch.randn(rank, i), torch.randn(o, rank), torch.randn(11, i)
    a_to, b_to = torch.full((8, i), torch.nan), torch.full((o, 8), torch.nan)
    scatter_slab(torch.cat([a.flatten(), b.flatten()]), [(o, i)], rank, [(a_to, b_to)], scale)
    torch.testing.assert_close(x @ a_to.T @ b_to.T, scale * (x @ a.T @ b.T))


def test_a_slab_of_another_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="slab has 30"):
        scatter_slab(torch.zeros(30), [(5, 3)], 2, [(torch.zeros(2, 3), torch.zeros(5, 2))], 1.0)
