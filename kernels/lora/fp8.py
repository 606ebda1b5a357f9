"""Multi-adapter linears on CUDA over a base in FP8: each is one autograd function with what stands before it, for rows are
quantised where they are made. The adapters' kernels read the forward's rows in FP8 too, and gradients in bf16, which are there.

T tokens, H hidden size, I in, O out, R rank.

    forward     q, scales = rows of x      kernels.fp8
                out  = q W^T               cuBLAS    both sides in FP8
                low  = s q A^T             shrink
                out += low B^T             expand    in place, for an FP8 product has no sum in its epilogue
    backward    g, scales = rows of dY     kernels.fp8
                dX   = g W, += dlow A      cuBLAS, expand; dlow = s dY B   shrink
                dA, dB                     outer
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.kernels.fp8 import Fp8Weight, product
from weft.kernels.fp8.triton import norm_rows, quantize_rows, swiglu_rows
from weft.kernels.layers.triton import norm_gradient, swiglu_gradient
from weft.kernels.lora.tables import Group, Tables
from weft.kernels.lora.triton import expand, outer, shrink

Rows = tuple[Tensor, Tensor]  # e4m3 [T, I], scales fp32 [T, 1]


class Fp8Linear(NamedTuple):
    """One frozen product of the base and its adapters. tables, group: None without adapters."""

    weight: Fp8Weight
    bias: Tensor | None
    tables: Tables | None
    group: Group | None

    def forward(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """-> out [T, O] of dtype, and low where there are adapters."""
        out = product(*rows, self.weight.rows, self.weight.row_scales, self.bias, dtype)
        if self.tables is None or self.group is None or not self.group.touched:
            return out, None
        low = shrink(rows[0], self.tables, self.group, "a", rows[1], dtype)
        expand(low, self.tables, self.group, "b", None, out)
        return out, low

    def backward(self, grad: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """grad: dY [T, O] -> dX [T, I], where it is wanted, and dlow where there are adapters."""
        grad_x = grad_low = None
        if wanted:
            grad_x = product(*quantize_rows(grad), self.weight.columns, self.weight.column_scales, None, grad.dtype)
        if self.tables is not None and self.group is not None and self.group.touched:
            grad_low = shrink(grad, self.tables, self.group, "b")
            if grad_x is not None:
                expand(grad_low, self.tables, self.group, "a", None, grad_x)
        return grad_x, grad_low

    def gradients(self, x: Tensor, scales: Tensor | None, grad: Tensor, low: Tensor | None, grad_low: Tensor | None) -> None:
        """Adds to the adapters' slabs. x: the input, or with scales its rows."""
        if self.tables is not None and self.group is not None and self.group.trains and low is not None:
            assert grad_low is not None
            outer(grad_low, x, self.tables, self.group, "grad_a", scales)
            outer(low, grad, self.tables, self.group, "grad_b")


def anchor(tables: Tables | None) -> Tensor | None:
    return None if tables is None else tables.anchor


def linear(x: Tensor, own: Fp8Linear) -> Tensor:
    """x [T, I] -> [T, O]"""
    out: Tensor = _Linear.apply(x, anchor(own.tables), own)
    return out


def norm_linear(
    x: Tensor, delta: Tensor | None, norm: Tensor, eps: float, own: Fp8Linear, again: bool
) -> tuple[Tensor, Tensor]:
    """x, delta [T, H], norm [H] -> x + delta, and the product of its norm [T, O]. again: rows are made again, not kept."""
    total, out = _NormLinear.apply(x, delta, anchor(own.tables), norm, eps, own, again)
    return total, out


def norm_mlp(
    x: Tensor, delta: Tensor | None, norm: Tensor, eps: float, gate_up: Fp8Linear, down: Fp8Linear, again: bool
) -> tuple[Tensor, Tensor]:
    """x, delta [T, H] -> x + delta, and the MLP of its norm [T, H]."""
    total, out = _NormMlp.apply(x, delta, anchor(gate_up.tables), norm, eps, gate_up, down, again)
    return total, out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, own: Fp8Linear) -> Tensor:
        rows = quantize_rows(x)
        out, low = own.forward(rows, x.dtype)
        ctx.save_for_backward(x, low)
        ctx.own = own
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors  # which attention keeps anyway
        grad_out = grad_out.contiguous()
        grad_x, grad_low = ctx.own.backward(grad_out, ctx.needs_input_grad[0])
        ctx.own.gradients(x, None, grad_out, low, grad_low)
        return grad_x, None, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, anchor: Tensor | None, norm: Tensor, eps: float, own: Fp8Linear, again: bool
    ) -> tuple[Tensor, Tensor]:
        total, *rows = norm_rows(x, delta, norm, eps)
        out, low = own.forward((rows[0], rows[1]), x.dtype)
        ctx.save_for_backward(total, norm, low, *([] if again else rows))
        ctx.own, ctx.eps, ctx.both = own, eps, delta is not None
        ctx.set_materialize_grads(False)
        return x.view_as(x) if delta is None else total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        total, norm, low, *kept = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_normed, grad_low = ctx.own.backward(grad_out, ctx.needs_input_grad[0])
        if low is not None:
            _, *rows = (total, *kept) if kept else norm_rows(total, None, norm, ctx.eps)
            ctx.own.gradients(rows[0], rows[1], grad_out, low, grad_low)
        grad_x = norm_gradient(grad_normed, grad_total, total, norm, ctx.eps) if grad_normed is not None else None
        return grad_x, grad_x if ctx.both else None, None, None, None, None, None


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        anchor: Tensor | None,
        norm: Tensor,
        eps: float,
        gate_up: Fp8Linear,
        down: Fp8Linear,
        again: bool,
    ) -> tuple[Tensor, Tensor]:
        total, *rows = norm_rows(x, delta, norm, eps)
        hidden, low = gate_up.forward((rows[0], rows[1]), x.dtype)
        out, low_down = down.forward(swiglu_rows(hidden), x.dtype)
        ctx.save_for_backward(total, norm, hidden, low, low_down, *([] if again else rows))
        ctx.linears, ctx.eps, ctx.both = (gate_up, down), eps, delta is not None
        ctx.set_materialize_grads(False)
        return x.view_as(x) if delta is None else total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        total, norm, hidden, low, low_down, *kept = ctx.saved_tensors
        gate_up, down = ctx.linears
        grad_out = grad_out.contiguous()
        grad_active, grad_low = down.backward(grad_out)
        grad_hidden, active = swiglu_gradient(hidden, grad_active)
        del grad_active
        down.gradients(active, None, grad_out, low_down, grad_low)
        del active
        grad_normed, grad_low = gate_up.backward(grad_hidden, ctx.needs_input_grad[0])
        if low is not None:
            _, *rows = (total, *kept) if kept else norm_rows(total, None, norm, ctx.eps)
            gate_up.gradients(rows[0], rows[1], grad_hidden, low, grad_low)
        grad_x = norm_gradient(grad_normed, grad_total, total, norm, ctx.eps) if grad_normed is not None else None
        return grad_x, grad_x if ctx.both else None, None, None, None, None, None, None
