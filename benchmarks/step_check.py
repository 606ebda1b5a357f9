"""The correctness gate of train_step: a small decoder and adapters of mixed ranks on the device, against plain torch in fp32.

N adapters, D elements of one, S tokens of a row. A number is printed only after this has passed, planted errors included.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from step_contenders import RULE, SMALL, Adapter, random_decoder
from torch import Tensor

from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes, resolve_targets
from weft.actors.model import Decoder
from weft.actors.slab_batch import SlabBatch
from weft.kernels.logprob import token_logprobs
from weft.kernels.optim import adamw_step, adamw_steps

RANKS, ROWS = (32, 8, 24, 16), ((64, 64), (64,), (64, 64, 64), (64,))
BOUND = 3e-2  # of a bf16 gradient's relative error, norm against norm
FP8_BOUND = 0.2  # of the same where the base's products are in FP8
JOINT_BOUND = 1e-2  # of the same between a step beside others and a step alone
PLANTED = 1.1  # a scale that is wrong by a tenth


def check(device: torch.device) -> dict[str, Any]:
    """-> the errors that were seen. Raises AssertionError where one is over its bound."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = random_decoder(SMALL, device, dtype)
    for name, weight in decoder.named_parameters():
        if not name.endswith("norm"):
            weight.mul_(3)  # so that attention and SwiGLU are far from linear
    adapters = [_adapter(rank, device, dtype, seed) for seed, rank in enumerate(RANKS)]
    truth = _truth(decoder, adapters)
    joint = _gradients(decoder, adapters, range(len(RANKS)))
    errors = [_error(found, wanted) for found, wanted in zip(joint, truth, strict=True)]
    assert max(errors) < BOUND, f"gradient errors {errors}"
    solo = [_gradients(decoder, adapters, range(n, n + 1))[0] for n in range(len(RANKS))]
    apart = [_error(found, wanted) for found, wanted in zip(joint, solo, strict=True)]
    assert max(apart) < JOINT_BOUND, f"joint against solo {apart}"
    uneven = _gradients(decoder, adapters, range(len(RANKS)), uneven=True)
    uneven_errors = [_error(one, two) for one, two in zip(uneven, _truth(decoder, adapters, uneven=True), strict=True)]
    assert max(uneven_errors) < BOUND, f"gradient errors with rows of several lengths {uneven_errors}"
    narrow = _check_fp8(decoder, adapters, truth) if device.type == "cuda" else {}
    adapters[1].scale *= PLANTED
    planted = _error(_gradients(decoder, adapters, range(len(RANKS)))[1], truth[1])
    adapters[1].scale /= PLANTED
    assert planted > BOUND, f"a scale wrong by a tenth went unseen: error {planted}"
    return {
        "gradient_relative_error": max(errors),
        "gradient_relative_error_rows_of_several_lengths": max(uneven_errors),
        "joint_against_solo": max(apart),
        "planted_scale_error_seen_as": planted,
        **narrow,
        **_check_optimizer(decoder, adapters),
    }


def _check_fp8(decoder: Decoder, adapters: list[Adapter], truth: list[Tensor]) -> dict[str, Any]:
    """The same over the base in FP8; a weight's scale that is wrong by half must be seen."""
    everyone = range(len(RANKS))
    decoder.use_fp8()
    joint = _gradients(decoder, adapters, everyone)
    errors = [_error(found, wanted) for found, wanted in zip(joint, truth, strict=True)]
    assert max(errors) < FP8_BOUND, f"gradient errors in FP8 {errors}"
    solo = [_gradients(decoder, adapters, range(n, n + 1))[0] for n in everyone]
    apart = [_error(found, wanted) for found, wanted in zip(joint, solo, strict=True)]
    assert max(apart) < JOINT_BOUND, f"joint against solo in FP8 {apart}"
    decoder.layers[1].down.narrow.row_scales.mul_(1.5)
    planted = min(_error(*pair) for pair in zip(_gradients(decoder, adapters, everyone), truth, strict=True))
    assert planted > FP8_BOUND, f"a weight's scale wrong by half went unseen: error {planted}"
    decoder.use_fp8(False)
    return {
        "fp8_gradient_relative_error": max(errors),
        "fp8_joint_against_solo": max(apart),
        "fp8_planted_error_seen_as": planted,
    }


def _adapter(rank: int, device: torch.device, dtype: torch.dtype, seed: int) -> Adapter:
    shapes = linear_shapes(SMALL)
    targets = ("all-linear",) if seed != 1 else ("q_proj", "v_proj", "up_proj", "down_proj")
    return Adapter(SlabLayout.build(shapes, resolve_targets(shapes, targets), rank), device, dtype, seed)


def _rows(n: int, uneven: bool) -> list[int]:
    return [length - 7 * index for index, length in enumerate(ROWS[n], start=n)] if uneven else list(ROWS[n])


def _gradients(decoder: Decoder, adapters: list[Adapter], chosen: range, uneven: bool = False) -> list[Tensor]:
    device = decoder.head.device
    rows = [_rows(n, uneven) for n in chosen]
    offsets = torch.tensor([0, *map(sum, rows)]).cumsum(0).tolist()
    bounds = torch.tensor([0, *(length for own in rows for length in own)]).cumsum(0).tolist()
    picked = [adapters[n] for n in chosen]
    scales = tuple(one.scale for one in picked)
    gradients = tuple(torch.full_like(one.gradient, float("nan")) for one in picked)
    if device.type == "cuda":
        layouts, weights = tuple(one.layout for one in picked), tuple(one.weights for one in picked)
        lora: Any = SlabBatch(tuple(offsets), scales, layouts, weights, gradients, (True,) * len(picked))
    else:
        for gradient in gradients:
            gradient.zero_()
        pairs = zip(picked, gradients, strict=True)
        lora = LoraBatch.build(offsets, scales, [one.layout.leaves(one.weights, gradient) for one, gradient in pairs])
    pieces = [_ids(n, sum(own)) for n, own in zip(chosen, rows, strict=True)]
    ids, targets = (torch.cat(ones).to(device) for ones in (pieces, [piece.roll(-1) for piece in pieces]))
    hidden = decoder(ids, bounds, lora)
    logprobs, _ = token_logprobs(hidden, decoder.head, targets, torch.full((len(ids),), 0.8, device=device))
    (logprobs * (ids % 7 - 3.0)).sum().backward()
    return list(gradients)


def _ids(n: int, count: int) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (count,), generator=torch.Generator().manual_seed(n))


def _truth(decoder: Decoder, adapters: list[Adapter], uneven: bool = False) -> list[Tensor]:
    """The same in fp32 on the host, by the reference, from the rounded weights."""
    wide = copy.deepcopy(decoder).float().cpu()
    wide._rope = None
    hosts = []
    for adapter in adapters:
        host = copy.copy(adapter)
        host.weights, host.gradient = adapter.weights.float().cpu(), adapter.gradient.float().cpu()
        hosts.append(host)
    return _gradients(wide, hosts, range(len(adapters)), uneven)


def _error(found: Tensor, wanted: Tensor) -> float:
    error = float((found.float().cpu() - wanted.float().cpu()).norm() / wanted.float().norm().cpu())
    return error if error == error else float("inf")


def _check_optimizer(decoder: Decoder, adapters: list[Adapter]) -> dict[str, Any]:
    """One step of all but the last, whose gradient is not finite: it must keep its bits; the others follow the reference."""
    for adapter in adapters:
        adapter.gradient.normal_()
    adapters[-1].gradient[3] = float("nan")
    kept = adapters[-1].state.clone()
    wanted = []
    for adapter in adapters[:-1]:
        state, weights = adapter.state.cpu().clone(), adapter.weights.cpu().clone()
        adamw_step(*state, adapter.gradient.cpu(), weights, 1, **RULE)
        wanted.append(state)
    norms = adamw_steps([adapter.step() for adapter in adapters])
    assert not norms[-1].isfinite() and norms[:-1].isfinite().all(), f"norms {norms.tolist()}"
    assert torch.equal(adapters[-1].state, kept), "an adapter without a finite gradient has changed"
    errors = [_error(adapter.state, state) for adapter, state in zip(adapters, wanted, strict=False)]
    assert max(errors) < 1e-5, f"optimizer errors {errors}"
    return {"optimizer_relative_error": max(errors), "idle_adapter_unchanged_to_the_bit": True}
