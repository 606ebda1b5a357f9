"""kernels.lora against the formula written out with autograd."""

# T tokens, N adapters, R rank, I in, O out

import pytest
import torch
from torch import Tensor

from weft.kernels.lora import fused_lora_linear, lora_linear

torch.set_num_threads(1)
IN, WIDTHS = 13, (7, 5, 11)
# tokens of each adapter, and the rank of each
CASES = {
    "one adapter": ([9], [4]),
    "mixed ranks": ([5, 1, 8], [1, 16, 3]),
    "one has no tokens": ([6, 0, 4], [4, 4, 4]),
    "one has all tokens": ([0, 12, 0], [2, 8, 2]),
    "nobody has tokens": ([0, 0], [2, 3]),
    "tokens without adapter": ([3, 4], [2, 3]),
}


def problem(case: str, dtype: torch.dtype = torch.float64, missing: tuple[tuple[int, int], ...] = ()):
    """missing: (part, adapter) pairs that are None."""
    tokens, ranks = CASES[case]
    draw = torch.Generator().manual_seed(len(case))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    offsets = [0]
    for count in tokens:
        offsets.append(offsets[-1] + count)
    total = offsets[-1] + (3 if case in ("tokens without adapter", "nobody has tokens") else 0)
    x, weight, bias = random(total, IN), random(sum(WIDTHS), IN).detach(), random(sum(WIDTHS)).detach()
    a = [[None if (p, n) in missing else random(rank, IN) for n, rank in enumerate(ranks)] for p in range(len(WIDTHS))]
    b = [[None if (p, n) in missing else random(width, rank) for n, rank in enumerate(ranks)] for p, width in enumerate(WIDTHS)]
    scales = [0.5 + n for n in range(len(ranks))]
    return x, weight, bias, a, b, scales, offsets


def formula(x, weight, bias, a, b, scales, offsets) -> Tensor:
    rows = []
    for token in range(x.shape[0]):
        owner = next((n for n in range(len(scales)) if offsets[n] <= token < offsets[n + 1]), None)
        parts = []
        for part, part_weight in enumerate(weight.split(WIDTHS)):
            y = part_weight @ x[token]
            if owner is not None and a[part][owner] is not None:
                y = y + scales[owner] * b[part][owner] @ (a[part][owner] @ x[token])
            parts.append(y)
        rows.append(torch.cat(parts) + bias)
    return torch.stack(rows)


def gradients(out: Tensor, x: Tensor, a, b) -> list[Tensor | None]:
    leaves = [x, *(leaf for part in (*a, *b) for leaf in part if leaf is not None)]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True))


def same(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        shape = next((grad.shape for grad in (one, other) if grad is not None), ())  # no gradient is a gradient of zero
        pair = [torch.zeros(shape, dtype=torch.float64) if grad is None else grad for grad in (one, other)]
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("missing", [(), ((1, 0),), ((0, 0), (1, 0), (2, 0))], ids=["whole", "less a part", "untouched"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_formula(case: str, missing: tuple[tuple[int, int], ...]) -> None:
    x, weight, bias, a, b, scales, offsets = problem(case, missing=missing)
    out = fused_lora_linear(x, weight, bias, WIDTHS, a, b, scales, offsets)
    wanted = formula(x, weight, bias, a, b, scales, offsets)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    same(gradients(out, x, a, b), gradients(wanted, x, a, b), 1e-11)


def test_a_single_linear_is_a_fused_one_of_one_part() -> None:
    x, weight, _, a, b, scales, offsets = problem("mixed ranks")
    part = weight[: WIDTHS[0]]
    out = lora_linear(x, part, None, a[0], b[0], scales, offsets)
    fused = fused_lora_linear(x, weight, None, WIDTHS, a, b, scales, offsets)
    torch.testing.assert_close(out, fused[:, : WIDTHS[0]], rtol=1e-12, atol=1e-12)


def test_no_adapter_touches_another_adapters_tokens() -> None:
    x, weight, bias, a, b, scales, offsets = problem("mixed ranks")
    sound = fused_lora_linear(x, weight, bias, WIDTHS, a, b, scales, offsets)
    with torch.no_grad():
        for part in range(len(WIDTHS)):
            a[part][1].fill_(float("nan"))
            b[part][1].fill_(float("nan"))
    poisoned = fused_lora_linear(x, weight, bias, WIDTHS, a, b, scales, offsets)
    start, stop = offsets[1:3]
    assert poisoned[start:stop].isnan().all()
    others = [row for row in range(x.shape[0]) if not start <= row < stop]
    assert torch.equal(poisoned[others], sound[others])
    grads = dict(zip(["x", *range(18)], gradients(poisoned, x, a, b), strict=True))
    assert not grads["x"][others].isnan().any()
    healthy = [grads[index] for index in range(18) if index % 3 != 1]
    assert not any(grad.isnan().any() for grad in healthy)


def test_an_input_without_gradient_costs_none_and_changes_none() -> None:
    x, weight, bias, a, b, scales, offsets = problem("mixed ranks")
    wanted = gradients(fused_lora_linear(x, weight, bias, WIDTHS, a, b, scales, offsets), x, a, b)[1:]
    out = fused_lora_linear(x.detach(), weight, bias, WIDTHS, a, b, scales, offsets)
    leaves = [leaf for part in (*a, *b) for leaf in part]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_bfloat16_stays_within_its_own_rounding() -> None:
    rounded = problem("mixed ranks", torch.bfloat16)
    x, weight, bias, a, b, scales, offsets = rounded
    out = fused_lora_linear(x, weight, bias, WIDTHS, a, b, scales, offsets)
    assert out.dtype == torch.bfloat16
    wide = [[[leaf.detach().double() for leaf in part] for part in parts] for parts in (a, b)]
    wanted = formula(x.detach().double(), weight.double(), bias.double(), *wide, scales, offsets)
    error = (out.double() - wanted).norm() / wanted.norm()
    assert error < 1e-2


def test_offsets_beyond_the_tokens_are_refused() -> None:
    x, weight, bias, a, b, scales, offsets = problem("mixed ranks")
    with pytest.raises(AssertionError, match="offsets end"):
        fused_lora_linear(x[:-1], weight, bias, WIDTHS, a, b, scales, offsets)
