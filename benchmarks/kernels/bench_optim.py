"""kernels.optim on the card: one step of eight adapters of 66 million elements, against the bytes that it must move.

    python benchmarks/kernels/bench_optim.py [--sweep]
"""

from __future__ import annotations

import argparse
import itertools

import torch
import triton

from weft.kernels.optim import SlabStep, reference
from weft.kernels.optim import triton as kernels

ADAPTERS, SIZE, BANDWIDTH = 8, 66_060_288, 4.3e12  # bytes a second of a device copy on one H200
BYTES = 4 + 4 * 4 + 3 * 4 + 2  # the gradient for its norm; four slabs in, three and the weights out
RULE = (3, 1e-4, (0.9, 0.95), 1e-8, 0.01, 1.0)


def make(size: int) -> SlabStep:
    slabs = [torch.rand(size, device="cuda") for _ in range(4)]
    return SlabStep(*slabs, slabs[0].bfloat16(), *RULE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    small = make(12345)
    twin = SlabStep(*(slab.clone() for slab in vars(small).values() if isinstance(slab, torch.Tensor)), *RULE)
    kernels.adamw_steps([small])
    reference.adamw_steps([twin])
    torch.testing.assert_close(small.master, twin.master, rtol=1e-5, atol=1e-6)
    steps = [make(SIZE) for _ in range(ADAPTERS)]
    sizes = itertools.product((1024, 2048, 4096, 8192), (4, 8)) if options.sweep else [(kernels.BLOCK, kernels.WARPS)]
    for block, warps in sizes:
        kernels.BLOCK, kernels.WARPS = block, warps
        took = triton.testing.do_bench(lambda: kernels.adamw_steps(steps), warmup=20, rep=80, return_mode="median")
        share = 100 * BYTES * SIZE * ADAPTERS / BANDWIDTH / took * 1e3
        print(f"block {block} warps {warps}: {took:.2f} ms, {share:.1f} % of the copy's bytes a second")


if __name__ == "__main__":
    main()
