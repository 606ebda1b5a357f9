"""Causal attention over packed rows: which tokens see which is planned once a batch and used by every layer.

T tokens of all rows, n rows, L longest row of a bucket, M padded places of all buckets, Hq query heads, Hk key/value heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DENSE_FROM = 256  # tokens of a row: cuDNN plans for each new number of rows, 0.2 s (H200), which short rows never win back
WIDEST = 0.75  # a bucket holds rows of at least this share of its longest: at most a quarter of it is padding


class Attention(Protocol):
    """Causal within each row, nothing across rows."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [T, Hq, D], keys and values [T, Hk, D] -> [T, Hq, D], scaled by 1 / sqrt(D)."""


def plan_attention(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Attention:
    """lengths: of the rows, in packed order. On CUDA cuDNN's dense kernel for long rows of one length, else the varlen kernel,
    both without fp32; elsewhere buckets of padded rows."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        dense = lengths[0] >= DENSE_FROM and len(set(lengths)) == 1
        return DenseAttention(lengths) if dense else VarlenAttention(lengths, device)
    return PaddedAttention(lengths, device)


class DenseAttention:
    """Rows of one length through cuDNN: at 2,048 tokens a row 1.7 times as fast as the varlen kernel, forward and backward (32
    and 8 heads of 128, H200)."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._shape = (len(lengths), lengths[0])

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _attend(queries, keys, values, *self._shape)


class VarlenAttention:
    """FlashAttention over packed rows (Dao 2023), through torch.nn.attention.varlen: no padding, backward included."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        from torch.nn.attention.varlen import varlen_attn  # this import registers CUDA operators

        settings: dict[str, Any] = {"window_size": (-1, 0)}  # causal
        if "enable_gqa" in signature(varlen_attn).parameters:  # PyTorch 2.11 lacks the word, and groups heads unasked
            settings["enable_gqa"] = True
        self._run: Callable[..., Any] = partial(varlen_attn, **settings)
        self._longest = max(lengths)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._ends = ends.pin_memory().to(device, non_blocking=True)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = self._run(queries, keys, values, self._ends, self._ends, self._longest, self._longest)
        return out


class PaddedAttention:
    """Rows of like length are padded on the right into one block each and go through scaled_dot_product_attention. A pad
    comes after every real token of its row, so the causal mask alone keeps it from being seen; its own output is dropped."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._blocks = _buckets(lengths)  # (rows, L) of each
        self._even = len(self._blocks) == 1 and len(set(lengths)) == 1
        if not self._even:
            self._source, self._places = (index.to(device) for index in _indices(lengths, self._blocks))
        self._shapes = [(len(rows), longest) for rows, longest in self._blocks]

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self._even:
            return _attend(queries, keys, values, *self._shapes[0])
        sizes = [n * longest for n, longest in self._shapes]
        padded = [_Pad.apply(x, self._source, self._places).split(sizes) for x in (queries, keys, values)]
        outs = [_attend(*block, *shape) for *block, shape in zip(*padded, self._shapes, strict=True)]
        out: Tensor = _Unpad.apply(torch.cat(outs), self._places)
        return out


def _attend(queries: Tensor, keys: Tensor, values: Tensor, n: int, longest: int) -> Tensor:
    """[n * L, heads, D] each -> [n * L, Hq, D]"""
    q, k, v = (x.unflatten(0, (n, longest)).transpose(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _buckets(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """(rows, longest of them) of each bucket, longest first."""
    buckets: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if buckets and lengths[row] >= WIDEST * buckets[-1][1]:
            buckets[-1][0].append(row)
        else:
            buckets.append(([row], lengths[row]))
    return buckets


def _indices(lengths: Sequence[int], buckets: Sequence[tuple[Sequence[int], int]]) -> tuple[Tensor, Tensor]:
    """-> source [M]: the token in each padded place (the row's last one again for a pad); places [T]: its inverse."""
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    source, places, at = [], torch.empty(int(length.sum()), dtype=torch.long), 0
    for rows, longest in buckets:
        row = torch.tensor(rows)
        column = torch.arange(longest).expand(len(rows), -1)
        token = start[row, None] + column.minimum(length[row, None] - 1)  # [rows, L]
        real = column < length[row, None]
        source.append(token.flatten())
        places[token[real]] = torch.arange(at, at + token.numel()).view_as(token)[real]
        at += token.numel()
    return torch.cat(source), places


class _Pad(torch.autograd.Function):
    """[T, ...] -> [M, ...]. Autograd's own backward of an index adds one by one; here each token has one real place, and the
    pads' gradients are zero, for nothing reads what they give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return grad_out.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """[M, ...] -> [T, ...]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return grad_out.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad_out), None
