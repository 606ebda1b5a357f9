"""Where a step's time on the device goes, by kind of kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

KINDS = {  # the first whose word is in a kernel's name
    "fp8 rows": ("_fp8_",),
    "swiglu and its sums": ("_swiglu_outer",),
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

SHOWN = 16  # kernels


def profile(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by kind, then of the kernels that take longest, each with how often it ran."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    spans: list[tuple[float, float]] = []
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name = event.name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        spent[kind] += event.device_time / 1e3
        kernels[event.name].append(event.device_time / 1e3)
        spans.append((event.time_range.start, event.time_range.end))
    largest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    whole = {
        "all": sum(spent.values()),
        "idle between kernels": idle(spans) / 1e3,
        **dict(sorted(spent.items(), key=lambda item: -item[1])),
    }
    whole |= {f"{len(times)} x {name[:80]}": sum(times) for name, times in largest}
    return {name: round(value, 2) for name, value in whole.items()}


def idle(spans: list[tuple[float, float]]) -> float:
    """Of the time from the first kernel's start to the last one's end, what no kernel covers."""
    gaps, end = 0.0, min(start for start, _ in spans)
    for start, stop in sorted(spans):
        gaps += max(0.0, start - end)
        end = max(end, stop)
    return gaps
