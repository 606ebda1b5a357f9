"""Which part of an adapter's matrices a worker of a tensor parallel engine holds.

    qkv_proj, gate_up_proj   split by output: all of A [R, I], and of each B [O, R] the rows of its own outputs
    o_proj, down_proj        split by input: of A the columns of its own inputs, and all of B

Whoever has the same key and value heads as another worker (there are fewer of these heads than workers) has the same rows. How
large a part is, vLLM's stacked buffers say themselves; where it begins, vLLM's layer knows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def part_of(module: Any, index: int, a: Tensor, b: Tensor, in_features: int, out_features: int) -> tuple[int, int]:
    """(column of A, row of B) at which the part of this worker begins.

    module: vLLM's layer; index: of the linear among those that it fuses, with the stacks a [N, S, I'] and b [N, O', S].
    """
    column = 0 if a.shape[-1] == in_features else module.tp_rank * a.shape[-1]
    shard = getattr(module, "output_ids", (module.tp_rank,) * (index + 1))[index]
    row = 0 if b.shape[1] == out_features else shard * b.shape[1]
    assert column + a.shape[-1] <= in_features and row + b.shape[1] <= out_features, "a part beyond the whole"
    return column, row
