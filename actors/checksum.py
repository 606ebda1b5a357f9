"""Whether the bytes that came are those that were sent: a sum that a GPU makes of 132 MB in 0.1 ms."""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(raw: Tensor) -> Tensor:
    """Of an even number of bytes, contiguous: the sum of its 16-bit words, int64 [] on the same device."""
    return raw.detach().view(torch.uint8).view(torch.int16).sum(dtype=torch.int64)
