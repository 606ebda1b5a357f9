"""What the tokens of one step have to do with which adapter, as the kernels read it on the device.

T tokens, S slots of the stacked buffers. One int32 table at a fixed address, so that a captured CUDA graph serves any mix:

    tiles of each height   heights | for each: (slot, start, stop, rank) * tiles   a tile is at most `height` tokens of one slot
    tokens                 the tokens that have an adapter, by slot; start and stop count in these
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HEIGHTS = (16, 32, 64)  # tokens of a tile: the kernels choose by the tokens of a step
RECORD = 4  # slot, start, stop, rank
RANK_STEP = 8  # ranks are rounded up to it: rows that are zero in the buffers, and loads of 16 bytes


def most_tiles(height: int, tokens: int, slots: int) -> int:
    """No mix of `tokens` over `slots` adapters has more tiles."""
    groups = min(tokens, slots)
    return (tokens - groups) // height + groups


def tiles_at(index: int, max_tokens: int, slots: int) -> int:
    """Where the tiles of HEIGHTS[index] begin in the table; with index len(HEIGHTS), where the tokens do."""
    return RECORD * (1 + sum(most_tiles(height, max_tokens, slots) for height in HEIGHTS[:index]))


class Work:
    """The table of one engine. Only `update` writes it: one copy, in the order of the device's stream, and nothing waits."""

    def __init__(self, max_tokens: int, slots: int, device: torch.device | str) -> None:
        self.max_tokens, self.slots = max_tokens, slots
        self.table = torch.zeros(tiles_at(len(HEIGHTS), max_tokens, slots) + max_tokens, dtype=torch.int32, device=device)

    def update(self, slots: np.ndarray, ranks: Sequence[int] | np.ndarray) -> int:
        """slots [T]: each token's slot, -1 for the base alone; ranks [S]. -> adapters with tokens."""
        groups, rows = self.rows(slots, ranks)
        staged = torch.empty(len(rows), dtype=torch.int32, pin_memory=self.table.is_cuda)
        staged.numpy()[:] = rows
        self.table[: len(rows)].copy_(staged, non_blocking=True)
        return groups

    def rows(self, slots: np.ndarray, ranks: Sequence[int] | np.ndarray) -> tuple[int, np.ndarray]:
        """-> adapters with tokens, and the beginning of the table; what is not in use holds anything."""
        assert len(slots) <= self.max_tokens, f"{len(slots)} tokens in a table for {self.max_tokens}"
        order = np.argsort(slots, kind="stable")
        order = order[np.searchsorted(slots, 0, sorter=order) :]
        own = slots[order]
        starts = np.flatnonzero(np.diff(own, prepend=-1))
        counts = np.diff(starts, append=len(own))
        which = own[starts]
        ranks = -(-np.asarray(ranks, np.int32) // RANK_STEP) * RANK_STEP
        out = np.zeros(tiles_at(len(HEIGHTS), self.max_tokens, self.slots) + len(own), np.int32)
        for index, height in enumerate(HEIGHTS):
            each = -(-counts // height)
            group = np.repeat(np.arange(len(starts)), each)
            first = starts[group] + (np.arange(len(group)) - np.repeat(np.cumsum(each) - each, each)) * height
            place = tiles_at(index, self.max_tokens, self.slots)
            tiles = out[place : place + RECORD * len(group)].reshape(-1, RECORD)
            tiles[:, 0], tiles[:, 3] = which[group], ranks[which[group]]
            tiles[:, 1], tiles[:, 2] = first, np.minimum(first + height, (starts + counts)[group])
            out[index] = len(group)
        out[len(out) - len(own) :] = order
        return len(starts), out


def read_tiles(table: Tensor, index: int, max_tokens: int, slots: int) -> list[tuple[int, list[int], int]]:
    """(slot, tokens, rank) of each tile of HEIGHTS[index], read back."""
    rows, place, tokens = table.tolist(), tiles_at(index, max_tokens, slots), tiles_at(len(HEIGHTS), max_tokens, slots)
    found = []
    for tile in range(rows[index]):
        slot, start, stop, rank = rows[place + RECORD * tile : place + RECORD * (tile + 1)]
        found.append((slot, rows[tokens + start : tokens + stop], rank))
    return found
