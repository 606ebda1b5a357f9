"""The decoder's pieces between its products on CUDA; weft.actors.layers is their reference and what the CPU runs."""
