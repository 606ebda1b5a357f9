"""Where a step's time on the device goes, by kind of kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

KINDS = {  # the first whose word is in a kernel's name
    "lora shrink": ("_shrink",),
    "lora expand": ("_expand",),
    "lora outer": ("_outer", "_add_slots"),
    "norms": ("_norm_forward", "_norm_backward"),
    "heads": ("_heads_",),
    "swiglu": ("_swiglu",),
    "log-probabilities": ("_score", "_scale_rows"),
    "optimizer": ("_update", "_squares", "_norms"),
    "attention": ("cudnn", "flash", "fmha", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "cublas"),
    "copies": ("memcpy", "memset"),
}


def profile(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by kind, and of the five kernels that no kind has and that take longest."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    other: dict[str, float] = defaultdict(float)
    for event in seen.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name = event.name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        spent[kind] += event.device_time / 1e3
        if kind == "other":
            other[f"other: {event.name[:60]}"] += event.device_time / 1e3
    largest = dict(sorted(other.items(), key=lambda item: -item[1])[:5])
    whole = {"all": sum(spent.values()), **dict(sorted(spent.items(), key=lambda item: -item[1])), **largest}
    return {name: round(value, 2) for name, value in whole.items()}
