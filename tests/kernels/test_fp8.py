"""Rows in e4m3 and their products, in plain torch."""

import pytest
import torch

from weft.kernels import fp8

torch.set_num_threads(1)


def test_a_row_comes_back_within_e4m3s_rounding_whatever_its_size() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1.0, 0.0, 3e4, 7.0])[:, None]
    q, scales = fp8.quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and scales.shape == (5, 1) and scales.dtype == torch.float32
    back = q.float() * scales
    assert ((back - x).abs() <= x.abs() / 16 + scales * 2**-9).all()  # 3 bits of mantissa, and steps of 2^-9 near zero
    assert back[2].eq(0).all()


def test_a_product_is_that_of_what_the_rows_stand_for() -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight, bias = torch.randn(3, 32, generator=draw), torch.randn(48, 32, generator=draw), torch.randn(48, generator=draw)
    rows, narrow = fp8.quantize_rows(x), fp8.quantize_weight(weight)
    out = fp8.product(*rows, narrow.rows, narrow.row_scales, bias, torch.float32)
    assert float((out - (x @ weight.t() + bias)).norm() / out.norm()) < 0.05
    back = fp8.product(*fp8.quantize_rows(out), narrow.columns, narrow.column_scales, None, torch.float32)
    assert float((back - out @ weight).norm() / back.norm()) < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(bad: float) -> None:
    x, weight = torch.ones(3, 32), fp8.quantize_weight(torch.eye(32))
    x[1, 5] = bad
    out = fp8.product(*fp8.quantize_rows(x), weight.rows, weight.row_scales, None, torch.float32)
    assert not out[1].isfinite().any() and torch.allclose(out[[0, 2]], torch.ones(2, 32))


def test_a_weight_that_no_product_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8.quantize_weight(torch.ones(24, 32))
