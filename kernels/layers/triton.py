"""Norms with residual, heads (norm and rotary), and SwiGLU: one pass over memory each, forward and backward.

T tokens, H hidden size, n heads, D head size, I MLP width. What is rounded where is as in weft.actors.layers, but for rotary,
which is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, H] -> x + delta, and its norm times weight [H]. delta None: x itself."""
    total, normed = _AddRmsNorm.apply(x, delta, weight, eps)
    return total, normed


def rms_norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm alone, without autograd: what makes it again for a backward."""
    normed = torch.empty_like(x)
    _launch_norm(x, None, weight, x, normed, eps)
    return normed


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> silu(gate) * up [T, I]"""
    out: Tensor = _Swiglu.apply(gate_up)
    return out


def swiglu_rows(gate_up: Tensor) -> Tensor:
    """The same without autograd."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    _swiglu_forward[(tokens, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


def swiglu_gradient(gate_up: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradient of gate_up [T, 2 I], and once more the output [T, I]."""
    tokens, width = grad_out.shape
    grad, out = torch.empty_like(gate_up), torch.empty_like(grad_out)
    _swiglu_backward[(tokens, triton.cdiv(width, 1024))](gate_up, grad_out, grad, out, width, BLOCK=1024, num_warps=4)
    return grad, out


def heads(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, num_q: int, num_kv: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (num_q + 2 num_kv) D], norms [D] or None, cos and sin [T, 1, D / 2] -> q [T, num_q, D], k and v [T, num_kv, D],
    q and k normed by head and turned."""
    q, k, v = _Heads.apply(qkv, q_norm, k_norm, cos, sin, num_q, num_kv, eps)
    return q, k, v


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x.view_as(x) if delta is None else torch.empty_like(x)
        normed = torch.empty_like(x)
        _launch_norm(x, delta, weight, total, normed, eps)
        ctx.save_for_backward(x if delta is None else total, weight)
        ctx.eps, ctx.both = eps, delta is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        assert not ctx.needs_input_grad[2], "the base is frozen: a norm's weight would get no gradient here"
        total, weight = ctx.saved_tensors
        if grad_normed is None:
            return grad_total, grad_total if ctx.both else None, None, None
        grad = norm_gradient(grad_normed, grad_total, total, weight, ctx.eps)
        return grad, grad if ctx.both else None, None, None


def norm_gradient(grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of `total` [T, H] through its norm, and grad_total, which came past it."""
    grad = torch.empty_like(total)
    rows, size = total.shape
    _norm_backward[(rows,)](
        grad_normed.contiguous(), grad if grad_total is None else grad_total.contiguous(), total, weight, grad, size,
        eps, HAS_TOTAL=grad_total is not None, BLOCK=triton.next_power_of_2(size), num_warps=_warps(size),
    )  # fmt: skip
    return grad


def _launch_norm(x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor, normed: Tensor, eps: float) -> None:
    rows, size = x.shape
    _norm_forward[(rows,)](
        x, x if delta is None else delta, weight, total, normed, size, eps,
        ADD=delta is not None, BLOCK=triton.next_power_of_2(size), num_warps=_warps(size),
    )  # fmt: skip


def _warps(size: int) -> int:
    return 8 if size > 1024 else 4


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_rows(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_gradient(gate_up, grad_out.contiguous())[0]


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        num_q: int,
        num_kv: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        tokens, size = qkv.shape[0], 2 * cos.shape[-1]
        outs = tuple(qkv.new_empty(tokens, count, size) for count in (num_q, num_kv, num_kv))
        norms = (qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm)
        block = triton.next_power_of_2(size // 2)
        _heads_forward[(tokens,)](
            qkv, *outs, *norms, cos, sin, eps, NUM_Q=num_q, NUM_KV=num_kv, HALF=size // 2, BLOCK=block,
            HEADS=triton.next_power_of_2(num_q + num_kv), VALUES=triton.next_power_of_2(num_kv), NORM=q_norm is not None,
            num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(qkv, *norms, cos, sin)
        ctx.shape = (num_q, num_kv, size, eps, q_norm is not None)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_norm, k_norm, cos, sin = ctx.saved_tensors
        num_q, num_kv, size, eps, norm = ctx.shape
        grad = torch.empty_like(qkv)
        _heads_backward[(qkv.shape[0],)](
            qkv, *(one.contiguous() for one in grads), grad, q_norm, k_norm, cos, sin, eps, NUM_Q=num_q, NUM_KV=num_kv,
            HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), HEADS=triton.next_power_of_2(num_q + num_kv),
            VALUES=triton.next_power_of_2(num_kv), NORM=norm, num_warps=8,
        )  # fmt: skip
        return grad, None, None, None, None, None, None, None


@triton.jit
def _norm_forward(x, delta, weight, total, normed, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    mask = c < size
    at = tl.program_id(0).to(tl.int64) * size + c
    row = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        row = (row.to(tl.float32) + tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, row, mask=mask)
    value = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    scaled = (value * scale).to(normed.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(grad_normed, grad_total, total, weight, grad, size, eps, HAS_TOTAL: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    mask = c < size
    at = tl.program_id(0).to(tl.int64) * size + c
    value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(grad_normed + at, mask=mask, other=0.0).to(tl.float32)
    out *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    along = tl.sum(out * value, 0) * scale * scale / size
    result = (out - value * along) * scale
    if HAS_TOTAL:
        result += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad + at, result.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_forward(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    gate = tl.load(gate_up + row * 2 * width + c, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + c, mask=mask, other=0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + c, (active * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(gate_up, grad_out, grad, again, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    gate = tl.load(gate_up + row * 2 * width + c, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + c, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(grad_out + row * width + c, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = out * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad + row * 2 * width + c, grad_gate.to(grad.dtype.element_ty), mask=mask)
    tl.store(grad + row * 2 * width + width + c, (out * gate * sigmoid).to(grad.dtype.element_ty), mask=mask)
    active = (gate * sigmoid).to(grad.dtype.element_ty).to(tl.float32)
    tl.store(again + row * width + c, (active * up).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _head_places(NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """-> heads [HEADS, 1], columns of a half [1, BLOCK], where both exist, and each pair's first element in a token's qkv."""
    n, c = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    return n, c, (n < NUM_Q + NUM_KV) & (c < HALF), n * 2 * HALF + c


@triton.jit
def _normed_halves(
    qkv, at, n, c, mask, q_norm, k_norm, eps, NUM_Q: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """-> both halves of every head in fp32 before their norm, their scales, and the norms' weights."""
    first = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
    scale, first_weight, second_weight = 1.0, 1.0, 1.0
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        is_q = n < NUM_Q
        first_weight = tl.load(tl.where(is_q, q_norm, k_norm) + c, mask=mask, other=0.0).to(tl.float32)
        second_weight = tl.load(tl.where(is_q, q_norm, k_norm) + HALF + c, mask=mask, other=0.0).to(tl.float32)
    return first, second, scale, first_weight, second_weight


@triton.jit
def _heads_forward(
    qkv, q, k, v, q_norm, k_norm, cos, sin, eps, NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, VALUES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = qkv + t * (NUM_Q + 2 * NUM_KV) * 2 * HALF
    n, c, mask, at = _head_places(NUM_Q, NUM_KV, HALF, HEADS, BLOCK)
    first, second, scale, first_weight, second_weight = _normed_halves(
        row, at, n, c, mask, q_norm, k_norm, eps, NUM_Q, HALF, NORM
    )
    kind = q.dtype.element_ty
    if NORM:
        first = ((first * scale).to(kind).to(tl.float32) * first_weight).to(kind).to(tl.float32)
        second = ((second * scale).to(kind).to(tl.float32) * second_weight).to(kind).to(tl.float32)
    turn_c = tl.load(cos + t * HALF + c, mask=c < HALF, other=0.0).to(tl.float32)
    turn_s = tl.load(sin + t * HALF + c, mask=c < HALF, other=0.0).to(tl.float32)
    one, two = (first * turn_c - second * turn_s).to(kind), (second * turn_c + first * turn_s).to(kind)
    q_at, k_at = q + t * NUM_Q * 2 * HALF + at, k + (t * NUM_KV - NUM_Q) * 2 * HALF + at
    tl.store(q_at, one, mask=mask & (n < NUM_Q))
    tl.store(q_at + HALF, two, mask=mask & (n < NUM_Q))
    tl.store(k_at, one, mask=mask & (n >= NUM_Q))
    tl.store(k_at + HALF, two, mask=mask & (n >= NUM_Q))
    _copy_values(row + (NUM_Q + NUM_KV) * 2 * HALF, v + t * NUM_KV * 2 * HALF, NUM_KV, HALF, VALUES, BLOCK)


@triton.jit
def _heads_backward(
    qkv, grad_q, grad_k, grad_v, grad, q_norm, k_norm, cos, sin, eps, NUM_Q: tl.constexpr, NUM_KV: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, VALUES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    start = t * (NUM_Q + 2 * NUM_KV) * 2 * HALF
    n, c, mask, at = _head_places(NUM_Q, NUM_KV, HALF, HEADS, BLOCK)
    q_at, k_at = grad_q + t * NUM_Q * 2 * HALF + at, grad_k + (t * NUM_KV - NUM_Q) * 2 * HALF + at
    is_q, is_k = mask & (n < NUM_Q), mask & (n >= NUM_Q)
    one = tl.load(q_at, mask=is_q, other=0.0).to(tl.float32) + tl.load(k_at, mask=is_k, other=0.0).to(tl.float32)
    two = tl.load(q_at + HALF, mask=is_q, other=0.0).to(tl.float32) + tl.load(k_at + HALF, mask=is_k, other=0.0).to(tl.float32)
    turn_c = tl.load(cos + t * HALF + c, mask=c < HALF, other=0.0).to(tl.float32)
    turn_s = tl.load(sin + t * HALF + c, mask=c < HALF, other=0.0).to(tl.float32)
    grad_first, grad_second = one * turn_c + two * turn_s, two * turn_c - one * turn_s
    if NORM:
        first, second, scale, first_weight, second_weight = _normed_halves(
            qkv + start, at, n, c, mask, q_norm, k_norm, eps, NUM_Q, HALF, NORM
        )
        grad_first, grad_second = grad_first * first_weight, grad_second * second_weight
        along = (tl.sum(grad_first * first, 1) + tl.sum(grad_second * second, 1))[:, None] * scale * scale / (2 * HALF)
        grad_first, grad_second = (grad_first - first * along) * scale, (grad_second - second * along) * scale
    tl.store(grad + start + at, grad_first.to(grad.dtype.element_ty), mask=mask)
    tl.store(grad + start + at + HALF, grad_second.to(grad.dtype.element_ty), mask=mask)
    values = start + (NUM_Q + NUM_KV) * 2 * HALF
    _copy_values(grad_v + t * NUM_KV * 2 * HALF, grad + values, NUM_KV, HALF, VALUES, BLOCK)


@triton.jit
def _copy_values(source, target, NUM_KV: tl.constexpr, HALF: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    n, c = tl.arange(0, VALUES)[:, None], tl.arange(0, 2 * BLOCK)[None, :]
    mask = (n < NUM_KV) & (c < 2 * HALF)
    tl.store(target + n * 2 * HALF + c, tl.load(source + n * 2 * HALF + c, mask=mask), mask=mask)
