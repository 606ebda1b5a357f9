"""kernels.logprob's Triton kernels against the reference in fp64: through Triton's interpreter, or on the card."""

# P positions, H hidden size, V vocabulary

import pytest
import torch
from torch import Tensor

from weft.kernels.logprob import reference
from weft.kernels.logprob import triton as kernels

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H = 12


def problem(positions: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, H, generator=draw).to(DEVICE).requires_grad_()
    head = torch.randn(vocabulary, H, generator=draw).to(DEVICE)
    targets = torch.randint(vocabulary, (positions,), generator=draw).to(DEVICE)
    return hidden, head, targets, torch.linspace(0.5, 2, positions, device=DEVICE)


def gradient(logprobs: Tensor, hidden: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, len(logprobs), device=DEVICE).to(logprobs.dtype)
    return torch.autograd.grad((logprobs * weights).sum(), hidden)[0]


@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 7), (5, 64), (7, 9001)])
def test_values_and_gradient_equal_the_reference(positions: int, vocabulary: int) -> None:
    hidden, head, targets, temperature = problem(positions, vocabulary)
    logprobs, entropy = kernels.token_logprobs(hidden, head, targets, temperature, chunk_elements=3 * vocabulary)
    wide = hidden.detach().double().requires_grad_()
    wanted, wanted_entropy = reference.token_logprobs(wide, head.double(), targets, temperature.double())
    torch.testing.assert_close(logprobs, wanted.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, wanted_entropy.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(logprobs, hidden).double(), gradient(wanted, wide), rtol=1e-3, atol=1e-4)


def test_no_positions_are_no_work_and_without_gradient_there_is_no_direction() -> None:
    hidden, head, targets, temperature = problem(4, 33)
    with torch.no_grad():
        alone, _ = kernels.token_logprobs(hidden, head, targets, temperature)
    assert torch.equal(alone, kernels.token_logprobs(hidden, head, targets, temperature)[0].detach())
    none, _ = kernels.token_logprobs(hidden[:0], head, targets[:0], temperature[:0])
    assert none.shape == (0,) and gradient(none, hidden).abs().sum() == 0


def test_a_row_of_nan_stays_alone() -> None:
    hidden, head, targets, temperature = problem(5, 64)
    with torch.no_grad():
        hidden[2] = float("nan")
    logprobs, _ = kernels.token_logprobs(hidden, head, targets, temperature)
    grad = gradient(logprobs, hidden)
    others = [0, 1, 3, 4]
    assert logprobs[2].isnan() and logprobs[others].isfinite().all() and grad[others].isfinite().all()
