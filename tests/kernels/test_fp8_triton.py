"""kernels.fp8's kernels, and the multi-adapter linears over an FP8 base: through Triton's interpreter, or on the card."""

# T tokens, N adapters, P parts, R rank, I in, O out

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.actors import layers
from weft.kernels import fp8
from weft.kernels.fp8 import triton as kernels
from weft.kernels.lora import fp8 as linears
from weft.kernels.lora import reference
from weft.kernels.lora.tables import SlabGroup, build_tables

torch.set_num_threads(1)
CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
KIND = torch.bfloat16 if CARD else torch.float32  # the card's FP8 products give nothing else; the interpreter has no bfloat16
CLOSE = 1e-2 if CARD else 1e-5
OFFSETS, RANKS, SCALES, TOKENS = [0, 5, 5, 71], [8, 4, 24], [0.5, 1.0, 2.0], 75


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, KIND)


def wide(rows: tuple[Tensor, Tensor]) -> Tensor:
    return rows[0].double() * rows[1].double()


def near(found: Tensor, wanted: Tensor, bound: float) -> bool:
    return float((found.detach().double() - wanted.double()).norm()) <= bound * float(wanted.detach().double().norm())


def stands_for(rows: tuple[Tensor, Tensor], wanted: Tensor) -> bool:
    """Within half a step of e4m3 each on the card; the interpreter drops the carry of a rounding, and is off by two."""
    if not CARD:
        return near(wide(rows), wanted, 0.15)
    slack = wanted.double().abs() * (1 / 16 + CLOSE) + rows[1].double() * 2**-8
    return bool(((wide(rows) - wanted.double()).abs() <= slack).all())


@pytest.mark.parametrize("size", [16, 40])
def test_rows_stand_for_what_they_are_made_of(size: int) -> None:
    x, delta, weight, gate_up = random(7, size), random(7, size, seed=1), random(size), random(7, 2 * size)
    assert stands_for(kernels.quantize_rows(x), x)
    total, *rows = kernels.norm_rows(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    assert stands_for((rows[0], rows[1]), layers.rms_norm(total.float(), weight.float(), 1e-6))
    assert torch.equal(kernels.norm_rows(total, None, weight, 1e-6)[1].view(torch.uint8), rows[0].view(torch.uint8))
    assert stands_for(kernels.swiglu_rows(gate_up), layers._Swiglu.apply(gate_up.float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_a_scale_of_inf_and_stays_alone(bad: float) -> None:
    x = random(4, 32)
    sound = kernels.quantize_rows(x)
    x[2, 3] = bad
    q, scales = kernels.quantize_rows(x)
    assert scales[2].isinf() and torch.equal(scales[[0, 1, 3]], sound[1][[0, 1, 3]])
    assert torch.equal(q.view(torch.uint8)[[0, 1, 3]], sound[0].view(torch.uint8)[[0, 1, 3]])


class Problem:
    """One fused linear, and adapters of several ranks, one of them without tokens."""

    def __init__(self, inputs: int, widths: tuple[int, ...], seed: int = 0):
        self.widths, self.inputs = widths, inputs
        self.weight = random(sum(widths), inputs, seed=seed) * 0.2
        self.a = [[random(rank, inputs, seed=seed + p) * 0.2 for rank in RANKS] for p in range(len(widths))]
        self.b = [[random(width, rank, seed=seed + p) * 0.2 for rank in RANKS] for p, width in enumerate(widths)]
        self.grads = [
            [[torch.zeros(leaf.shape, device=DEVICE) for leaf in part] for part in parts] for parts in (self.a, self.b)
        ]

    def group(self) -> SlabGroup:
        def address(parts: list[list[Tensor]]) -> np.ndarray:
            return np.array([[leaf.data_ptr() for leaf in part] for part in parts], np.int64)

        return SlabGroup(self.inputs, self.widths, *(address(parts) for parts in (self.a, self.b, *self.grads)))

    def own(self) -> linears.Fp8Linear:
        return owns(self)[0]

    def reference(self, x: Tensor, base: Tensor) -> tuple[Tensor, list[Tensor]]:
        """-> out over the weight `base` in fp64, and the leaves that get gradients: x, A, B."""
        parts = [[[leaf.double().requires_grad_() for leaf in part] for part in side] for side in (self.a, self.b)]
        out = reference.fused_lora_linear(x, base, None, self.widths, *parts, SCALES, OFFSETS)
        return out, [x, *(leaf for side in parts for part in side for n, leaf in enumerate(part) if n != 1)]

    def found(self) -> list[Tensor]:
        return [leaf for side in self.grads for part in side for n, leaf in enumerate(part) if n != 1]


def owns(*problems: Problem) -> list[linears.Fp8Linear]:
    """Several linears of one batch."""
    size, groups = torch.finfo(KIND).bits // 8, [problem.group() for problem in problems]
    tables = build_tables(DEVICE, TOKENS, OFFSETS, RANKS, SCALES, groups, [True] * len(RANKS), size)
    weights = [fp8.quantize_weight(problem.weight) for problem in problems]
    return [linears.Fp8Linear(weight, None, tables, group) for weight, group in zip(weights, tables.groups, strict=True)]


@pytest.mark.parametrize("widths", [(48,), (16, 32, 16)])
def test_a_linear_and_its_gradients_are_those_of_what_its_rows_stand_for(widths: tuple[int, ...]) -> None:
    problem, x, grad_out = Problem(32, widths), random(TOKENS, 32).requires_grad_(), random(TOKENS, sum(widths), seed=9)
    own = problem.own()
    out = linears.linear(x, own)
    (grad_x,) = torch.autograd.grad(out, x, grad_out)
    rows, grad = wide(kernels.quantize_rows(x.detach())), wide(kernels.quantize_rows(grad_out))
    forward = wide((own.weight.rows, own.weight.row_scales))
    wanted, leaves = problem.reference(rows.requires_grad_(), forward)
    gradients = torch.autograd.grad(wanted, leaves, grad_out.double())
    as_it_was = problem.reference(x.detach().double().requires_grad_(), forward)
    of_x = torch.autograd.grad(*as_it_was, grad_out.double())  # dA is of x itself, which lies there for attention's backward
    split = 1 + len(widths) * (len(RANKS) - 1)
    backward = wide((own.weight.columns, own.weight.column_scales)).t()
    assert near(out, wanted.detach(), CLOSE)
    assert near(grad_x, gradients[0] + grad @ backward - grad_out.double() @ forward, CLOSE)
    for one, other in zip(problem.found(), of_x[1:split] + gradients[split:], strict=True):
        assert near(one, other, 2 * CLOSE)
    assert all(not part[1].any() for side in problem.grads for part in side)  # the adapter without tokens


@pytest.mark.parametrize("again", [False, True])
def test_a_block_is_near_the_exact_one_and_a_planted_error_is_not(again: bool) -> None:
    up, down, norm = Problem(32, (64, 64)), Problem(64, (32,), seed=3), random(32).abs() + 0.5
    x, delta, grads = random(TOKENS, 32), random(TOKENS, 32, seed=1), (random(TOKENS, 32, seed=2), random(TOKENS, 32, seed=4))
    x.requires_grad_(), delta.requires_grad_()
    linears_of = owns(up, down)
    total, out = linears.norm_mlp(x, delta, norm, 1e-6, *linears_of, again)
    found = torch.autograd.grad((total, out), (x, delta), grads)
    assert torch.equal(found[0], found[1])

    exact = x.detach().double() + delta.detach().double()
    exact.requires_grad_()
    normed = exact * (exact.square().mean(1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    hidden, first = up.reference(normed, up.weight.double())
    active = torch.nn.functional.silu(hidden[:, :64]) * hidden[:, 64:]
    wanted, second = down.reference(active, down.weight.double())
    leaves = [exact, *first[1:], *second[1:]]
    gradients = torch.autograd.grad((exact, wanted), leaves, [grad.double() for grad in grads])
    assert near(total, exact.detach(), CLOSE) and near(out, wanted.detach(), 0.15)
    assert near(found[0], gradients[0], 0.15)
    for one, other in zip(up.found() + down.found(), gradients[1:], strict=True):
        assert near(one, other, 0.15)

    linears_of[1].weight.row_scales[:] *= 1.5
    assert not near(linears.norm_mlp(x, delta, norm, 1e-6, *linears_of, again)[1], wanted.detach(), 0.15)


def test_a_norm_and_its_product_keep_no_gradient_that_none_wants() -> None:
    problem, norm, x = Problem(32, (16, 32)), random(32).abs() + 0.5, random(TOKENS, 32)
    first = linears.norm_linear(x, None, norm, 1e-6, problem.own(), False)
    assert torch.equal(first[0], x)
    first[1].backward(random(TOKENS, 48))  # x takes none: the adapters still get theirs
    alone = [leaf.clone() for leaf in problem.found()]
    for leaf in problem.found():
        leaf.zero_()
    leaf_x = x.clone().requires_grad_()
    second = linears.norm_linear(leaf_x, None, norm, 1e-6, problem.own(), True)
    second[1].backward(random(TOKENS, 48))
    assert torch.equal(first[1], second[1]) and leaf_x.grad is not None
    assert all(torch.equal(one, other) for one, other in zip(problem.found(), alone, strict=True))
    bare = linears.norm_linear(x, None, norm, 1e-6, problem.own()._replace(tables=None, group=None), False)
    assert torch.equal(bare[1][OFFSETS[-1] :], first[1][OFFSETS[-1] :])  # tokens of no adapter run the base
