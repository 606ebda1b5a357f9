"""The optimizer step of one adapter: clip, AdamW and the write of the model's weights, over flat slabs."""

from weft.kernels.optim.reference import adamw_step

__all__ = ["adamw_step"]
