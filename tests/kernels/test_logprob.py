"""kernels.logprob against log_softmax over all logits at once."""

# P positions, H hidden, V vocabulary

import pytest
import torch
from torch import Tensor

from weft.kernels.logprob import reference, token_logprobs

torch.set_num_threads(1)


def problem(positions: int, vocabulary: int = 37, hidden: int = 11, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(positions)
    states = torch.randn(positions, hidden, generator=draw).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, hidden, generator=draw).to(dtype)
    targets = torch.randint(0, vocabulary, (positions,), generator=draw, dtype=torch.int32)
    temperature = torch.rand(positions, generator=draw) * 1.5 + 0.3
    return states, head, targets, temperature


def formula(states: Tensor, head: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    full = torch.log_softmax((states @ head.T).float() / temperature[:, None], dim=1)
    return full.gather(1, targets.long()[:, None])[:, 0], -(full.exp() * full).sum(1)


@pytest.mark.parametrize("chunk_elements", [1, 37 * 4, 1 << 22], ids=["one position", "some positions", "all positions"])
@pytest.mark.parametrize("positions", [0, 1, 9])
def test_values_and_gradient_equal_log_softmax_whatever_the_chunk(positions: int, chunk_elements: int) -> None:
    states, *rest = problem(positions)
    found, entropy = reference.token_logprobs(states, *rest, chunk_elements=chunk_elements)
    wanted, wanted_entropy = formula(states, *rest)
    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-2, 1, positions)
    (gradient,) = torch.autograd.grad((found * weights).sum(), states)
    (wanted_gradient,) = torch.autograd.grad((wanted * weights).sum(), states)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_right_through_a_loss_that_bends() -> None:
    states, *rest = problem(9)
    losses = [function(states, *rest)[0].mul(2).exp().mean() for function in (token_logprobs, formula)]
    found, wanted = (torch.autograd.grad(loss, states)[0] for loss in losses)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_entropy_takes_no_gradient() -> None:
    assert not token_logprobs(*problem(4))[1].requires_grad


def test_a_position_without_loss_gets_a_gradient_of_zero() -> None:
    states, *rest = problem(5)
    found, _ = token_logprobs(states, *rest)
    found[2].backward()
    assert states.grad is not None and states.grad[2].abs().sum() > 0
    assert states.grad[[0, 1, 3, 4]].abs().sum() == 0


def test_no_gradient_asked_none_prepared() -> None:
    states, *rest = problem(6)
    with torch.no_grad():
        silent, _ = token_logprobs(states, *rest)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, token_logprobs(states, *rest)[0].detach(), rtol=0, atol=0)


def test_certainty_has_entropy_zero_and_no_nan() -> None:
    head = torch.eye(4) * 1e4
    logprobs, entropy = token_logprobs(torch.eye(4), head, torch.arange(4), torch.ones(4))
    assert torch.equal(logprobs, torch.zeros(4)) and torch.equal(entropy, torch.zeros(4))


def test_bfloat16_stays_within_its_own_rounding() -> None:
    states, *rest = problem(9, dtype=torch.bfloat16)
    found, _ = token_logprobs(states, *rest)
    wanted, _ = formula(states, *rest)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(values.sum(), states)[0].float() for values in (found, wanted)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-2
