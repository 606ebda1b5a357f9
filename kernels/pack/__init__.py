"""One adapter's slab into the stacked LoRA buffers of a sampler."""

from weft.kernels.pack.reference import scatter_slab

__all__ = ["scatter_slab"]
