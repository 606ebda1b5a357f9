"""Each loss against its formula, written out token by token in plain Python; gradients against central differences of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weft.actors.loss import Denominators, LossTokens, adapter_loss, kl_to_base
from weft.configs.schema import LOSSES, LossConfig

torch.set_num_threads(1)
LENGTHS = (3, 1, 7, 4, 2)
ADVANTAGES = (1.3, -0.7, 0.4, -2.1, 0.0)
DENOMINATORS = Denominators(tokens=31, rows=9, max_tokens=11)


def _tokens(seed: int = 0, spread: float = 0.6) -> LossTokens:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    sampler = -3 * torch.rand(len(rows), generator=generator, dtype=torch.float64)
    logprobs = (sampler + spread * torch.randn(len(rows), generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    return LossTokens(
        logprobs=logprobs.requires_grad_(),
        sampler_logprobs=sampler,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64)[rows],
        rows=rows,
        row_tokens=torch.tensor(LENGTHS, dtype=torch.float64),
        staleness=torch.randint(0, 4, (len(rows),), generator=generator).double(),
        base_logprobs=(sampler + 0.3 * torch.randn(len(rows), generator=generator, dtype=torch.float64)),
    )


def _clip(r: float, a: float, c: LossConfig) -> float:
    return min(r * a, min(max(r, 1 - c.clip_low), 1 + c.clip_high) * a)


def _value(c: LossConfig, p: float, q: float, a: float, s: float, now: float, row: tuple[float, float]) -> float:
    """One token's value. now: the p at which gradients are taken, for what the paper stops; row: GSPO's s, and s at now."""
    r = math.exp(p - q)
    if c.name == "cross_entropy":
        return -a * p
    if c.name == "decoupled_ppo":
        proximal = q + (s - 1) / s * (now - q) if s > 0 else now
        w = math.exp(proximal - q)
        if c.correction == "tis":
            w = min(w, c.correction_cap)
        if c.correction == "icepop" and not 1 / c.correction_cap <= w <= c.correction_cap:
            w = 0.0
        return -w * _clip(math.exp(p - proximal), a, c)
    r_now = math.exp(now - q)
    if c.name == "gspo":
        r, r_now = row
    if c.correction == "tis" and r_now > c.correction_cap:
        r = c.correction_cap * (r / r_now)  # the value is the cap, the slope that of r rescaled to it
        r_now = c.correction_cap
    if c.correction == "icepop" and not 1 / c.correction_cap <= r_now <= c.correction_cap:
        return 0.0
    if c.name == "importance_sampling":
        return -r * a
    if c.name in ("ppo", "grpo", "dr_grpo", "gspo"):
        return -_clip(r, a, c)
    if c.name == "cispo":
        return -min(max(r_now, 1 - c.clip_low), 1 + c.clip_high) * a * p
    assert c.name == "dppo"
    moved = math.exp(now) - math.exp(q)
    if (a > 0 and moved > c.clip_high) or (a < 0 and -moved > c.clip_low):
        return 0.0
    return -r * a


def _formula(c: LossConfig, t: LossTokens, p: list[float], now: list[float], d: Denominators) -> float:
    q, rows = t.sampler_logprobs.tolist(), t.rows.tolist()
    total = 0.0
    for row, length in enumerate(LENGTHS):
        of_row = [i for i in range(len(p)) if rows[i] == row]
        s = math.exp(sum(p[i] - q[i] for i in of_row) / length)
        s_now = math.exp(sum(now[i] - q[i] for i in of_row) / length)
        for i in of_row:
            v = _value(c, p[i], q[i], float(t.advantages[i]), float(t.staleness[i]), now[i], (s, s_now))
            if c.kl_coefficient:
                gap = float(t.base_logprobs[i]) - p[i]  # type: ignore[index]
                v += c.kl_coefficient * (math.exp(gap) - gap - 1)
            per_token = {"token": 1 / d.tokens, "sequence": 1 / (length * d.rows), "constant": 1 / (d.rows * d.max_tokens)}
            total += v * per_token[c.denominator]
    return total


@pytest.mark.parametrize("correction", ["none", "tis", "icepop"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_each_loss_and_its_gradient_equal_the_formula(name: str, normalization: str, correction: str) -> None:
    if name == "cross_entropy" and correction != "none":
        with pytest.raises(ValueError, match="correction='"):
            LossConfig(name=name, correction=correction)
        return
    for seed in range(4):
        config = LossConfig(name=name, normalization=normalization, correction=correction, correction_cap=1.4, clip_high=0.3)
        config = replace(config, kl_coefficient=0.1 * (seed % 2))
        tokens = _tokens(seed)
        result = adapter_loss(config, tokens, DENOMINATORS)
        result.loss.backward()
        now = tokens.logprobs.tolist()
        assert result.loss.item() == pytest.approx(_formula(config, tokens, now, now, DENOMINATORS), rel=1e-6, abs=1e-9)
        step = 1e-6
        for i in range(len(now)):
            up, down = list(now), list(now)
            up[i], down[i] = now[i] + step, now[i] - step
            slope = _formula(config, tokens, up, now, DENOMINATORS) - _formula(config, tokens, down, now, DENOMINATORS)
            assert float(tokens.logprobs.grad[i]) == pytest.approx(slope / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_advantage_zero_left_out_give_the_gradient_of_rows_kept(name: str) -> None:
    """Which is why the pipeline may leave them out, as long as the denominators count them and there is no KL term."""
    for correction in ("none",) if name == "cross_entropy" else ("none", "tis", "icepop"):
        config = LossConfig(name=name, correction=correction)
        kept = _tokens()
        adapter_loss(config, kept, DENOMINATORS).loss.backward()
        here = kept.advantages != 0
        part = LossTokens(
            kept.logprobs.detach()[here].requires_grad_(), kept.sampler_logprobs[here], kept.advantages[here], kept.rows[here],
            kept.row_tokens, kept.staleness[here],
        )  # fmt: skip
        adapter_loss(config, part, DENOMINATORS).loss.backward()
        assert not kept.logprobs.grad[~here].any()
        torch.testing.assert_close(part.logprobs.grad, kept.logprobs.grad[here], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_launches_of_whole_rows_sum_to_the_loss_of_all(name: str) -> None:
    config = LossConfig(name=name, kl_coefficient=0.05)
    whole = _tokens()
    result = adapter_loss(config, whole, DENOMINATORS)
    result.loss.backward()
    total, gradient = 0.0, torch.zeros_like(whole.logprobs)
    for rows in ((0, 1), (2, 3, 4)):
        here = torch.isin(whole.rows, torch.tensor(rows))
        part = LossTokens(
            whole.logprobs.detach()[here].requires_grad_(), whole.sampler_logprobs[here], whole.advantages[here],
            whole.rows[here] - rows[0], whole.row_tokens[list(rows)], whole.staleness[here], whole.base_logprobs[here],
        )  # fmt: skip
        loss = adapter_loss(config, part, DENOMINATORS).loss
        loss.backward()
        total += loss.item()
        gradient[here] = part.logprobs.grad
    assert total == pytest.approx(result.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, whole.logprobs.grad, rtol=1e-12, atol=1e-15)


def test_what_is_reported_is_what_happened() -> None:
    tokens = _tokens()
    ratio = (tokens.logprobs.detach() - tokens.sampler_logprobs).exp()
    result = adapter_loss(LossConfig(name="ppo", correction="icepop", correction_cap=1.7), tokens, DENOMINATORS)
    masked = (ratio > 1.7) | (ratio < 1 / 1.7)
    clipped = ((ratio > 1.2) & (tokens.advantages > 0)) | ((ratio < 0.8) & (tokens.advantages < 0))
    assert result.corrected.tolist() == masked.float().tolist()
    assert result.clipped.tolist() == (clipped & ~masked).float().tolist()
    torch.testing.assert_close(result.ratio, ratio)
    assert result.kl is None
    assert masked.any()
    assert (clipped & ~masked).any()
    bounded = adapter_loss(LossConfig(name="cispo"), tokens, DENOMINATORS).clipped  # whatever the advantage
    assert bounded.tolist() == ((ratio > 1.2) | (ratio < 0.8)).float().tolist()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo", "dppo", "decoupled_ppo"])
@pytest.mark.parametrize("correction", ["tis", "icepop"])
def test_a_correction_bounds_a_ratio_that_overflows(name: str, correction: str) -> None:
    tokens = _tokens()
    far: Tensor = torch.full_like(tokens.sampler_logprobs, -2000.0)
    tokens = replace(tokens, sampler_logprobs=far, advantages=-torch.ones_like(far), staleness=torch.zeros_like(far))
    result = adapter_loss(LossConfig(name=name, correction=correction), tokens, DENOMINATORS)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert torch.isfinite(tokens.logprobs.grad).all()
    assert bool(tokens.logprobs.grad.any()) == (correction == "tis")


def test_the_kl_estimate_is_never_negative_and_zero_for_equals() -> None:
    logprobs, base = -5 * torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    assert bool((kl_to_base(logprobs, base) >= 0).all())
    assert not kl_to_base(logprobs, logprobs).any()


def test_the_mean_of_the_kl_estimate_over_the_policys_samples_is_the_kl_divergence() -> None:
    policy, base = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean = (policy * kl_to_base(policy.log(), base.log())).sum()
    torch.testing.assert_close(mean, (policy * (policy / base).log()).sum())


def test_the_gradient_of_the_kl_estimate_over_the_policys_samples_is_that_of_the_reversed_divergence() -> None:
    logits = torch.tensor([0.9, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    policy = logits.log_softmax(0)
    (found,) = torch.autograd.grad((policy.detach().exp() * kl_to_base(policy, base.log())).sum(), logits, retain_graph=True)
    (reversed_,) = torch.autograd.grad((base * (base.log() - policy)).sum(), logits)
    torch.testing.assert_close(found, reversed_)
