"""Products of a frozen base in FP8 (e4m3): rows of activations and of weights, each with a scale of its own in fp32.

T tokens, I in, O out. A row's scale is its largest magnitude / 448; a row with a number that is not finite has the scale inf,
so that its products are not finite either, and no other row's change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.fp8 import reference
from weft.kernels.fp8.reference import LARGEST, Fp8Weight

__all__ = ["LARGEST", "Fp8Weight", "can_multiply", "product", "quantize_rows", "quantize_weight"]

STEP = 16  # of what both sides of a product must be multiples


def can_multiply(device: torch.device) -> bool:
    """Whether the device has products of e4m3 with a scale for each row (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, I] -> e4m3 [T, I], scales fp32 [T, 1]: x is about the first times the second."""
    if x.is_cuda:
        from weft.kernels.fp8 import triton  # needs a GPU's driver, or its interpreter

        return triton.quantize_rows(x)
    return reference.quantize_rows(x)


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """weight [O, I], for products with it and with its transpose. Raises ValueError for sizes that those cannot have."""
    if weight.shape[0] % STEP or weight.shape[1] % STEP:
        raise ValueError(f"a weight of {tuple(weight.shape)}: FP8 products need both to be multiples of {STEP}")
    rows, row_scales = reference.quantize_rows(weight)
    columns, column_scales = reference.quantize_rows(weight.t().contiguous())
    return Fp8Weight(rows, row_scales, columns, column_scales)


def product(x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
            fast: bool = True) -> Tensor:  # fmt: skip
    """x e4m3 [T, I], scales [T, 1], weight e4m3 [O, I], weight_scales [O, 1], bias [O] -> [T, O] of `dtype`, on CUDA bfloat16.
    fast: sums are kept in the matrix units, with fewer bits than fp32."""
    if x.is_cuda:
        return torch._scaled_mm(x, weight.t(), scales, weight_scales.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast)
    return reference.product(x, scales, weight, weight_scales, bias, dtype)
