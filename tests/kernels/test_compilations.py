"""What the trainer's kernels are compiled for: no mix of adapters compiles what one adapter of each form has not.

Triton makes the keys of its compilations itself, for a Hopper GPU; what it would compile is noted instead, so no GPU is needed.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weft.actors.warm_up import needed_forms
from weft.kernels.logprob import triton as logprob
from weft.kernels.lora import mlp
from weft.kernels.lora import triton as lora
from weft.kernels.lora.tables import CHUNK, SlabGroup, build_tables
from weft.kernels.lora_decode import Work
from weft.kernels.lora_decode import triton as lora_decode
from weft.kernels.optim import triton as optim
from weft.kernels.optim.reference import SlabStep

LINEARS = ((64, (64, 32, 32)), (64, (64,)), (64, (128, 128)), (128, (64,)))  # in, outs: as a decoder's layer has them
ADDRESS = 1 << 20


class Hopper:
    """What Triton asks of a driver before it compiles. Its device is none that a real driver has."""

    def get_current_device(self) -> str:
        return "none"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Everything that was launched, as the compiler would have had to make it."""
    noted = set[str]()

    def note(key: object, fn: object, **_: object) -> bool:
        noted.add(f"{fn.name} {key}")  # type: ignore[attr-defined]
        return True  # it is neither compiled nor launched

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    return noted


def linears(ranks: Sequence[int], tokens: Sequence[int], draw: random.Random) -> None:
    """Forward and backward of every kind of linear, over adapters of these ranks with so many tokens each."""
    offsets = np.cumsum([0, *tokens]).tolist()
    even = all(rank % 8 == 0 for rank in ranks)

    def addresses(parts: int) -> np.ndarray:
        return np.full((parts, len(ranks)), ADDRESS if even else ADDRESS + 2, np.int64)

    groups = [SlabGroup(width, outs, *(addresses(len(outs)) for _ in range(4))) for width, outs in LINEARS]
    flags = [draw.random() < 0.5 for _ in ranks]
    tables = build_tables(torch.device("cpu"), offsets[-1], offsets, ranks, [1.0] * len(ranks), groups, flags)
    for group in tables.groups:
        x = torch.empty(offsets[-1], group.in_features, dtype=torch.bfloat16)
        y = torch.empty(offsets[-1], sum(group.widths), dtype=torch.bfloat16)
        low, grad_low = lora.shrink(x, tables, group, "a"), lora.shrink(y, tables, group, "b")
        lora.expand(low, tables, group, "b", None)
        lora.expand(grad_low, tables, group, "a", None)
        lora.outer(grad_low, x, tables, group, "grad_a")
        lora.outer(low, y, tables, group, "grad_b")
    gate_up, down = tables.groups[2:]
    hidden, active = (torch.empty(offsets[-1], size, dtype=torch.bfloat16) for size in (sum(gate_up.widths), down.in_features))
    low = lora.shrink(hidden[:, : gate_up.in_features].contiguous(), tables, gate_up, "a")
    grad_low = lora.shrink(active, tables, down, "a")
    mlp.swiglu_outer(hidden, active, low, grad_low, tables, gate_up, down)


@pytest.mark.parametrize("ranks", [(32,), (8, 16, 32), (1, 8, 24, 40, 64, 100, 128)])
def test_no_mix_of_adapters_compiles_what_its_forms_have_not(compiled: set[str], ranks: tuple[int, ...]) -> None:
    draw = random.Random(len(ranks))
    for block, aligned in sorted(needed_forms(ranks, 2)):
        linears([block if aligned else block - 1], [CHUNK + 1], draw)
    forms = set(compiled)
    assert len(forms) <= 22 * len(needed_forms(ranks, 2))
    for _ in range(60):
        count = draw.randint(1, 8)
        linears(draw.choices(ranks, k=count), [draw.randint(1, 3 * CHUNK) for _ in range(count)], draw)
    assert compiled == forms


def test_log_probabilities_and_the_optimizer_compile_once_whatever_their_sizes(compiled: set[str]) -> None:
    draw = random.Random(0)

    def work(positions: int, sizes: Sequence[int]) -> None:
        hidden, head = torch.zeros(positions, 16, dtype=torch.bfloat16, requires_grad=True), torch.zeros(100, 16)
        targets, temperature = torch.zeros(positions, dtype=torch.long), torch.ones(positions)
        logprob.token_logprobs(hidden, head.bfloat16(), targets, temperature, chunk_elements=draw.randint(17, 60) * 100)
        moments = [[torch.zeros(size) for _ in range(4)] + [torch.zeros(size, dtype=torch.bfloat16)] for size in sizes]
        optim.adamw_steps([SlabStep(*slabs, 1, 1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0) for slabs in moments])

    work(1, [1000])
    once = set(compiled)
    assert len(once) == 4
    for _ in range(20):
        work(draw.randint(1, 300), draw.choices((1000, 5000, 64000, optim.SPAN, 7 * optim.SPAN, 16 * optim.SPAN), k=3))
    assert compiled == once


@pytest.mark.parametrize("rank", [32, 128])
def test_the_widest_linears_of_a_sampler_fit_the_shared_memory_of_the_smallest_gpus(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """An A10, L4 or RTX 4090 has 99 KB of it for a program; vLLM runs there, and loads our kernels."""
    target, used = GPUTarget("cuda", 86, 32), dict[str, int]()

    def compile_only(fn: Any, compile: dict[str, Any], **_: object) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        used[fn.jit_function.__name__] = triton.compile(source, target=target, options=options).metadata.shared
        return True

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    tokens, inputs, widths = 8192, 2560, (4096, 1024, 1024)
    x, y = (torch.empty(tokens, width, dtype=torch.bfloat16) for width in (inputs, sum(widths)))
    a = [torch.empty(1, 1, rank, inputs, dtype=torch.bfloat16) for _ in widths]
    b = [torch.empty(1, 1, width, rank, dtype=torch.bfloat16) for width in widths]
    lora_decode.add_lora(y, x, a, b, Work(tokens, 1, torch.device("cpu")).table, tokens, 1.0, True)
    assert len(used) == 2 and max(used.values()) <= 99 << 10, used
