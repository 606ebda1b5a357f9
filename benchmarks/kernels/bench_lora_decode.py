"""kernels.lora_decode on the card: a decode step's linears of the Qwen3-4B shape with adapters and without, in CUDA graphs.

    python benchmarks/kernels/bench_lora_decode.py            # the settings in use, chained, not chained, on a side stream
    python benchmarks/kernels/bench_lora_decode.py --tune     # other settings; compiles them in several processes first

A graph holds one linear of several layers, each with weights of its own so that no cache serves them; what is printed is the
time of a base product with adapters less that of the base product alone, in microseconds, beside what the adapters' bytes take.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from weft.kernels.lora_decode import Work, reference
from weft.kernels.lora_decode import triton as kernels
from weft.kernels.lora_decode.triton import Settings

LINEARS = {"qkv": (2560, (4096, 1024, 1024)), "o": (4096, (2560,)), "gate_up": (2560, (9728, 9728)), "down": (9728, (2560,))}
BANDWIDTH = 4.3e12  # bytes a second of a device copy on one H200
MAX_TOKENS, RANK = 8192, 32


@dataclass
class Layers:
    """One linear of several layers with `slots` adapters."""

    name: str
    layers: int
    slots: int

    def __post_init__(self) -> None:
        inputs, widths = LINEARS[self.name]
        self.inputs, self.width = inputs, sum(widths)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02

        self.base = [random(self.width, inputs) for _ in range(self.layers)]
        self.a = [[random(self.slots, 1, RANK, inputs) for _ in widths] for _ in range(self.layers)]
        self.b = [[random(self.slots, 1, width, RANK) for width in widths] for _ in range(self.layers)]
        self.work = Work(MAX_TOKENS, self.slots, "cuda")
        self.side = torch.cuda.Stream()

    def fill(self, tokens: int, adapters: int) -> None:
        self.x = torch.randn(tokens, self.inputs, device="cuda", dtype=torch.bfloat16)
        self.work.update(np.arange(tokens) % adapters if adapters else np.full(tokens, -1), [RANK] * self.slots)
        self.floor = min(tokens, adapters) * RANK * 2 * (self.width + self.inputs * len(self.a[0])) / BANDWIDTH

    def step(self, own: Settings | None, how: str) -> None:
        """how: "base", "chained", "plain", or "side" (shrink beside the base product)."""
        places = (self.work.table, self.work.max_tokens)
        for base, a, b in zip(self.base, self.a, self.b, strict=True):
            chosen = own or kernels.settings(len(self.x), RANK, self.inputs)
            if how == "side":
                main = torch.cuda.current_stream()
                self.side.wait_stream(main)
                with torch.cuda.stream(self.side):
                    sums = kernels.shrink(self.x, a, *places, chosen, False)
                y = F.linear(self.x, base)
                main.wait_stream(self.side)
                kernels.expand(sums, y, b, *places, 1.0, True, chosen, False)
                continue
            y = F.linear(self.x, base)
            if how != "base":
                sums = kernels.shrink(self.x, a, *places, chosen, how == "chained")
                kernels.expand(sums, y, b, *places, 1.0, True, chosen, how == "chained")
        self.y = y

    def check(self, own: Settings | None, how: str) -> None:
        """The last layer against the reference."""
        self.step(own, how)
        wanted = F.linear(self.x, self.base[-1]).float()
        a, b = ([one.float() for one in stacks[-1]] for stacks in (self.a, self.b))
        reference.add_lora(wanted, self.x.float(), a, b, self.work.table, self.work.max_tokens, 1.0, True)
        error = float((self.y.float() - wanted).norm() / wanted.norm())
        assert error < 1e-2, f"{self.name} {own} {how}: error {error}"


def timed(run: Callable[[], None], layers: int, times: int = 15) -> float:
    """Microseconds a layer, of one CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    took = []
    for index in range(times + 3):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        if index >= 3:
            took.append(began.elapsed_time(ended) * 1e3 / layers)
    return statistics.median(took)


def candidates(tokens: int, inputs: int) -> Iterator[tuple[str, Settings]]:
    """What --tune tries: one side at a time."""
    usual = kernels.settings(tokens, RANK, inputs)
    yield "usual", usual
    if tokens <= 512:
        forms = [
            (256, 256, 4, 1, 1056), (256, 256, 4, 1, 2112), (128, 512, 4, 3, 1056), (128, 512, 4, 3, 1584),
            (128, 512, 4, 4, 1056), (128, 1024, 4, 4, 1056), (128, 1024, 4, 4, 792),
        ]  # fmt: skip
        spans = [(256, 396, 4, 2), (256, 528, 4, 2), (256, 264, 8, 3), (256, 396, 8, 2), (128, 528, 4, 3)]
        heights = [0, 1]
    else:
        forms = [
            (64, 1280, 4, 3, 528), (64, 640, 4, 4, 528), (128, 1280, 8, 3, 264), (128, 1280, 8, 2, 264), (64, 2560, 4, 4, 528),
        ]  # fmt: skip
        spans = [(128, 396, 4, 3), (64, 528, 4, 4), (128, 264, 8, 3), (128, 132, 8, 4), (128, 264, 4, 4), (256, 132, 8, 3)]
        heights = [2]
    for depth, chunk, warps, stages, programs in forms:
        own = usual._replace(depth=depth, chunk=chunk, shrink_warps=warps, shrink_stages=stages, shrink_programs=programs)
        yield f"shrink {depth} {chunk} {warps} {stages} {programs}", own
    for columns, programs, warps, stages in spans:
        own = usual._replace(columns=columns, expand_programs=programs, expand_warps=warps, expand_stages=stages)
        yield f"expand {columns} {programs} {warps} {stages}", own
    for height in heights:
        yield f"height {height}", usual._replace(height=height)


def compile_all(tokens: list[int], share: int, of: int) -> None:
    """Run this process' share of the candidates once, on a linear without tokens."""
    every = [(name, count, own) for count in tokens for name in LINEARS for _, own in candidates(count, LINEARS[name][0])]
    held: dict[str, Layers] = {}
    for name, count, own in sorted(set(every))[share::of]:
        layers = held.setdefault(name, Layers(name, 1, 1))
        layers.fill(min(count, 16), 0)
        for how in ("chained",):
            layers.step(own, how)
    torch.cuda.synchronize()


def measure(layers: Layers, cases: list[tuple[int, int]], tune: bool) -> None:
    def cost(own: Settings | None, how: str) -> float:
        layers.check(own, how)
        return timed(lambda: layers.step(own, how), layers.layers) - base

    for tokens, adapters in cases:
        layers.fill(tokens, adapters)
        base = timed(lambda: layers.step(None, "base"), layers.layers)
        line = f"{layers.name:8} {tokens:5}x{adapters:<3} base {base:7.2f} floor {layers.floor * 1e6:6.2f} |"
        if tune:
            found = [(cost(own, "chained"), label) for label, own in candidates(tokens, layers.inputs)]
            print(line, " ; ".join(f"{label} +{took:.2f}" for took, label in [found[0], *sorted(found[1:])]), flush=True)
        else:
            print(line, " | ".join(f"{how} +{cost(None, how):6.2f}" for how in ("chained", "plain", "side")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--cases", default="8x8,64x1,64x8,64x64,256x1,256x8,256x64,256x256")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--compile", default="")
    options = parser.parse_args()
    cases = [tuple(int(one) for one in case.split("x")) for case in options.cases.split(",")]
    sizes = sorted({tokens for tokens, _ in cases})
    if options.compile:
        share, of = (int(one) for one in options.compile.split("/"))
        compile_all(sizes, share, of)
        return
    if options.tune:
        command = [sys.executable, __file__, "--tune", "--cases", options.cases, "--compile"]
        workers = [subprocess.Popen([*command, f"{share}/14"]) for share in range(14)]
        ended = [worker.wait() for worker in workers]
        assert not any(ended), ended
    for name in LINEARS:
        measure(Layers(name, options.layers, max(adapters for _, adapters in cases)), cases, options.tune)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
