"""kernels.fp8 on the card: products at the shapes of Qwen3-4B, 32,768 tokens, beside bf16's; and what makes their rows, against
the bytes it must move. The check runs first.

    python benchmarks/kernels/bench_fp8.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from bench_lora import BANDWIDTH, SHAPES, TOKENS

from weft.kernels import fp8
from weft.kernels.fp8 import triton as kernels


def _time(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def products(name: str, inputs: int, outputs: int) -> None:
    """Forward, and the input gradient, each in bf16, in FP8, and in FP8 with sums in fp32."""
    x, grad, weight = _random(TOKENS, inputs), _random(TOKENS, outputs), _random(outputs, inputs)
    narrow = fp8.quantize_weight(weight)
    sides = {
        "forward": (x, weight.t(), narrow.rows, narrow.row_scales),
        "dX": (grad, weight, narrow.columns, narrow.column_scales),
    }
    for side, (left, right, rows, scales) in sides.items():
        q, q_scales = fp8.quantize_rows(left)
        exact = left[:64].float() @ right.float()
        found = fp8.product(q[:64], q_scales[:64], rows, scales, None, torch.bfloat16).float()
        assert float((found - exact).norm() / exact.norm()) < 0.06, f"{name} {side}"
        runs: dict[str, Callable[[], object]] = {
            "bf16": lambda left=left, right=right: left @ right,
            "fp8": lambda args=(q, q_scales, rows, scales): fp8.product(*args, None, torch.bfloat16),
            "fp8, sums in fp32": lambda args=(q, q_scales, rows, scales): fp8.product(*args, None, torch.bfloat16, fast=False),
        }
        for kind, run in runs.items():
            took = _time(run)
            rate = 2 * TOKENS * inputs * outputs / took / 1e9
            print(f"{name:8} {side:8} {kind:18} {took:7.3f} ms {rate:6.0f} TFLOP/s", flush=True)


def rows_of(hidden: int, width: int) -> None:
    """The kernels that quantise."""
    x, delta, norm, gate_up = _random(TOKENS, hidden), _random(TOKENS, hidden), _random(hidden), _random(TOKENS, 2 * width)
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "quantize": (3 * TOKENS * hidden, lambda: kernels.quantize_rows(x)),
        "norm": (7 * TOKENS * hidden, lambda: kernels.norm_rows(x, delta, norm, 1e-6)),
        "swiglu": (5 * TOKENS * width, lambda: kernels.swiglu_rows(gate_up)),
        "quantize dY of gate_up": (6 * TOKENS * width, lambda: kernels.quantize_rows(gate_up)),
    }
    for name, (count, run) in runs.items():
        took = _time(run)
        print(f"{name:24} {took:7.3f} ms, {100 * count / BANDWIDTH / took * 1e3:5.1f} % of the copy's rate", flush=True)


def main() -> None:
    for name, (inputs, widths) in SHAPES.items():
        products(name, inputs, sum(widths))
    rows_of(2560, 9728)


if __name__ == "__main__":
    main()
