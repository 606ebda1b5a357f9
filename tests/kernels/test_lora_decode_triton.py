"""kernels.lora_decode's Triton kernels against the reference: through Triton's interpreter where there is no GPU, on the card
where there is one."""

# T tokens, S slots, P parts, R widest rank, I in, O out

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.kernels.lora_decode import Work, reference
from weft.kernels.lora_decode import triton as kernels

torch.set_num_threads(1)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SLOTS = 4
MIXES = {  # each token's slot
    "one adapter has all": [2] * 37,
    "mixed": [0, 3, 3, 1, 0, 3, 3, 3, 1] * 4,
    "adapters without tokens": [3, 1, 3, 3],
    "tokens without adapter": [-1, 0, -1, 2, 2, -1],
    "one token each": [3, 2, 1, 0],
    "nobody": [-1, -1, -1],
    "one token": [1],
}
SMALL = {  # each form of the settings, on shapes that the interpreter can do: (settings, inputs)
    "once": kernels.FEW._replace(depth=32, chunk=32, columns=16),
    "loop": kernels.SOME._replace(depth=16, chunk=48, columns=32),
    "together": kernels.MANY._replace(depth=32, columns=16),
    "few programs": kernels.FEW._replace(depth=16, chunk=16, columns=16, shrink_programs=3, expand_programs=5),
    "one program": kernels.SOME._replace(depth=16, chunk=32, columns=16, shrink_programs=1, expand_programs=1),
}


class Problem:
    """One fused linear and poison wherever nothing may be read or written: the slots of nobody, the ends of ranks."""

    def __init__(
        self, mix: list[int], widths: tuple[int, ...] = (48, 16, 24), inputs: int = 64, ranks=(8, 24, 16, 1), widest: int = 24
    ):
        draw = torch.Generator().manual_seed(len(mix) + inputs)
        self.mix, self.widths = mix, widths
        self.a = [torch.full((SLOTS, 1, widest, inputs), torch.nan) for _ in widths]
        self.b = [torch.full((SLOTS, 1, width, widest), torch.nan) for width in widths]
        for slot in set(mix) - {-1}:
            for part_a, part_b in zip(self.a, self.b, strict=True):
                rank, padded = ranks[slot], -(-ranks[slot] // 8) * 8
                part_a[slot, 0, :padded], part_b[slot, 0, :, :padded] = 0, 0
                part_a[slot, 0, :rank] = torch.randn(rank, inputs, generator=draw)
                part_b[slot, 0, :, :rank] = torch.randn(part_b.shape[2], rank, generator=draw)
        self.a, self.b = ([one.to(DEVICE, DTYPE) for one in stacks] for stacks in (self.a, self.b))
        self.x = torch.randn(len(mix), inputs, generator=draw).to(DEVICE, DTYPE)
        self.y = torch.randn(len(mix), sum(widths), generator=draw).to(DEVICE, DTYPE)
        self.work = Work(len(mix) + 5, SLOTS, DEVICE)
        self.work.update(np.array(mix), ranks)

    def wanted(self, scale: float = 0.5, add: bool = True) -> Tensor:
        y = self.y.float().cpu().clone()
        stacked = ([one.float().cpu() for one in stacks] for stacks in (self.a, self.b))
        reference.add_lora(y, self.x.float().cpu(), *stacked, self.work.table.cpu(), self.work.max_tokens, scale, add)
        return y

    def found(self, own: kernels.Settings | None = None, scale: float = 0.5, add: bool = True) -> Tensor:
        y, places = self.y.clone(), (self.work.table, self.work.max_tokens)
        if own is None:
            kernels.add_lora(y, self.x, self.a, self.b, *places, scale, add)
        else:
            sums = kernels.shrink(self.x, self.a, *places, own, kernels.chains(DEVICE))
            kernels.expand(sums, y, self.b, *places, scale, add, own, kernels.chains(DEVICE))
        return y.float().cpu()


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.isfinite().all()
    return float((found - wanted).norm() / wanted.norm())


BOUND = 1e-2 if CUDA else 1e-5


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", SMALL)
def test_the_kernels_give_what_the_reference_gives(mix: str, form: str) -> None:
    problem = Problem(MIXES[mix])
    assert error(problem.found(SMALL[form]), problem.wanted()) < BOUND


@pytest.mark.parametrize("widths", [(40,), (24, 24), (48, 16, 16)])
@pytest.mark.parametrize("form", ["once", "loop", "together"])
def test_any_number_of_parts_and_sizes_that_no_block_divides(widths: tuple[int, ...], form: str) -> None:
    problem = Problem(MIXES["mixed"], widths, inputs=72)
    assert error(problem.found(SMALL[form]), problem.wanted()) < BOUND


@pytest.mark.parametrize("form", SMALL)
def test_without_adding_the_rows_of_adapters_are_theirs_alone(form: str) -> None:
    problem = Problem(MIXES["tokens without adapter"])
    found, wanted = problem.found(SMALL[form], add=False), problem.wanted(add=False)
    assert error(found, wanted) < BOUND
    assert torch.equal(found[0], problem.y[0].float().cpu())


@pytest.mark.parametrize("tokens", [3, 70, 520])
@pytest.mark.parametrize(("widest", "ranks"), [(8, (8, 1, 3, 8)), (32, (32, 8, 32, 16)), (128, (128, 1, 64, 40))])
def test_the_settings_of_every_size_and_rank(tokens: int, widest: int, ranks: tuple[int, ...]) -> None:
    mix = (np.arange(tokens) * 7 % (SLOTS + 1) - 1).tolist()
    problem = Problem(mix, (24, 16, 8), 304, ranks, widest)
    assert error(problem.found(), problem.wanted()) < BOUND


def test_an_adapter_gets_the_same_bits_whoever_else_is_there() -> None:
    """Its tokens in the same order: the tiles are then the same, and every sum has one order."""
    problem = Problem([1, 3, 1, 1, 0, 3, 3, 2])
    beside = problem.found()
    for slot in range(SLOTS):
        problem.work.update(np.where(np.array(problem.mix) == slot, slot, -1), (8, 24, 16, 1))
        alone = problem.found()
        rows = torch.tensor(problem.mix) == slot
        assert torch.equal(alone[rows], beside[rows])
        assert torch.equal(alone[~rows], problem.y.float().cpu()[~rows])


def test_a_warm_up_reads_no_weights_and_takes_any_number_of_tokens() -> None:
    problem = Problem(MIXES["nobody"])  # all weights are poison
    for most in (5, 200, 600):
        kernels.warm_up(problem.a, problem.b, most)


@pytest.mark.parametrize("fault", ["group", "scale", "rank", "token"])
def test_a_planted_error_is_seen(fault: str) -> None:
    problem = Problem(MIXES["mixed"])
    wanted, scale = problem.wanted(), 0.5
    assert error(problem.found(), wanted) < BOUND
    if fault == "group":
        problem.work.table[:2] -= 1  # the last tile is left out
    elif fault == "rank":
        problem.work.update(np.array(problem.mix), (8, 16, 16, 1))  # one adapter loses a third of its rank
    elif fault == "token":
        problem.work.table[-4 - len(problem.mix)] = 0  # a token's row is another's
    else:
        scale = 0.55
    assert error(problem.found(scale=scale), wanted) > 3 * BOUND
