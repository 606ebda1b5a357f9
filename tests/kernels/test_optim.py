"""kernels.optim against torch.optim.AdamW and clip_grad_norm_."""

import pytest
import torch
from torch import Tensor

from weft.kernels.optim import adamw_step

torch.set_num_threads(1)
SIZE = 1037
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 0.7}


def _state(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    master = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    return master, torch.zeros(SIZE), torch.zeros(SIZE)


@pytest.mark.parametrize("scale", [0.001, 1.0, 100.0])
def test_ten_steps_equal_torchs_adamw_with_clipping(scale: float) -> None:
    master, exp_avg, exp_avg_sq = _state()
    expected = torch.nn.Parameter(master.clone())
    torchs = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 11):
        grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(step)) * scale
        torchs.param_groups[0]["lr"] = lr = 1e-2 / step
        expected.grad = grad.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_([expected], 0.7)
        torchs.step()
        norm = adamw_step(master, exp_avg, exp_avg_sq, grad, master, step, lr, **SETTINGS)
        assert norm == pytest.approx(float(expected_norm), rel=1e-6)
        torch.testing.assert_close(master, expected.detach(), rtol=1e-6, atol=1e-6)
        moments = torchs.state[expected]  # which tell the clip: AdamW's own step hardly depends on the gradient's scale
        torch.testing.assert_close(exp_avg, moments["exp_avg"], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(exp_avg_sq, moments["exp_avg_sq"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    master, exp_avg, exp_avg_sq = _state()
    weights = master.bfloat16()
    held = [tensor.clone() for tensor in (master, exp_avg, exp_avg_sq, weights)]
    grad = torch.ones(SIZE)
    grad[17] = bad
    norm = adamw_step(master, exp_avg, exp_avg_sq, grad, weights, 1, 1e-2, **SETTINGS)
    assert not torch.isfinite(torch.tensor(norm))
    assert all(torch.equal(now, before) for now, before in zip((master, exp_avg, exp_avg_sq, weights), held, strict=True))


def test_bf16_weights_are_the_rounded_master_and_lose_no_small_update() -> None:
    master, exp_avg, exp_avg_sq = torch.ones(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    weights = master.bfloat16()
    for step in range(1, 9):  # one step of 1e-3 is below bf16's resolution at 1, eight are not
        adamw_step(master, exp_avg, exp_avg_sq, torch.ones(SIZE), weights, step, 1e-3, (0.9, 0.95), 1e-8, 0.0, 1e9)
        assert torch.equal(weights, master.bfloat16())
    assert float(weights[0]) == pytest.approx(1 - 8e-3, abs=4e-3)
    assert float(weights[0]) < 1


def test_the_gradient_is_left_as_it_is_and_may_be_bf16() -> None:
    master, exp_avg, exp_avg_sq = _state()
    grad = torch.randn(SIZE).bfloat16()
    kept = grad.clone()
    adamw_step(master, exp_avg, exp_avg_sq, grad, master, 1, 1e-2, **SETTINGS)
    assert torch.equal(grad, kept)
    assert torch.isfinite(master).all()


def test_a_learning_rate_of_zero_moves_the_moments_alone() -> None:
    master, exp_avg, exp_avg_sq = _state()
    kept = master.clone()
    adamw_step(master, exp_avg, exp_avg_sq, torch.ones(SIZE), master, 1, 0.0, **SETTINGS)
    assert torch.equal(master, kept)
    assert bool((exp_avg > 0).all())
