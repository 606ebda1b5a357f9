"""Multi-adapter linear on CUDA: three kernels (triton.py) beside the base's own matrix products.

T tokens, P parts of a fused linear, R rank, I in, O out.

    forward     low  = s x A^T             shrink    x is read once for all parts
                out  = low B^T (+ bias)    expand    written first ...
                out += x W^T               cuBLAS    ... so that the base's product adds it in its epilogue
    backward    dlow = s dY B              shrink
                dX   = dlow A, += dY W     expand, cuBLAS
                dA  += dlow^T x            outer     straight into the adapter's fp32 gradient slab
                dB  += dY^T low            outer

Around SwiGLU the deltas of gate and up, and of its gradient, are added by SwiGLU's own kernels (swiglu.py) instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.layers.triton import swiglu
from weft.kernels.lora.swiglu import lora_swiglu, lora_swiglu_gradient
from weft.kernels.lora.tables import Group, Tables
from weft.kernels.lora.triton import expand, outer, shrink


class Frozen(NamedTuple):
    """One linear of the base, and its place in the tables."""

    weight: Tensor
    bias: Tensor | None
    group: Group


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


def slab_mlp(x: Tensor, gate_up: Frozen, down: Frozen, tables: Tables, source: Callable[[], Tensor] | None = None) -> Tensor:
    """x [T, H] -> down(silu(gate) * up) [T, H]; gate and up one linear, each with the adapters of `tables`."""
    if not (gate_up.group.touched or down.group.touched):
        return F.linear(swiglu(F.linear(x, gate_up.weight, gate_up.bias)), down.weight, down.bias)
    out: Tensor = _SlabMlp.apply(x, tables.anchor, gate_up, down, tables, source)
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


class _SlabMlp(torch.autograd.Function):
    """SwiGLU's output is not kept: its own backward has all it takes to write it again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        gate_up: Frozen,
        down: Frozen,
        tables: Tables,
        source: Callable[[], Tensor] | None,
    ) -> Tensor:
        low = shrink(x, tables, gate_up.group, "a")
        hidden = F.linear(x, gate_up.weight, gate_up.bias)
        active = lora_swiglu(hidden, low, tables, gate_up.group)
        low_down = shrink(active, tables, down.group, "a")
        out = expand(low_down, tables, down.group, "b", down.bias)
        out.addmm_(active, down.weight.t())
        ctx.save_for_backward(x if source is None else None, hidden, low, low_down)
        ctx.gate_up, ctx.down, ctx.tables, ctx.source = gate_up, down, tables, source
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, low, low_down = ctx.saved_tensors
        tables, gate_up, down = ctx.tables, ctx.gate_up, ctx.down
        grad_out = grad_out.contiguous()
        grad_low = shrink(grad_out, tables, down.group, "b")
        grad_active = grad_out @ down.weight
        grad_hidden, active = lora_swiglu_gradient(hidden, low, gate_up.group, grad_active, grad_low, down.group, tables)
        del grad_active
        if down.group.trains:
            outer(grad_low, active, tables, down.group, "grad_a")
            outer(low_down, grad_out, tables, down.group, "grad_b")
        del active
        grad_low = shrink(grad_hidden, tables, gate_up.group, "b")
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = expand(grad_low, tables, gate_up.group, "a", None)
            grad_x.addmm_(grad_hidden, gate_up.weight)
        if gate_up.group.trains:
            outer(grad_low, ctx.source() if x is None else x, tables, gate_up.group, "grad_a")
            ctx.source = None  # what it holds may go
            outer(low, grad_hidden, tables, gate_up.group, "grad_b")
        return grad_x, None, None, None, None, None
