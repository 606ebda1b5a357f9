"""Whether the bytes that came are those that were sent: a sum over one read of them."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.pack import sum_words


def checksum(raw: Tensor) -> Tensor:
    """Of an even number of bytes, contiguous: the sum of its 16-bit words, each times a number of its place, so that two which
    have changed places are seen; modulo 2^64, int64 [] on the same device."""
    return sum_words(raw.detach().view(torch.uint8).view(torch.int16))
