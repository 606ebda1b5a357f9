"""kernels.lora on the card: each kernel at the shapes of Qwen3-4B, 32,768 tokens, rank 32, against the bytes it must move.

    python benchmarks/kernels/bench_lora.py [--adapters 8] [--sweep]

The check runs first. --sweep: other block sizes of expand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import triton

from weft.kernels.lora import triton as kernels
from weft.kernels.lora.tables import SlabGroup, Tables, build_tables

TOKENS, RANK, BANDWIDTH = 32768, 32, 4.3e12  # bytes a second of a device copy on one H200
SWEEP = (  # tokens and columns of a block, blocks of columns of a program, warps, stages
    (128, 128, 1, 8, 1), (64, 128, 1, 4, 1), (64, 64, 1, 4, 1), (64, 128, 4, 4, 1), (64, 128, 4, 4, 2), (64, 128, 16, 4, 2),
    (128, 64, 16, 4, 2), (128, 128, 4, 8, 1), (64, 256, 1, 8, 1), (64, 64, 8, 4, 1), (32, 256, 4, 4, 1),
)  # fmt: skip
SHAPES = {"qkv": (2560, (4096, 1024, 1024)), "o": (4096, (2560,)), "gate_up": (2560, (9728, 9728)), "down": (9728, (2560,))}


class Problem:
    """One fused linear with random adapters."""

    def __init__(self, in_features: int, widths: tuple[int, ...], adapters: int) -> None:
        self.a = [[_random(RANK, in_features) for _ in range(adapters)] for _ in widths]
        self.b = [[_random(width, RANK) for _ in range(adapters)] for width in widths]
        self.grads = [[[torch.zeros_like(one, dtype=torch.float32) for one in part] for part in parts]
                      for parts in (self.a, self.b)]  # fmt: skip
        self.x, self.y = _random(TOKENS, in_features), _random(TOKENS, sum(widths))
        addresses = [np.array([[one.data_ptr() for one in part] for part in parts]) for parts in (self.a, self.b, *self.grads)]
        offsets = [n * (TOKENS // adapters) for n in range(adapters + 1)]
        group = SlabGroup(in_features, widths, *addresses)
        self.tables: Tables = build_tables(
            torch.device("cuda"), TOKENS, offsets, [RANK] * adapters, [1.0] * adapters, [group], [False] * adapters
        )
        self.group = self.tables.groups[0]

    def check(self) -> None:
        """Raises AssertionError where the first adapter's rows are off."""
        low = kernels.shrink(self.x, self.tables, self.group, "a")
        wanted = torch.cat([self.x[:64].float() @ part[0].float().T for part in self.a], dim=1)
        assert _error(low[:64], wanted) < 1e-2, "shrink"
        out = kernels.expand(low, self.tables, self.group, "b", None)
        lows = low[:64].float().split(RANK, dim=1)
        wanted = torch.cat([one @ part[0].float().T for one, part in zip(lows, self.b, strict=True)], dim=1)
        assert _error(out[:64], wanted) < 1e-2, "expand"


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def _time(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))


def measure(name: str, own: Problem, sweep: bool) -> None:
    own.check()
    tables, group = own.tables, own.group
    low, grad_low = kernels.shrink(own.x, tables, group, "a"), kernels.shrink(own.y, tables, group, "b")
    wide, tall = 2 * own.y.numel(), 2 * own.x.numel()
    rows = {
        "shrink x": (tall, lambda: kernels.shrink(own.x, tables, group, "a")),
        "shrink dY": (wide, lambda: kernels.shrink(own.y, tables, group, "b")),
        "expand": (wide, lambda: kernels.expand(low, tables, group, "b", None)),
        "expand dX": (tall, lambda: kernels.expand(grad_low, tables, group, "a", None)),
        "outer dA": (tall, lambda: kernels.outer(grad_low, own.x, tables, group, "grad_a")),
        "outer dB": (wide, lambda: kernels.outer(low, own.y, tables, group, "grad_b")),
    }
    for kernel, (count, run) in rows.items():
        took = _time(run)
        share = 100 * count / BANDWIDTH / took * 1e3
        print(f"{name:8} {kernel:10} {took:7.3f} ms, {share:5.1f} % of the copy's rate", flush=True)
    for block_t, block_o, span, warps, stages in SWEEP if sweep else ():
        kernels.EXPAND.update(BLOCK_T=block_t, BLOCK_O=block_o, SPAN=span, num_warps=warps, num_stages=stages)
        took = [_time(rows[kernel][1]) for kernel in ("expand", "expand dX")]
        shape = f"T={block_t} O={block_o} span={span} warps={warps} stages={stages}"
        print(f"    expand {shape}: {took[0]:.3f} and {took[1]:.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    for name, (in_features, widths) in SHAPES.items():
        measure(name, Problem(in_features, widths, options.adapters), options.sweep and name in ("qkv", "gate_up"))


if __name__ == "__main__":
    main()
