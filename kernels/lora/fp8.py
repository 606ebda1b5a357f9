"""Multi-adapter linears on CUDA over a base in FP8: each is one autograd function with what stands before it, for rows are
quantised where they are made. The adapters' kernels read the forward's rows in FP8 too, and gradients in bf16, which are there.

T tokens, H hidden size, I in, O out, R rank.

    forward     q, scales = rows of x      kernels.fp8
                low  = s q A^T             shrink
                out  = low B^T             expand
                out += q W^T               cuBLAS    both sides in FP8
    backward    g, scales = rows of dY     kernels.fp8
                dX   = dlow A, += g W      expand, cuBLAS; dlow = s dY B   shrink
                dA, dB                     outer
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.kernels.fp8 import Fp8Weight, product
from weft.kernels.fp8.triton import norm_rows, quantize_rows, swiglu_rows
from weft.kernels.layers.triton import norm_gradient, swiglu_gradient
from weft.kernels.lora.cublas import add_fp8_product, can_add_fp8
from weft.kernels.lora.mlp import swiglu_outer
from weft.kernels.lora.tables import Group, Tables
from weft.kernels.lora.triton import expand, outer, shrink

Rows = tuple[Tensor, Tensor]  # e4m3 [T, I], scales fp32 [T, 1]


class Fp8Linear(NamedTuple):
    """One frozen product of the base and its adapters. tables, group: None without adapters."""

    weight: Fp8Weight
    bias: Tensor | None
    tables: Tables | None
    group: Group | None

    @property
    def trains(self) -> bool:
        return self.group is not None and self.group.trains

    def forward(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """-> out [T, O] of dtype, and low where there are adapters."""
        weight = self.weight
        if self.tables is None or self.group is None or not self.group.touched:
            return product(*rows, weight.rows, weight.row_scales, self.bias, dtype), None
        low = shrink(rows[0], self.tables, self.group, "a", rows[1], dtype)
        return self._added(rows, weight.rows, weight.row_scales, low, "b", self.bias), low

    def _added(self, rows: Rows, weight: Tensor, scales: Tensor, low: Tensor, kind: str, bias: Tensor | None) -> Tensor:
        """The product, and low's deltas: written first where it can add itself to them, for the other way they are read too."""
        assert self.tables is not None and self.group is not None
        if can_add_fp8(rows[0], weight):
            return add_fp8_product(expand(low, self.tables, self.group, kind, bias), *rows, weight, scales)
        return expand(low, self.tables, self.group, kind, None, product(*rows, weight, scales, bias, low.dtype))

    def backward(self, grad: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """grad: dY [T, O] -> dX [T, I], where it is wanted, and dlow where there are adapters."""
        weight, scales = self.weight.columns, self.weight.column_scales
        if self.tables is None or self.group is None or not self.group.touched:
            return product(*quantize_rows(grad), weight, scales, None, grad.dtype) if wanted else None, None
        grad_low = shrink(grad, self.tables, self.group, "b")
        return self._added(quantize_rows(grad), weight, scales, grad_low, "a", None) if wanted else None, grad_low

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
        together = gate_up.trains and down.trains and gate_up.tables is down.tables
        if together:
            outer(low_down, grad_out, down.tables, down.group, "grad_b")
            grad_hidden = swiglu_outer(hidden, grad_active, low, grad_low, down.tables, gate_up.group, down.group)
        else:
            grad_hidden, active = swiglu_gradient(hidden, grad_active)
            down.gradients(active, None, grad_out, low_down, grad_low)
            del active
        del grad_active
        grad_normed, grad_low = gate_up.backward(grad_hidden, ctx.needs_input_grad[0])
        if low is not None:
            _, *rows = (total, *kept) if kept else norm_rows(total, None, norm, ctx.eps)
            if together:
                outer(grad_low, rows[0], gate_up.tables, gate_up.group, "grad_a", rows[1])
            else:
                gate_up.gradients(rows[0], rows[1], grad_hidden, low, grad_low)
        grad_x = norm_gradient(grad_normed, grad_total, total, norm, ctx.eps) if grad_normed is not None else None
        return grad_x, grad_x if ctx.both else None, None, None, None, None, None, None
