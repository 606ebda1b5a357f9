"""Multi-adapter linear on CUDA: three kernels (triton.py) beside the base's own matrix products.

T tokens, P parts of a fused linear, R rank, I in, O out.

    forward     low  = s x A^T             shrink    x is read once for all parts
                out  = low B^T (+ bias)    expand    written first ...
                out += x W^T               cuBLAS    ... so that the base's product adds it in its epilogue
    backward    dlow = s dY B              shrink
                dX   = dlow A, += dY W     expand, cuBLAS
                dA  += dlow^T x            outer     straight into the adapter's fp32 gradient slab
                dB  += dY^T low            outer
An MLP is one function, for SwiGLU's backward makes three of these sums in passing (mlp.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.kernels.layers.triton import swiglu, swiglu_rows
from weft.kernels.lora.mlp import swiglu_outer
from weft.kernels.lora.tables import Group, Tables
from weft.kernels.lora.triton import expand, outer, shrink

Frozen = tuple[Tensor, Tensor | None]  # weight [O, I], bias [O]


def slab_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, group: Group, source: Callable[[], Tensor] | None = None
) -> Tensor:
    """x [T, I] -> [T, sum(widths)], as `weft.kernels.lora.fused_lora_linear` with the pairs of `tables`. Backward adds to the
    gradient slabs itself. source: makes x again for the backward, so that x need not be kept."""
    assert not weight.requires_grad, "the base is frozen: its weight would get no gradient here"
    if not group.touched:
        return torch.nn.functional.linear(x, weight, bias)
    out: Tensor = _SlabLinear.apply(x, tables.anchor, weight, bias, tables, group, source)
    return out


def slab_mlp(
    x: Tensor,
    gate_up: Frozen,
    down: Frozen,
    tables: Tables,
    groups: tuple[Group, Group],
    source: Callable[[], Tensor] | None = None,
) -> Tensor:
    """x [T, H] -> [T, O]: gate and up, SwiGLU, down, each linear as `slab_linear` has it."""
    if not all(group.touched and group.trains for group in groups):
        hidden = slab_linear(x, *gate_up, tables, groups[0], source)
        return slab_linear(swiglu(hidden), *down, tables, groups[1])
    out: Tensor = _SlabMlp.apply(x, tables.anchor, gate_up, down, tables, groups, source)
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
        out = expand(low, tables, group, "b", bias).addmm_(x, weight.t())
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
            grad_x = expand(grad_low, tables, group, "a", None).addmm_(grad_out, weight)
        if group.trains:
            outer(grad_low, ctx.source() if x is None else x, tables, group, "grad_a")
            ctx.source = None  # what it holds may go
            outer(low, grad_out, tables, group, "grad_b")
        return grad_x, None, None, None, None, None, None


class _SlabMlp(torch.autograd.Function):
    """SwiGLU's output is not kept, for its own backward has all that it takes to make it again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        gate_up: Frozen,
        down: Frozen,
        tables: Tables,
        groups: tuple[Group, Group],
        source: Callable[[], Tensor] | None,
    ) -> Tensor:
        low = shrink(x, tables, groups[0], "a")
        hidden = expand(low, tables, groups[0], "b", gate_up[1]).addmm_(x, gate_up[0].t())
        active = swiglu_rows(hidden)
        low_down = shrink(active, tables, groups[1], "a")
        out = expand(low_down, tables, groups[1], "b", down[1]).addmm_(active, down[0].t())
        ctx.save_for_backward(x if source is None else None, low, hidden, low_down)
        ctx.weights, ctx.tables, ctx.groups, ctx.source = (gate_up[0], down[0]), tables, groups, source
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, low, hidden, low_down = ctx.saved_tensors
        tables, (gate_up, down), weights = ctx.tables, ctx.groups, ctx.weights
        grad_out = grad_out.contiguous()
        grad_low = shrink(grad_out, tables, down, "b")
        grad_active = expand(grad_low, tables, down, "a", None).addmm_(grad_out, weights[1])
        outer(low_down, grad_out, tables, down, "grad_b")
        grad_hidden = swiglu_outer(hidden, grad_active, low, grad_low, tables, gate_up, down)
        del grad_active
        grad_low = shrink(grad_hidden, tables, gate_up, "b")
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = expand(grad_low, tables, gate_up, "a", None).addmm_(grad_hidden, weights[0])
        outer(grad_low, ctx.source() if x is None else x, tables, gate_up, "grad_a")
        ctx.source = None  # what it holds may go
        return grad_x, None, None, None, None, None, None
