"""Where the matrices of a slab go: one slot of stacked buffers, which a kernel finds through a table made once a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # elements of one program
SPREAD = 32  # numbers that a sum over a slot is spread over, for programs that add to one wait for each other
FIELDS = 8


@dataclass(frozen=True)
class Target:
    """The place of one matrix in every slot: stack [N, rows, cols], contiguous.

    Of it the slab fills [filled_rows, filled_cols] from element `offset` on, its rows `stride` elements apart; the rest of the
    slot is zeroed. No filled row: the adapter leaves this linear alone. scaled: it is a B, into which the scale is folded.
    """

    stack: Tensor
    offset: int = 0
    stride: int = 0
    filled_rows: int = 0
    filled_cols: int = 0
    scaled: bool = False

    def __post_init__(self) -> None:
        assert self.stack.dim() == 3 and self.stack.is_contiguous(), f"a stack {tuple(self.stack.shape)} that is not contiguous"
        _, rows, cols = self.stack.shape
        assert rows * cols < 2**31, f"a slot of {rows} x {cols}: the kernel counts within one in 32 bits"
        assert self.filled_rows <= rows and self.filled_cols <= cols, f"{self} is larger than its slot"

    @property
    def end(self) -> int:
        """Elements of the slab up to the last that goes here."""
        return self.offset + (self.filled_rows - 1) * self.stride + self.filled_cols if self.filled_rows else 0


@dataclass(frozen=True)
class Places:
    """Every matrix of one layout. All stacks are of one type and one device, and have as many slots."""

    targets: tuple[Target, ...]

    def __post_init__(self) -> None:
        kinds = {(target.stack.dtype, target.stack.device, len(target.stack)) for target in self.targets}
        assert len(kinds) == 1, f"stacks of several kinds: {kinds}"

    @property
    def first(self) -> Tensor:
        """One of the stacks."""
        return self.targets[0].stack

    @cached_property
    def end(self) -> int:
        """Elements that a slab must have at least."""
        return max(target.end for target in self.targets)

    @cached_property
    def aligned(self) -> bool:
        """Every matrix begins and ends, in slab and slot, at a multiple of 8 elements."""
        return all((t.offset | t.stack[0].numel() | t.filled_rows * t.stack.shape[2]) % 8 == 0 for t in self.targets)

    @cached_property
    def table(self) -> Tensor:
        """int64 [targets, FIELDS] on the stacks' device: address, elements of a slot, cols, offset, stride, rows and cols that
        are filled, scaled."""
        rows = [
            (
                t.stack.data_ptr(),
                t.stack[0].numel(),
                t.stack.shape[2],
                t.offset,
                t.stride,
                t.filled_rows,
                t.filled_cols,
                t.scaled,
            )
            for t in self.targets
        ]
        return torch.tensor(rows, dtype=torch.int64).to(self.first.device)

    def sums(self) -> Tensor:
        """int64 [SPREAD], zero: what `scatter_slab` and `sum_slot` add to; its own sum is the slot's."""
        return torch.zeros(SPREAD, dtype=torch.int64, device=self.first.device)

    @cached_property
    def work(self) -> Tensor:
        """int32 [programs, 2]: target, block within its slot."""
        blocks = [-(-target.stack[0].numel() // BLOCK) for target in self.targets]
        which = np.repeat(np.arange(len(blocks)), blocks)
        within = np.concatenate([np.arange(count) for count in blocks])
        return torch.from_numpy(np.stack([which, within], 1).astype(np.int32)).to(self.first.device)


def pair_targets(
    a: Tensor, b: Tensor, offset: int | None, rank: int, in_features: int, column: int = 0, row: int = 0
) -> Sequence[Target]:
    """The two places of one linear. a: stack [N, S, I']; b: stack [N, O', S]; offset: of its A [rank, in_features] in the slab,
    which its B follows; None: not in the slab. column, row: where this sampler's part of A and B begins, if it holds one of
    several."""
    if offset is None:
        return Target(a), Target(b)
    b_offset = offset + rank * in_features + row * rank
    return (
        Target(a, offset + column, in_features, rank, a.shape[2]),
        Target(b, b_offset, rank, b.shape[1], rank, scaled=True),
    )
