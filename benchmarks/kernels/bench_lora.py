"""kernels.lora on the card: each kernel at the shapes of Qwen3-4B, 32,768 tokens, rank 32, against the bytes it must move.

    python benchmarks/kernels/bench_lora.py [--adapters 8] [--sweep] [--only mlp]

The check runs first. --sweep: other block sizes of expand and of the MLP.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import triton

from weft.kernels.layers.triton import swiglu_gradient
from weft.kernels.lora import mlp
from weft.kernels.lora import triton as kernels
from weft.kernels.lora.tables import SlabGroup, Tables, build_tables

TOKENS, RANK, BANDWIDTH = 32768, 32, 4.3e12  # bytes a second of a device copy on one H200
SWEEP = (  # tokens and columns of a block, blocks of columns of a program, warps, stages
    (128, 128, 1, 8, 1), (64, 128, 1, 4, 1), (64, 64, 1, 4, 1), (64, 128, 4, 4, 1), (64, 128, 4, 4, 2), (64, 128, 16, 4, 2),
    (128, 64, 16, 4, 2), (128, 128, 4, 8, 1), (64, 256, 1, 8, 1), (64, 64, 8, 4, 1), (32, 256, 4, 4, 1),
)  # fmt: skip
MLP_SWEEP = (  # tokens and columns of a block, warps, stages, registers of a thread at most
    (32, 64, 4, 3, None), (32, 64, 4, 3, 168), (32, 64, 4, 2, 168), (32, 64, 4, 2, None), (32, 128, 8, 3, None),
    (32, 128, 8, 2, 128), (64, 64, 8, 2, 128), (32, 64, 4, 4, 168),
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
        self.addresses = group = SlabGroup(in_features, widths, *addresses)
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


def measure_mlp(adapters: int, sweep: bool) -> None:
    """SwiGLU's backward and the sums that it makes in passing, against the kernels that do the same apart."""
    gate_up, down = Problem(*SHAPES["gate_up"], adapters), Problem(*SHAPES["down"], adapters)
    tables = joined(gate_up, down, adapters)
    hidden, active, groups = _random(TOKENS, 2 * down.x.shape[1]), down.x, tables.groups
    low, grad_low = (kernels.shrink(one.x, tables, own, "a") for one, own in zip((gate_up, down), groups, strict=True))

    def apart() -> torch.Tensor:
        grad, again = swiglu_gradient(hidden, active)
        kernels.outer(grad_low, again, tables, groups[1], "grad_a")
        kernels.outer(low, grad, tables, groups[0], "grad_b")
        return grad

    def sums() -> list[torch.Tensor]:
        return [one.clone() for one in (down.grads[0][0][0], gate_up.grads[1][0][0], gate_up.grads[1][1][0])]

    run = partial(mlp.swiglu_outer, hidden, active, low, grad_low, tables, *groups)
    found, of_found, wanted, of_wanted = run(), sums(), apart(), sums()
    assert torch.equal(found, wanted) and all(_error(*pair) < 1e-2 for pair in zip(of_found, of_wanted, strict=True)), "mlp"
    count = 2 * 5 * active.numel()
    for name, one in (("apart", apart), ("together", run)):
        took = _time(one)
        print(
            f"mlp      {name:10} {took:7.3f} ms, {100 * count / BANDWIDTH / took * 1e3:5.1f} % of the copy's rate", flush=True
        )
    for block_t, block_c, warps, stages, registers in MLP_SWEEP if sweep else ():
        mlp.SETTINGS.update(BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps, num_stages=stages, maxnreg=registers)
        print(
            f"    T={block_t} C={block_c} warps={warps} stages={stages} registers={registers}: {_time(run):.3f} ms", flush=True
        )


def joined(gate_up: Problem, down: Problem, adapters: int) -> Tables:
    """Both in one batch's tables."""
    offsets = [n * (TOKENS // adapters) for n in range(adapters + 1)]
    groups = [gate_up.addresses, down.addresses]
    return build_tables(torch.device("cuda"), TOKENS, offsets, [RANK] * adapters, [1.0] * adapters, groups, [False] * adapters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", default="", help="one shape, or mlp")
    options = parser.parse_args()
    for name, (in_features, widths) in SHAPES.items():
        if options.only not in ("", name):
            continue
        measure(name, Problem(in_features, widths, options.adapters), options.sweep and name in ("qkv", "gate_up"))
    if options.only in ("", "mlp"):
        measure_mlp(options.adapters, options.sweep)


if __name__ == "__main__":
    main()
