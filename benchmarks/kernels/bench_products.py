"""kernels.lora.products on the card: what cuBLAS chooses by itself against its other algorithms, at the shapes of Qwen3-4B.

    python benchmarks/kernels/bench_products.py [--tokens 32768]

Each product adds itself to its output, but for FP8 through PyTorch, which cannot. The check runs first. TFLOP/s, in the order
in which they were measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from weft.kernels.fp8 import product, quantize_rows
from weft.kernels.lora import cublas, products

SHAPES = {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)}  # O, I
RUNS, TURNS = 6, 3
Product = Callable[[], object]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02


def _time(run: Product) -> float:
    """Milliseconds: the best of several turns, for other work on the card only ever adds."""
    times = []
    for _ in range(TURNS):
        run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(RUNS):
            run()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) / RUNS)
    return min(times)


def _check(out: Tensor, before: Tensor, wanted: Tensor) -> None:
    error = float(((out.float() - before.float()) - wanted.float()).norm() / wanted.float().norm())
    assert error < 3e-2, f"relative error {error}"


def _say(name: str, flop: float, runs: dict[str, Product], plan: cublas.Plan, out: Tensor, x: Tensor, weight: Tensor) -> None:
    before = {what: flop / _time(run) for what, run in runs.items()}
    each = [flop / own for own in cublas.measure(plan, plan.candidates, out, x, weight)]
    after = {what: flop / _time(run) for what, run in runs.items()}
    shown = ", ".join(f"{what} {before[what]:.0f} {after[what]:.0f}" for what in runs)
    print(f"{name:12} {shown}; each algorithm {[round(rate) for rate in each]}", flush=True)


def bf16(name: str, weight: Tensor, tokens: int, transposed: bool) -> None:
    """transposed: the input gradient. flipped: the same through a transposed copy of the weight."""
    width, depth = weight.shape[::-1] if transposed else weight.shape
    x, out = _random(tokens, depth), _random(tokens, width)
    before, right = out[:256].clone(), weight if transposed else weight.t()
    assert cublas.product(out, x, weight, transposed, add=True)
    _check(out[:256], before, x[:256] @ right)
    plan = cublas.library(x.device).plan(cublas.shape_of(x, weight, transposed, True))
    assert plan is not None
    runs: dict[str, Product] = {"torch": partial(out.addmm_, x, right), "chosen": partial(plan.run, out, x, weight)}
    if transposed:
        runs["flipped"] = partial(out.addmm_, x, weight.t().contiguous().t())
    _say(f"{name} {'dY' if transposed else 'x'}", 2e-9 * tokens * width * depth, runs, plan, out, x, weight)


def fp8(name: str, width: int, depth: int, tokens: int) -> None:
    rows, weight, out = quantize_rows(_random(tokens, depth)), quantize_rows(_random(width, depth)), _random(tokens, width)
    if not products.can_add_fp8(rows[0], weight[0]):
        print(f"{name:12} no algorithm adds {width} x {depth} in FP8", flush=True)
        return
    before = out[:256].clone()
    products.add_fp8_product(out, *rows, *weight)
    _check(out[:256], before, product(rows[0][:256], rows[1][:256], *weight, None, torch.bfloat16))
    plan = cublas.library(out.device).plan(cublas.shape_of(rows[0], weight[0], False, True))
    assert plan is not None
    runs: dict[str, Product] = {
        "torch": partial(product, *rows, *weight, None, torch.bfloat16),
        "added": partial(products.add_fp8_product, out, *rows, *weight),
    }
    _say(f"{name} FP8", 2e-9 * tokens * width * depth, runs, plan, out, rows[0], weight[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        for transposed in (False, True):
            bf16(name, _random(*shape), options.tokens, transposed)
    for name, (out_features, in_features) in SHAPES.items():
        fp8(name, out_features, in_features, options.tokens)
        fp8(name, in_features, out_features, options.tokens)


if __name__ == "__main__":
    main()
