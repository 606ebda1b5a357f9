"""What a forward keeps for its backward, decided by what the device has room for.

T tokens. The least that fits is chosen, for recomputing everything costs a third of a step.
"""

from __future__ import annotations

from enum import Enum

import torch

from weft.actors.architecture import Architecture

LOGITS_BYTES = 3 << 30  # what the head and its log-probabilities take for a while, and fragments


class Recompute(Enum):
    """NONE: all is kept but SwiGLU's output, which its backward writes in passing. CHEAP: norms are made again too. LAYERS: a
    layer keeps its input alone."""

    NONE = "none"
    CHEAP = "cheap"
    LAYERS = "layers"


def kept_bytes(architecture: Architecture, tokens: int, item_bytes: int, recompute: Recompute, fp8: bool = False) -> int:
    """What all layers keep, beside what one layer's backward takes for a while. fp8: norms lie in 8 bits."""
    hidden, width = architecture.hidden_size, architecture.intermediate_size
    attention = architecture.q_size + 2 * architecture.kv_size
    passing = 2 * attention + 2 * hidden + 5 * width  # of one layer: gradients of qkv, of gate, up and SwiGLU
    layer = 2 * hidden + 2 * attention + architecture.q_size + 2 * width
    if recompute is Recompute.NONE:
        layer += (1 if fp8 else 2) * hidden
    if recompute is Recompute.LAYERS:
        passing += layer
        layer = 2 * hidden
    return tokens * item_bytes * (architecture.num_layers * layer + passing)


def choose_recompute(
    architecture: Architecture, tokens: int, dtype: torch.dtype, device: torch.device, fp8: bool = False
) -> Recompute:
    """The least that fits the device's free memory. Where nothing fits, LAYERS: the caller splits the launch."""
    free = free_bytes(device)
    for choice in (Recompute.NONE, Recompute.CHEAP):
        if kept_bytes(architecture, tokens, dtype.itemsize, choice, fp8) + LOGITS_BYTES <= free:
            return choice
    return Recompute.LAYERS


def free_bytes(device: torch.device) -> int:
    """What a launch may take: of a CPU's memory the kernel judges."""
    if device.type != "cuda":
        return 1 << 62
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def needed_bytes(architecture: Architecture, tokens: int, dtype: torch.dtype) -> int:
    """Of a launch that makes everything again that can be."""
    return kept_bytes(architecture, tokens, dtype.itemsize, Recompute.LAYERS) + LOGITS_BYTES


def most_tokens(architecture: Architecture, dtype: torch.dtype, free: int) -> int:
    """Of the largest such launch in `free` bytes."""
    return max(0, free - LOGITS_BYTES) // kept_bytes(architecture, 1, dtype.itemsize, Recompute.LAYERS)
