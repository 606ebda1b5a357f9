"""Linears that carry many adapters at once: by pairs of tensors in plain torch anywhere, by addresses of slabs on CUDA.

T tokens, N adapters, R_n rank of adapter n, I in, O out, P parts of a fused linear (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from weft.kernels.lora import reference
from weft.kernels.lora.tables import Group, Tables


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scales: Sequence[float],
    offsets: Sequence[int],
) -> Tensor:
    """x [T, I] -> [T, O]: x W^T + bias, and + scales[n] * (x A_n^T) B_n^T on the tokens offsets[n]:offsets[n + 1] of adapter n.

    weight [O, I] and bias [O] are frozen; a[n] [R_n, I], b[n] [O, R_n], both None where adapter n leaves this linear alone.
    Gradients go to x, a and b. Tokens outside every range get the base alone. (LoRA, Hu et al. 2021)
    """
    return fused_lora_linear(x, weight, bias, [weight.shape[0]], [a], [b], scales, offsets)


def fused_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Sequence[int],
    a: Sequence[Sequence[Tensor | None]],
    b: Sequence[Sequence[Tensor | None]],
    scales: Sequence[float],
    offsets: Sequence[int],
) -> Tensor:
    """The same for P linears that share their input: weight [sum(widths), I] holds them one below the other.

    a[p][n] [R_n, I] and b[p][n] [widths[p], R_n] are adapter n's pair for part p. -> [T, sum(widths)]
    """
    return reference.fused_lora_linear(x, weight, bias, widths, a, b, scales, offsets)


def slab_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, group: Group, source: Callable[[], Tensor] | None = None
) -> Tensor:
    """The same on CUDA for adapters given by address (`tables`): the backward adds to their gradient slabs itself.

    x [T, I] -> [T, sum(group.widths)]. source: makes x again for the backward, so that x need not be kept.
    """
    from weft.kernels.lora import linears  # needs a GPU's driver, or its interpreter

    return linears.slab_linear(x, weight, bias, tables, group, source)


def slab_mlp(
    x: Tensor,
    gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    tables: Tables,
    groups: tuple[Group, Group],
    source: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`slab_linear` of gate and up, SwiGLU, and that of down: x [T, H] -> [T, O]. gate_up, down: weight and bias."""
    from weft.kernels.lora import linears  # needs a GPU's driver, or its interpreter

    return linears.slab_mlp(x, gate_up, down, tables, groups, source)
