"""The decoder's pieces between its linears, with backwards written out: on a small base these cost more than the products do,
and autograd's own backward takes several more passes over the tokens.

T tokens, D head size, n heads, I MLP width. Reductions are in fp32, as in transformers. On CUDA `add_rms_norm`, `heads` and
`swiglu` are one kernel each (kernels.layers), whose reference is what stands here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.actors.architecture import Rope


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] or broadcast against x's last dimensions: x / rms(x) * weight (Zhang and Sennrich 2019)."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, H], weight [H] -> x + delta, and its `rms_norm`. delta None: of x itself."""
    if x.is_cuda:
        from weft.kernels.layers import triton  # needs a GPU's driver

        return triton.add_rms_norm(x, delta, weight, eps)
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)


def heads(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, num_q: int, num_kv: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (num_q + 2 num_kv) D], norms [D], cos and sin [T, 1, D / 2] -> q [T, num_q, D], k and v [T, num_kv, D]; q and k
    normed by head, where there are norms, and turned."""
    if qkv.is_cuda:
        from weft.kernels.layers import triton  # needs a GPU's driver

        return triton.heads(qkv, q_norm, k_norm, cos, sin, num_q, num_kv, eps)
    qk, v = qkv.unflatten(1, (-1, 2 * cos.shape[-1])).split([num_q + num_kv, num_kv], dim=1)
    if q_norm is not None and k_norm is not None:
        weight = torch.cat([q_norm.expand(num_q, -1), k_norm.expand(num_kv, -1)])
        qk = rms_norm(qk, weight, eps)
    q, k = rotate(qk, cos, sin).split([num_q, num_kv], dim=1)
    return q, k, v


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> silu(gate) * up [T, I] (Shazeer 2020)."""
    if gate_up.is_cuda:
        from weft.kernels.layers import triton  # needs a GPU's driver

        return triton.swiglu(gate_up)
    out: Tensor = _Swiglu.apply(gate_up)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, n, D], cos and sin [T, 1, D / 2]: turns each pair (x[i], x[i + D / 2]) by its angle (Su et al. 2021)."""
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


def rms_norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of x [T, H] on CUDA without autograd: made again for a backward that did not keep it."""
    from weft.kernels.layers import triton  # needs a GPU's driver

    return triton.rms_norm_rows(x, weight, eps)


def rope_table(rope: Rope, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> cos and sin [length, D / 2] in fp32, of every angle position * inverse frequency.

    The order of operations is that of transformers and vLLM: a far position makes a difference in the last bit visible.
    """
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim))
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * math.pi)  # within the original context
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
        inverse = (1 - kept) * inverse / rope.factor + kept * inverse
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
    return angles.cos(), angles.sin()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps)
        scale = rms.rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        assert not ctx.needs_input_grad[1], "the base is frozen: a norm's weight would get no gradient here"
        wide = x.float()
        grad = grad_out.float() * weight
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1)
        along.mul_(scale.square()).div_(-x.shape[-1])
        grad.addcmul_(wide, along).mul_(scale)
        return grad.to(x.dtype), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_out, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_out * up, gate, grad_input=grad_gate)
        return grad


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_out, cos, sin, -1.0), None, None  # the inverse of a rotation is its transpose


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out
