"""Many adapters beside one base product where no gradient is wanted: a sampler's decode and prefill steps.

T tokens, P parts of a fused linear (q, k and v; gate and up), S slots, R widest rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.kernels.lora_decode import reference
from weft.kernels.lora_decode.work import HEIGHTS, Work

__all__ = ["HEIGHTS", "MOST_PARTS", "WIDEST", "Work", "add_lora", "misfit", "warm_up"]

MOST_PARTS = 3
WIDEST = 128  # rank that the kernels hold at once
DTYPES = (torch.bfloat16, torch.float16)


def add_lora(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    max_tokens: int,
    scale: float = 1.0,
    add: bool = True,
) -> None:
    """y [T, sum(O_p)] += scale * B A x of each token's own adapter, in place; add=False: its rows become that sum.

    x [T, I]; a[p] [S, 1, R, I], b[p] [S, 1, O_p, R], stacked as vLLM does; table, max_tokens: of a `Work`. Rows of tokens
    without adapter are left as they are. Nothing waits for the device, and the launches are the same for any mix.
    """
    if y.device.type == "cuda":
        from weft.kernels.lora_decode import triton  # needs a GPU's driver, or its interpreter

        triton.add_lora(y, x, a, b, table, max_tokens, scale, add)
    else:
        reference.add_lora(y, x, a, b, table, max_tokens, scale, add)


def warm_up(a: Sequence[Tensor], b: Sequence[Tensor], max_tokens: int) -> None:
    """Compile what `add_lora` launches for linears of this shape, for any number of tokens: else the first that come wait for
    it. Reads and writes no weights."""
    if a[0].device.type == "cuda":
        from weft.kernels.lora_decode import triton  # needs a GPU's driver, or its interpreter

        triton.warm_up(a, b, max_tokens)


def misfit(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
    """Why the kernels do not take a linear's stacked buffers; empty where they do."""
    if len(a) > MOST_PARTS:
        return f"{len(a)} parts in one linear, of at most {MOST_PARTS}"
    if a[0].dtype not in DTYPES or any(one.dtype != a[0].dtype for one in (*a, *b)):
        return f"weights of {', '.join(sorted({str(one.dtype) for one in (*a, *b)}))}"
    if any(one.dim() != 4 or one.shape[1] != 1 or not one.is_contiguous() for one in (*a, *b)):
        return "buffers that are not [slots, 1, rows, columns]"
    if any(one.shape[2:] != a[0].shape[2:] for one in a) or any(one.shape[3] != a[0].shape[2] for one in b):
        return "A and B of several ranks or inputs"
    rank, width = a[0].shape[2:]
    if rank > WIDEST or rank % 8 or width % 8:
        return f"rank {rank} and {width} inputs: ranks go to {WIDEST}, and both are multiples of 8"
    return ""
