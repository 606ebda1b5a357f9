"""kernels.pack on the card: an adapter of all linears of the Qwen3-4B shape into one slot, against the bytes that it must move.

    python benchmarks/kernels/bench_pack.py
"""

from __future__ import annotations

import statistics
import time

import torch
import triton

from weft.kernels.pack import Places, pair_targets, reference, scatter_slab

LINEARS = ((4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728))  # (out, in)
LAYERS, SLOTS, BANDWIDTH = 36, 4, 4.3e12  # bytes a second of a device copy on one H200


def make(rank: int, widest: int) -> tuple[Places, torch.Tensor]:
    """Poisoned stacks for ranks up to `widest`, and a random slab."""
    targets, offset = [], 0
    empty = {"fill_value": torch.nan, "dtype": torch.bfloat16, "device": "cuda"}
    for out_features, in_features in LINEARS * LAYERS:
        a, b = torch.full((SLOTS, widest, in_features), **empty), torch.full((SLOTS, out_features, widest), **empty)
        targets += pair_targets(a, b, offset, rank, in_features)
        offset += rank * (out_features + in_features)
    return Places(tuple(targets)), torch.randn(offset, device="cuda").bfloat16()


def main() -> None:
    for rank, widest in ((32, 32), (16, 32)):
        places, slab = make(rank, widest)
        assert scatter_slab(slab, places, 1, 0.5).item() == 0
        reference.scatter_slab(slab, places, 2, 0.5)
        assert all(torch.equal(target.stack[1], target.stack[2]) for target in places.targets)
        took = triton.testing.do_bench(lambda: scatter_slab(slab, places, 3, 0.5), return_mode="median")  # noqa: B023 it is called here
        waits = []
        for _ in range(30):
            began = time.perf_counter()
            scatter_slab(slab, places, 3, 0.5).item()
            waits.append(time.perf_counter() - began)
        bytes_moved = slab.nbytes + sum(target.stack[0].nbytes for target in places.targets)
        share = 100 * bytes_moved / BANDWIDTH / took * 1e3
        print(f"rank {rank} of {widest}: {slab.nbytes / 1e6:.0f} MB in {took * 1e3:.0f} us, {share:.0f} % of the copy's bytes "
              f"a second; with the host's wait {statistics.median(waits) * 1e6:.0f} us")  # fmt: skip


if __name__ == "__main__":
    main()
