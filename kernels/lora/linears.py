"""Multi-adapter linear on CUDA: three kernels (triton.py) beside the base's own matrix products.

T tokens, P parts of a fused linear, R rank, I in, O out.

    forward     low  = s x A^T             shrink    x is read once for all parts
                out  = low B^T (+ bias)    expand    written first ...
                out += x W^T               cuBLAS    ... so that the base's product adds it in its epilogue
    backward    dlow = s dY B              shrink
                dX   = dlow A, += dY W     expand, cuBLAS
                dA  += dlow^T x            outer     straight into the adapter's fp32 gradient slab
                dB  += dY^T low            outer
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.layers.triton import swiglu, swiglu_gradient, swiglu_rows
from weft.kernels.lora.tables import Group, Tables
from weft.kernels.lora.triton import expand, outer, shrink


def slab_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, group: Group, source: Callable[[], Tensor] | None = None
) -> Tensor:
    """x [T, I] -> [T, sum(widths)], as `weft.kernels.lora.fused_lora_linear` with the pairs of `tables`. Backward adds to the
    gradient slabs itself. source: makes x again for the backward, so that x need not be kept."""
    assert not weight.requires_grad, "the base is frozen: its weight would get no gradient here"
    if not group.touched:
        return F.linear(x, weight, bias)
    out: Tensor = _SlabLinear.apply(x, tables.anchor, weight, bias, tables, group, source)
    return out


def slab_swiglu_linear(gate_up: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, group: Group) -> Tensor:
    """`slab_linear` of silu(gate) * up, gate_up [T, 2 I]."""
    if not group.touched:
        return F.linear(swiglu(gate_up), weight, bias)
    out: Tensor = _SlabSwigluLinear.apply(gate_up, tables.anchor, weight, bias, tables, group)
    return out


class _SlabLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tables: Tables,
        group: Group,
        source: Callable[[], Tensor] | None,
    ) -> Tensor:
        low = shrink(x, tables, group, "a")
        out = expand(low, tables, group, "b", bias)
        out.addmm_(x, weight.t())
        ctx.save_for_backward(x if source is None else None, low, weight)
        ctx.tables, ctx.group, ctx.source = tables, group, source
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight = ctx.saved_tensors
        tables, group = ctx.tables, ctx.group
        grad_out = grad_out.contiguous()
        grad_low = shrink(grad_out, tables, group, "b")
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = expand(grad_low, tables, group, "a", None)
            grad_x.addmm_(grad_out, weight)
        if group.trains:
            outer(grad_low, ctx.source() if x is None else x, tables, group, "grad_a")
            ctx.source = None  # what it holds may go
            outer(low, grad_out, tables, group, "grad_b")
        return grad_x, None, None, None, None, None, None


class _SlabSwigluLinear(torch.autograd.Function):
    """SwiGLU and the linear after it: its output is not kept, for SwiGLU's own backward has all it takes to write it again."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, group: Group
    ) -> Tensor:
        x = swiglu_rows(gate_up)
        low = shrink(x, tables, group, "a")
        out = expand(low, tables, group, "b", bias)
        out.addmm_(x, weight.t())
        ctx.save_for_backward(gate_up, low, weight)
        ctx.tables, ctx.group = tables, group
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, low, weight = ctx.saved_tensors
        tables, group = ctx.tables, ctx.group
        grad_out = grad_out.contiguous()
        grad_low = shrink(grad_out, tables, group, "b")
        grad_x = expand(grad_low, tables, group, "a", None)
        grad_x.addmm_(grad_out, weight)
        grad_gate_up, x = swiglu_gradient(gate_up, grad_x)
        if group.trains:
            outer(grad_low, x, tables, group, "grad_a")
            outer(low, grad_out, tables, group, "grad_b")
        return grad_gate_up, None, None, None, None, None
