"""Whether the bytes that came are those that were sent: sums over two reads of them."""

from __future__ import annotations

import torch
from torch import Tensor

ROW = 4096  # words
COLUMN = (1 << 24) + 1  # rows that a column counts as: more than there are, so that no two places count alike


def checksum(raw: Tensor) -> Tensor:
    """Of an even number of bytes, contiguous: the sum of its 16-bit words, each times a number of its place, so that two which
    have changed places are seen; modulo 2^64, int64 [] on the same device."""
    words = raw.detach().view(torch.uint8).view(torch.int16)
    count = len(words) // ROW
    whole, rest = words[: count * ROW].view(count, ROW), words[count * ROW :]
    wide = {"dtype": torch.int64}
    columns = whole.sum(0, **wide)
    columns[: len(rest)] += rest
    places = torch.arange(1, max(count + 1, ROW) + 1, device=raw.device)
    of_rows = (whole.sum(1, **wide) * places[:count]).sum() + rest.sum(**wide) * (count + 1)
    return of_rows + COLUMN * (columns * places[:ROW]).sum()
