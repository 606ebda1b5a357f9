"""The same in plain torch, tile by tile from the same table; what the CPU runs.

T tokens, P parts of a fused linear, S slots, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weft.kernels.lora_decode.work import read_tiles


def add_lora(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], table: Tensor, max_tokens: int, scale: float, add: bool
) -> None:
    """As `weft.kernels.lora_decode.add_lora` says."""
    for slot, tokens, rank in read_tiles(table, 0, max_tokens, a[0].shape[0]):
        column = 0
        for part_a, part_b in zip(a, b, strict=True):
            low = x[tokens] @ part_a[slot, 0, :rank].T * scale
            delta = low.float() @ part_b[slot, 0, :, :rank].T.float()
            columns = slice(column, column + part_b.shape[2])
            y[tokens, columns] = (y[tokens, columns].float() + delta if add else delta).to(y.dtype)
            column = columns.stop
