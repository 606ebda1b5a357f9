"""The fused pieces between products against weft.actors.layers: through Triton's interpreter, or on the card."""

# T tokens, H hidden size, D head size, I MLP width

import pytest
import torch
from torch import Tensor

from weft.actors import layers as reference
from weft.kernels.layers import triton as kernels

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = 5


def random(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).to(DEVICE).requires_grad_()


def same(found, wanted, leaves) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def gradients(outs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((out * out.cos()).sum() for out in outs), leaves)

    for one, other in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [8, 37])
def test_a_norm_with_its_residual_equals_the_reference(size: int) -> None:
    x, delta, weight = random(T, size), random(T, size + 0).mul(2).detach().requires_grad_(), random(size).detach()
    total = x + delta
    same(kernels.add_rms_norm(x, delta, weight, 1e-5), (total, reference.rms_norm(total, weight, 1e-5)), (x, delta))
    same(kernels.add_rms_norm(x, None, weight, 1e-5), (x, reference.rms_norm(x, weight, 1e-5)), (x,))
    normed = kernels.add_rms_norm(x, None, weight, 1e-5)[1]
    assert torch.equal(kernels.rms_norm_rows(x.detach(), weight, 1e-5), normed)


@pytest.mark.parametrize("width", [3, 1030])
def test_swiglu_equals_the_reference(width: int) -> None:
    gate_up = random(T, 2 * width)
    same((kernels.swiglu(gate_up),), (reference.swiglu(gate_up),), (gate_up,))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("num_q", "num_kv", "half"), [(4, 2, 8), (3, 3, 5)])
def test_heads_equal_norm_and_rotation(num_q: int, num_kv: int, half: int, normed: bool) -> None:
    qkv = random(T, (num_q + 2 * num_kv) * 2 * half)
    q_norm, k_norm = (random(2 * half).detach(), random(2 * half).detach().flip(0)) if normed else (None, None)
    angle = random(T, 1, half).detach()
    found = kernels.heads(qkv, q_norm, k_norm, angle.cos(), angle.sin(), num_q, num_kv, 1e-6)
    q, k, v = qkv.unflatten(1, (-1, 2 * half)).split([num_q, num_kv, num_kv], dim=1)
    if q_norm is not None:
        q, k = reference.rms_norm(q, q_norm, 1e-6), reference.rms_norm(k, k_norm, 1e-6)
    wanted = (reference.rotate(q, angle.cos(), angle.sin()), reference.rotate(k, angle.cos(), angle.sin()), v)
    same(found, wanted, (qkv,))
