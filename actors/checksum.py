"""Whether the bytes that came are those that were sent: a sum over one read of them."""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(raw: Tensor) -> Tensor:
    """Of an even number of bytes, contiguous: the sum of its 16-bit words, int64 [] on the same device."""
    return raw.detach().view(torch.uint8).view(torch.int16).sum(dtype=torch.int64)
