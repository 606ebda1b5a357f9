"""kernels.lora's Triton kernels against the reference: through Triton's interpreter where there is no GPU, on the card where
there is one."""

# T tokens, N adapters, P parts, R rank, I in, O out

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.kernels.lora import linears, reference
from weft.kernels.lora import triton as kernels
from weft.kernels.lora.tables import SlabGroup, build_tables

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies bfloat16's bits
IN, WIDTHS = 24, (16, 8, 40)
# tokens of each adapter, rank of each, tokens without adapter at the end
CASES = {
    "one adapter has all": ([70], [8], 0),
    "mixed ranks": ([5, 1, 66, 3], [1, 24, 8, 40], 0),
    "one has no tokens": ([6, 0, 4], [4, 4, 4], 0),
    "tokens without adapter": ([3, 4], [2, 3], 5),
}


class Problem:
    """One fused linear, its adapters in slabs of their own, and poison wherever nothing may be read."""

    def __init__(self, case: str, dtype: torch.dtype = torch.float32, missing=(), chunked: bool = False, inputs: int = IN):
        tokens, self.ranks, bare = CASES[case]
        self.draw = torch.Generator().manual_seed(len(case))
        self.offsets = np.cumsum([0, *tokens]).tolist()
        self.dtype, self.total = dtype, self.offsets[-1] + bare
        self.x = self.random(self.total, inputs).requires_grad_()
        self.weight, self.bias = self.random(sum(WIDTHS), inputs), self.random(sum(WIDTHS))
        self.scales = [0.5 + n for n in range(len(self.ranks))]
        self.a = [[None if (p, n) in missing else self.random(r, inputs) for n, r in enumerate(self.ranks)] for p in range(3)]
        self.b = [
            [None if (p, n) in missing else self.random(width, r) for n, r in enumerate(self.ranks)]
            for p, width in enumerate(WIDTHS)
        ]
        self.grads = [[[leaf if leaf is None else torch.full_like(leaf, 3.0, dtype=torch.float32) for leaf in part]
                       for part in parts] for parts in (self.a, self.b)]  # fmt: skip
        self.inputs = inputs

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.dtype).to(DEVICE)

    def tables(self, accumulate: bool = True):
        def address(parts):
            return np.array([[0 if leaf is None else leaf.data_ptr() for leaf in part] for part in parts], np.int64)

        group = SlabGroup(self.inputs, WIDTHS, *(address(parts) for parts in (self.a, self.b, *self.grads)))
        flags = [accumulate] * len(self.ranks)
        return build_tables(DEVICE, self.total, self.offsets, self.ranks, self.scales, [group], flags, self.x.element_size())

    def run(self, accumulate: bool = True) -> tuple[Tensor, Tensor]:
        """-> output and the gradient of x; the adapters' gradients lie in self.grads."""
        tables = self.tables(accumulate)
        out = linears.slab_linear(self.x, self.weight, self.bias, tables, tables.groups[0])
        return out.detach(), torch.autograd.grad((out * self.weights(out)).sum(), self.x)[0]

    def weights(self, out: Tensor) -> Tensor:
        return torch.linspace(-1, 1, out.numel()).view(out.shape).to(DEVICE, out.dtype)

    def reference(self):
        """-> output, gradient of x, gradients of A and of B by part and adapter, in fp64."""
        x = self.x.detach().double().requires_grad_()
        wide = [[[leaf if leaf is None else leaf.double().requires_grad_() for leaf in part] for part in parts]
                for parts in (self.a, self.b)]  # fmt: skip
        args = (self.weight.double(), self.bias.double(), WIDTHS, *wide, self.scales, self.offsets)
        out = reference.fused_lora_linear(x, *args)
        (out * self.weights(self.x.new_empty(out.shape)).double()).sum().backward()
        return out.detach(), x.grad, *([[leaf if leaf is None else leaf.grad for leaf in p] for p in parts] for parts in wide)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found.double() - wanted).norm()) <= tolerance * max(float(wanted.norm()), 1e-6)


def agrees(problem: Problem, tolerance: float, accumulate: bool = True) -> bool:
    out, grad_x = problem.run(accumulate)
    wanted_out, wanted_x, *wanted = problem.reference()
    good = close(out, wanted_out, tolerance) and close(grad_x, wanted_x, tolerance)
    for found_parts, wanted_parts in zip(problem.grads, wanted, strict=True):
        for found_part, wanted_part in zip(found_parts, wanted_parts, strict=True):
            for n, (leaf, expected) in enumerate(zip(found_part, wanted_part, strict=True)):
                if leaf is not None:
                    idle = problem.offsets[n] == problem.offsets[n + 1]
                    before = 3.0 if accumulate or idle else 0.0
                    good &= close(leaf - before, torch.zeros_like(leaf).double() if expected is None else expected, tolerance)
    return good


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_reference(case: str) -> None:
    assert agrees(Problem(case), 1e-5)


@pytest.mark.parametrize("missing", [((1, 0),), ((0, 0), (1, 0), (2, 0))], ids=["less a part", "untouched by one"])
def test_a_part_without_adapter_runs_the_base(missing) -> None:
    assert agrees(Problem("mixed ranks", missing=missing), 1e-5)


def test_sizes_that_fit_no_block_and_narrow_floats() -> None:
    assert agrees(Problem("mixed ranks", inputs=19), 1e-5)
    assert agrees(Problem("mixed ranks", NARROW), 2e-2)


def test_a_long_adapter_is_summed_in_chunks_and_a_fresh_slab_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.kernels.lora.tables.CHUNK", 32)
    assert agrees(Problem("mixed ranks"), 1e-5)
    problem = Problem("one adapter has all")
    for parts in problem.grads:
        for part in parts:
            part[0].fill_(float("nan"))
    assert agrees(problem, 1e-5, accumulate=False)


def test_ranks_too_wide_to_share_a_program_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WIDEST_SHARED", 16)
    assert agrees(Problem("mixed ranks"), 1e-5)


def test_alone_and_beside_others_an_adapter_gets_the_same_bits() -> None:
    joint = Problem("mixed ranks")
    low = kernels.shrink(joint.x.detach(), (tables := joint.tables()), tables.groups[0], "a")
    start, stop = joint.offsets[2:4]
    solo = Problem("mixed ranks")
    solo.a, solo.b = ([[part[2]] for part in parts] for parts in (joint.a, joint.b))
    solo.grads = [[[torch.zeros_like(part[2])] for part in parts] for parts in (joint.a, joint.b)]
    solo.ranks, solo.scales, solo.offsets, solo.total = [8], joint.scales[2:3], [0, stop - start], stop - start
    own = kernels.shrink(joint.x.detach()[start:stop], (tables := solo.tables()), tables.groups[0], "a")
    assert torch.equal(low[start:stop, :24], own[:, :24])


def test_an_adapter_of_nan_reaches_no_other_and_an_idle_ones_slab_keeps_its_bits() -> None:
    problem = Problem("one has no tokens")
    for parts in (problem.a, problem.b):
        for part in parts:
            part[0].fill_(float("nan"))
    out, grad_x = problem.run()
    assert out[:6].isnan().all() and out[6:].isfinite().all() and grad_x[6:].isfinite().all()
    assert all(bool((part[1] == 3.0).all()) for parts in problem.grads for part in parts)
    assert all(bool(part[2].isfinite().all()) for parts in problem.grads for part in parts)


@pytest.mark.parametrize("plant", ["scale", "group"])
def test_a_planted_error_is_caught(plant: str) -> None:
    problem = Problem("mixed ranks")
    wanted = problem.reference()
    if plant == "scale":
        problem.scales[2] *= 1.01
    else:
        problem.a[1][2] = None  # its address is 0 in the tables
    found = problem.run()
    assert not close(found[0], wanted[0], 1e-5)
    assert not close(found[1], wanted[1], 1e-5)


class Mlp:
    """Gate and up, SwiGLU and down with the same adapters: IN in, WIDE between, three out of down's fused linear's place."""

    def __init__(self, case: str, wide: int = 20, dtype: torch.dtype = torch.float32, missing=()) -> None:
        self.outer = Problem(case, dtype, inputs=wide)  # draws, ranks, offsets
        own = self.outer

        def draw(*shape: int) -> Tensor:
            return own.random(*shape) / 4  # products of products must stay within narrow floats

        self.x = draw(own.total, IN).requires_grad_()
        self.sizes = ((IN, (wide, wide)), (wide, (IN,)))
        self.frozen = [(draw(sum(widths), size), draw(sum(widths))) for size, widths in self.sizes]
        self.pairs = [
            [
                [None if (p, n) in missing and index == 0 else draw(r, size) for n, r in enumerate(own.ranks)]
                for p in range(len(widths))
            ]
            for index, (size, widths) in enumerate(self.sizes)
        ]
        self.others = [
            [
                [None if self.pairs[index][p][n] is None else draw(width, r) for n, r in enumerate(own.ranks)]
                for p, width in enumerate(widths)
            ]
            for index, (_, widths) in enumerate(self.sizes)
        ]
        self.grads = [
            [
                [[leaf if leaf is None else torch.full_like(leaf, 3.0, dtype=torch.float32) for leaf in part] for part in parts]
                for parts in pair
            ]
            for pair in zip(self.pairs, self.others, strict=True)
        ]

    def run(self, accumulate: bool = True, trains: bool = True):
        """-> output, gradient of x."""
        own = self.outer

        def address(parts, there: bool = True):
            return np.array(
                [[0 if leaf is None or not there else leaf.data_ptr() for leaf in part] for part in parts], np.int64
            )

        groups = [
            SlabGroup(
                size, widths, address(self.pairs[i]), address(self.others[i]), *(address(g, trains) for g in self.grads[i])
            )
            for i, (size, widths) in enumerate(self.sizes)
        ]
        flags = [accumulate] * len(own.ranks)
        tables = build_tables(DEVICE, own.total, own.offsets, own.ranks, own.scales, groups, flags, self.x.element_size())
        out = linears.slab_mlp(self.x, *self.frozen, tables, tables.groups)
        return out.detach(), torch.autograd.grad((out * own.weights(out)).sum(), self.x)[0]

    def reference(self):
        own = self.outer
        x = self.x.detach().double().requires_grad_()
        leaves = [[[[leaf if leaf is None else leaf.double().requires_grad_() for leaf in part] for part in parts]
                   for parts in pair] for pair in zip(self.pairs, self.others, strict=True)]  # fmt: skip

        def linear(index: int, rows: Tensor) -> Tensor:
            weight, bias = (one.double() for one in self.frozen[index])
            return reference.fused_lora_linear(
                rows, weight, bias, self.sizes[index][1], *leaves[index], own.scales, own.offsets
            )

        gate, up = linear(0, x).chunk(2, dim=1)
        out = linear(1, torch.nn.functional.silu(gate) * up)
        (out * own.weights(self.x.new_empty(out.shape)).double()).sum().backward()
        return out.detach(), x.grad, leaves

    def agrees(self, tolerance: float, accumulate: bool = True) -> bool:
        out, grad_x = self.run(accumulate)
        wanted, wanted_x, leaves = self.reference()
        good = close(out, wanted, tolerance) and close(grad_x, wanted_x, tolerance)
        flat = [(own, leaf) for pair in zip(self.grads, leaves, strict=True) for parts in zip(*pair, strict=True)
                for part in zip(*parts, strict=True) for own, leaf in zip(*part, strict=True)]  # fmt: skip
        for found, leaf in flat:
            if found is not None:
                before = 3.0 if accumulate or leaf.grad is None else 0.0
                good &= close(found - before, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, tolerance)
        return good


@pytest.mark.parametrize("case", CASES)
def test_an_mlp_and_its_gradients_equal_the_reference(case: str) -> None:
    assert Mlp(case).agrees(1e-5)
    assert Mlp(case, wide=64).agrees(1e-5, accumulate=case == "one has no tokens")


def test_an_mlp_of_narrow_floats_or_less_a_part_equals_the_reference() -> None:
    assert Mlp("mixed ranks", dtype=NARROW).agrees(3e-2)
    assert Mlp("mixed ranks", missing=((1, 0), (0, 2))).agrees(1e-5)


def test_an_mlp_sums_a_long_adapter_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.kernels.lora.tables.CHUNK", 32)
    assert Mlp("mixed ranks").agrees(1e-5)


def test_an_mlp_without_gradients_of_adapters_gives_the_same_output_and_input_gradient() -> None:
    with_them, without = Mlp("mixed ranks").run(), (frozen := Mlp("mixed ranks")).run(trains=False)
    assert all(close(one, other.double(), 1e-5) for one, other in zip(with_them, without, strict=True))
    assert all(bool((leaf == 3.0).all()) for pair in frozen.grads for parts in pair for part in parts for leaf in part)


def test_an_input_made_again_for_the_backward_changes_nothing() -> None:
    problem = Problem("mixed ranks")
    tables = problem.tables()
    out = linears.slab_linear(problem.x, problem.weight, None, tables, tables.groups[0], lambda: problem.x.detach())
    (out * problem.weights(out)).sum().backward()
    again = Problem("mixed ranks")
    again.run()
    assert all(torch.equal(one, other) for pair in zip(problem.grads, again.grads, strict=True)
               for parts in zip(*pair, strict=True) for one, other in zip(*parts, strict=True))  # fmt: skip
