"""Plain torch: clip by global norm, AdamW, master to weights. D elements of one adapter's slab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class SlabStep:
    """One adapter's slabs and its rule: the arguments of `adamw_step`."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor
    weights: Tensor
    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float


def adamw_steps(steps: Sequence[SlabStep]) -> Tensor:
    """`adamw_step` of one adapter after another -> their norms before clipping, fp32 [N]."""
    return torch.tensor([adamw_step(**vars(own)) for own in steps])


@torch.no_grad()
def adamw_step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    weights: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> float:
    """One step of AdamW (Loshchilov and Hutter 2019) of one adapter, in place.

    master, exp_avg, exp_avg_sq: fp32 [D]. grad: [D] of any type, left as it is. weights: [D] of the model's type, written from
    the master; it may be the master itself. step counts from 1, this one included. The gradient is first scaled by
    min(1, max_grad_norm / norm), norm taken over all D (Pascanu et al. 2013).

    Returns the norm before clipping. When it is not finite, nothing has been changed.
    """
    grad = grad.float()
    norm = float(torch.linalg.vector_norm(grad))
    if norm != norm or norm == float("inf"):
        return norm
    grad = grad * min(1.0, max_grad_norm / (norm + CLIP_EPS))
    first, second = betas
    master.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - first)
    exp_avg_sq.mul_(second).addcmul_(grad, grad, value=1 - second)
    root = exp_avg_sq.sqrt().div_((1 - second**step) ** 0.5).add_(eps)
    master.addcdiv_(exp_avg, root, value=-lr / (1 - first**step))
    if weights.data_ptr() != master.data_ptr():
        weights.copy_(master)
    return norm
