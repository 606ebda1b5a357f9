"""kernels.optim against the reference, many adapters in one call: through Triton's interpreter, or on the card."""

# N adapters, D elements of one

import pytest
import torch
from torch import Tensor

from weft.kernels.optim import SlabStep, reference
from weft.kernels.optim import triton as kernels

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (5000, 1, 130)


def steps(narrow: torch.dtype = torch.float16) -> list[SlabStep]:
    """Adapters of several sizes, each with a rule and a step count of its own."""
    made = []
    for n, size in enumerate(SIZES):
        draw = torch.Generator().manual_seed(n)
        master, first, grad = (torch.randn(size, generator=draw).to(DEVICE) for _ in range(3))
        second = torch.rand(size, generator=draw).to(DEVICE)
        rule = (n + 1, 10.0 ** -(n + 2), (0.9 - 0.1 * n, 0.95), 1e-8, 0.1 * n, 0.7 + 50 * n)
        made.append(SlabStep(master, first, second, grad, master.to(narrow), *rule))
    return made


def slabs(step: SlabStep) -> list[Tensor]:
    return [step.master, step.exp_avg, step.exp_avg_sq, step.weights]


def test_a_step_of_all_equals_the_reference_of_each() -> None:
    found, wanted = steps(), steps()
    norms, wanted_norms = kernels.adamw_steps(found), reference.adamw_steps(wanted)
    torch.testing.assert_close(norms.cpu(), wanted_norms, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        for slab, expected in zip(slabs(one)[:3], slabs(other)[:3], strict=True):
            torch.testing.assert_close(slab, expected, rtol=2e-6, atol=1e-6)
        assert torch.equal(one.weights, one.master.to(one.weights.dtype))
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_its_adapter_and_the_others_bits(bad: float) -> None:
    sound, sick = steps(), steps()
    sick[0].grad[4321] = bad
    before = [slab.clone() for slab in slabs(sick[0])]
    kernels.adamw_steps(sound)
    norms = kernels.adamw_steps(sick)
    assert norms.isfinite().tolist() == [False, True, True]
    assert all(torch.equal(slab, kept) for slab, kept in zip(slabs(sick[0]), before, strict=True))
    for one, other in zip(sick[1:], sound[1:], strict=True):
        assert all(torch.equal(slab, expected) for slab, expected in zip(slabs(one), slabs(other), strict=True))


def test_alone_an_adapter_gets_the_bits_that_it_gets_beside_others() -> None:
    together, alone = steps(), steps()
    kernels.adamw_steps(together)
    for own in alone:
        kernels.adamw_steps([own])
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(slab, expected) for slab, expected in zip(slabs(one), slabs(other), strict=True))
