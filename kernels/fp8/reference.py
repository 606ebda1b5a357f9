"""Plain torch: rows in e4m3 with a scale each, and the product of two such. T tokens, I in, O out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
SMALLEST_ROW = 1e-30  # a row of zeros has this largest magnitude


@dataclass(frozen=True)
class Fp8Weight:
    """One frozen weight [O, I] twice, as the forward and as the input gradient read it: each has the scales of its own rows."""

    rows: Tensor  # e4m3 [O, I]
    row_scales: Tensor  # fp32 [O, 1]
    columns: Tensor  # e4m3 [I, O]
    column_scales: Tensor  # fp32 [I, 1]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `weft.kernels.fp8.quantize_rows` says."""
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest.clamp_min(SMALLEST_ROW), torch.inf)
    return (wide * (LARGEST / largest)).to(torch.float8_e4m3fn), largest / LARGEST


def product(
    x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `weft.kernels.fp8.product` says, with sums in fp32."""
    out = (x.float() * scales) @ (weight.float() * weight_scales).t()
    return (out if bias is None else out + bias.float()).to(dtype)
