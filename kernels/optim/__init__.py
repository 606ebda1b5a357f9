"""The optimizer step of adapters: clip, AdamW and the write of the model's weights, over flat slabs, each by its own rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weft.kernels.optim import reference
from weft.kernels.optim.reference import SlabStep, adamw_step

__all__ = ["SlabStep", "adamw_step", "adamw_steps"]


def adamw_steps(steps: Sequence[SlabStep]) -> Tensor:
    """One AdamW step of each adapter, in place -> norms before clipping, fp32 [N], on the slabs' device. An adapter whose norm
    is not finite has been left as it was. On CUDA all go in one launch, and nothing waits for it."""
    if steps[0].master.device.type == "cuda":
        from weft.kernels.optim import triton  # needs a GPU's driver, or its interpreter

        return triton.adamw_steps(steps)
    return reference.adamw_steps(steps)
