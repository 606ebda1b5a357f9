"""Products with a frozen weight, added to what an output holds already. On CUDA cuBLAS by the fastest of the algorithms that it
offers, measured at a shape's first use: what its heuristics choose is up to several per cent slower.

T tokens, I in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FEWEST = 4096  # tokens from which choosing pays: below, launches count for more


def add_product(out: Tensor, x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """out [T, O] += x W^T, x [T, I], weight [O, I], in place. transposed: x W, x [T, O], out [T, I]."""
    if _chosen(x):
        from weft.kernels.lora import cublas  # needs CUDA's libraries

        if cublas.product(out, x, weight, transposed, add=True):
            return out
    return out.addmm_(x, weight if transposed else weight.t())


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, I] -> x W^T + bias [T, O]. The weight gets no gradient."""
    if not _chosen(x):
        return torch.nn.functional.linear(x, weight, bias)
    out: Tensor = _FrozenLinear.apply(x, weight, bias)
    return out


def can_add_fp8(x: Tensor, weight: Tensor) -> bool:
    """Whether `add_fp8_product` is there for these: on Hopper with CUDA 12.9 or later."""
    if not x.is_cuda:
        return False
    from weft.kernels.lora import cublas  # needs CUDA's libraries

    return cublas.can_add_fp8(x, weight)


def add_fp8_product(out: Tensor, x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """out [T, O] += the product of rows in e4m3: x [T, I] and weight [O, I] with scales [T, 1] and [O, 1], in place."""
    from weft.kernels.lora import cublas  # needs CUDA's libraries

    return cublas.add_fp8_product(out, x, scales, weight, weight_scales)


def _chosen(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] >= FEWEST


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, False) if bias is None else add_product(bias.expand(x.shape[0], -1).contiguous(), x, weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _product(grad_out.contiguous(), weight, True), None, None


def _product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    from weft.kernels.lora import cublas  # needs CUDA's libraries

    out = x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])
    if cublas.product(out, x, weight, transposed, add=False):
        return out
    return torch.mm(x, weight if transposed else weight.t(), out=out)
