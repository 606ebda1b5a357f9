"""The optimizer step of many adapters at once on CUDA: one reduction for all norms, one launch for all updates.

D_n elements of adapter n. The formulas are those of the reference. Nothing waits for the device: an adapter whose norm is not
finite is left as it is by the kernel itself, and the caller reads the norms when it likes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.optim.reference import CLIP_EPS, SlabStep

BLOCK, WARPS = 1024, 8  # elements and warps of one program of the update: best of eight (bench_optim.py, H200)
SPAN = 1 << 18  # elements whose squares one program sums
SPANS = 256  # sums that one program adds at a time: fixed, so that adapters of any size share a compilation
FIELDS = 8  # numbers of a rule, of a row of addresses


@torch.no_grad()
def adamw_steps(steps: Sequence[SlabStep]) -> Tensor:
    """As `weft.kernels.optim.adamw_steps` says."""
    device = steps[0].master.device
    rules, places = np.zeros((len(steps), FIELDS), np.float32), np.zeros((len(steps), FIELDS), np.int64)
    for rule, place, own in zip(rules, places, steps, strict=True):
        first, second = own.betas
        decay, bias, root = 1 - own.lr * own.weight_decay, 1 - first**own.step, (1 - second**own.step) ** 0.5
        rule[:] = (decay, 1 - first, second, 1 - second, own.lr / bias, 1 / root, own.eps, own.max_grad_norm)
        slabs = (own.master, own.exp_avg, own.exp_avg_sq, own.grad, own.weights)
        assert all(slab.is_contiguous() and slab.shape == own.master.shape for slab in slabs), "slabs are flat and alike"
        assert all(slab.data_ptr() % 16 == 0 for slab in slabs), "slabs begin at a multiple of 16 bytes"
        place[:6] = (*(slab.data_ptr() for slab in slabs), own.master.numel())
    types = {(own.grad.dtype, own.weights.dtype) for own in steps}
    assert len(types) == 1, f"slabs of several types: {types}"
    rules_there, places_there = (_upload(array, device) for array in (rules, places))
    largest = max(own.master.numel() for own in steps)
    spans = triton.cdiv(largest, SPAN)
    partial = torch.empty(len(steps), spans, dtype=torch.float32, device=device)
    norms = torch.empty(len(steps), dtype=torch.float32, device=device)
    grad, weights = steps[0].grad, steps[0].weights
    _squares[(spans, len(steps))](places_there, partial, grad, SPAN=SPAN, BLOCK=4096, FIELDS=FIELDS, num_warps=8)
    _norms[(len(steps),)](partial, norms, spans, BLOCK=SPANS, num_warps=4)
    _update[(triton.cdiv(largest, BLOCK), len(steps))](
        places_there, rules_there, norms, grad, weights, CLIP_EPS=CLIP_EPS, BLOCK=BLOCK, FIELDS=FIELDS, num_warps=WARPS
    )
    return norms


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@triton.jit
def _address(places, n, index: tl.constexpr, ELEMENT: tl.constexpr, FIELDS: tl.constexpr):
    return tl.multiple_of(tl.load(places + n * FIELDS + index).to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def _squares(places, partial, grad_like, SPAN: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    span, n = tl.program_id(0), tl.program_id(1)
    size = tl.load(places + n * FIELDS + 5)
    grad = _address(places, n, 3, grad_like.dtype.element_ty, FIELDS)
    sums = tl.zeros((BLOCK,), tl.float32)
    start = span.to(tl.int64) * SPAN
    for at in range(0, SPAN, BLOCK):
        if start + at < size:
            c = start + at + tl.arange(0, BLOCK)
            value = tl.load(grad + c, mask=c < size, other=0.0).to(tl.float32)
            sums += value * value
    tl.store(partial + n * tl.num_programs(0) + span, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["spans"])
def _norms(partial, norms, spans, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, spans, BLOCK):
        c = at + tl.arange(0, BLOCK)
        total += tl.load(partial + tl.program_id(0) * spans + c, mask=c < spans, other=0.0)
    tl.store(norms + tl.program_id(0), tl.sqrt(tl.sum(total, 0)))


@triton.jit
def _update(
    places, rules, norms, grad_like, weights_like, CLIP_EPS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr
):  # fmt: skip
    n = tl.program_id(1)
    size = tl.load(places + n * FIELDS + 5)
    norm = tl.load(norms + n)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if (start < size) & (norm < float("inf")):  # false for NaN too
        c = start + tl.arange(0, BLOCK)
        mask = c < size
        rule = rules + n * FIELDS
        master, exp_avg = _address(places, n, 0, tl.float32, FIELDS), _address(places, n, 1, tl.float32, FIELDS)
        exp_avg_sq = _address(places, n, 2, tl.float32, FIELDS)
        grad = _address(places, n, 3, grad_like.dtype.element_ty, FIELDS)
        weights = _address(places, n, 4, weights_like.dtype.element_ty, FIELDS)
        clip = tl.minimum(1.0, tl.load(rule + 7) / (norm + CLIP_EPS))
        g = tl.load(grad + c, mask=mask, other=0.0).to(tl.float32) * clip
        first = tl.load(exp_avg + c, mask=mask, other=0.0)
        first += (g - first) * tl.load(rule + 1)
        second = tl.load(exp_avg_sq + c, mask=mask, other=0.0) * tl.load(rule + 2) + g * g * tl.load(rule + 3)
        value = tl.load(master + c, mask=mask, other=0.0) * tl.load(rule)
        value -= tl.load(rule + 4) * first / (tl.sqrt(second) * tl.load(rule + 5) + tl.load(rule + 6))
        tl.store(exp_avg + c, first, mask=mask)
        tl.store(exp_avg_sq + c, second, mask=mask)
        tl.store(master + c, value, mask=mask)
        tl.store(weights + c, value.to(weights_like.dtype.element_ty), mask=mask)
