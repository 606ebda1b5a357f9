"""LoRA inside vLLM on a GPU, the wrapper alone: on the reference kernels, with vLLM's own tables, on this CPU."""

from __future__ import annotations

import logging
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import vllm.lora.punica_wrapper.punica_gpu as theirs
from torch import Tensor, nn
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import column_parallel_linear
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from weft.actors import vllm_plugin
from weft.actors.punica import DecodeLora, logger, slots_of

SLOTS, RANK, INPUT, WIDTHS = 5, 16, 24, (24, 8, 16)
IDS: list[int | None] = [11, 12, None, 14, 15]
RANKS = {11: 3, 12: 16, 14: 8, 15: 1}


@pytest.fixture(autouse=True)
def the_same_numbers_each_time() -> None:
    """Of many sums one rounds worse than all before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports them beside its Triton kernels alone, for which this machine has no driver."""
    monkeypatch.setattr(theirs, "LoRAKernelMeta", LoRAKernelMeta, raising=False)


def stacks(dtype: torch.dtype = torch.bfloat16) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(3)
    a = tuple(torch.full((SLOTS, 1, RANK, INPUT), torch.nan) for _ in WIDTHS)
    b = tuple(torch.full((SLOTS, 1, width, RANK), torch.nan) for width in WIDTHS)
    for slot, one in enumerate(IDS):
        for part_a, part_b in zip(a, b, strict=True) if one else ():
            part_a[slot], part_b[slot] = 0, 0
            part_a[slot, 0, : RANKS[one]] = torch.randn(RANKS[one], INPUT, generator=draw)
            part_b[slot, 0, :, : RANKS[one]] = torch.randn(part_b.shape[2], RANKS[one], generator=draw)
    return tuple(part.to(dtype) for part in a), tuple(part.to(dtype) for part in b)


def module(a: Any, b: Any, sharded: bool = False) -> Any:
    config = types.SimpleNamespace(fully_sharded_loras=sharded)
    return types.SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b, n_slices=len(a), lora_config=config)


def wrapper() -> DecodeLora:
    config = types.SimpleNamespace(max_loras=SLOTS, max_lora_rank=RANK, specialize_active_lora=False)
    return DecodeLora(64, 64, "cpu", lora_config=config)


def mapped(made: DecodeLora, ids: Sequence[int]) -> None:
    made.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), list(IDS), SLOTS + 1, 100)


def wanted(y: Tensor, x: Tensor, ids: Sequence[int], a: Any, b: Any, add: bool = True) -> Tensor:
    """Each token alone."""
    result = y.float().clone()
    for token, one in enumerate(ids):
        if one:
            slot, low = IDS.index(one), x[token].float()
            delta = [bs[slot, 0].float() @ (as_[slot, 0].float() @ low) for as_, bs in zip(a, b, strict=True)]
            result[token] = torch.cat(delta) + (y[token].float() if add else 0)
    return result


def close(found: Tensor, exact: Tensor) -> None:
    assert found.isfinite().all()
    assert float((found.float() - exact).norm()) <= 0.01 * float(exact.norm())


class Block(nn.Module):
    """A base product and its adapters as a vLLM layer has them, with work before and after."""

    def __init__(self, made: DecodeLora, a: Any, b: Any) -> None:
        super().__init__()
        self.made, self.a, self.b = made, a, b
        self.base = nn.Linear(INPUT, sum(WIDTHS), bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x + 1)
        self.made.add_lora_linear(y, x + 1, self.a, self.b, 1.0, WIDTHS)
        return y * 2


@pytest.mark.parametrize("met", [True, False])
@pytest.mark.parametrize("ids", [[11], [15, 11, 0, 12, 15], [0, 0], [14] * 20 + [0, 11], []])
@pytest.mark.parametrize("add", [True, False])
def test_every_token_gets_its_own_adapter_and_no_other(ids: list[int], add: bool, met: bool) -> None:
    made, (a, b) = wrapper(), stacks()
    made.weft_meet({"qkv": module(a, b)} if met else {"lm_head": object()}, RANKS)
    mapped(made, ids)
    x, y = torch.randn(len(ids), INPUT).bfloat16(), torch.randn(len(ids), sum(WIDTHS)).bfloat16()
    found = y.clone()
    made.add_lora_linear(found, x, a, b, 1.0, WIDTHS, add_inputs=add)
    close(found, wanted(y, x, ids, a, b, add))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_is_compiled_once_follows_the_batch(backend: str) -> None:
    made, (a, b) = wrapper(), stacks()
    made.weft_meet({"qkv": module(a, b)}, RANKS)
    block = Block(made, a, b)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x = torch.randn(4, INPUT).bfloat16()
    for ids in ([11, 12, 0, 14], [0, 0, 0, 0], [15, 15, 15, 11]):
        mapped(made, ids)
        exact = 2 * wanted(block.base(x + 1), x + 1, ids, a, b)
        close(compiled(x), exact)
    torch._dynamo.reset()


class GateUp(column_parallel_linear.MergedColumnParallelLinearWithLoRA):
    """vLLM's layer of gate and up over a base product alone, which calls its adapters as vLLM 0.24 has it call them."""

    def __init__(self, made: DecodeLora, a: Any, b: Any, sharded: bool) -> None:
        nn.Module.__init__(self)
        self.base_layer = nn.Linear(INPUT, sum(WIDTHS), bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.base_layer.quant_method = types.SimpleNamespace(apply=lambda layer, x, bias: layer(x))
        self.punica_wrapper, self.lora_a_stacked, self.lora_b_stacked = made, a, b
        self.output_slices, self.n_slices, self._enable_aux_cuda_stream = WIDTHS, len(WIDTHS), False
        self.lora_config = types.SimpleNamespace(fully_sharded_loras=sharded)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return column_parallel_linear._mcp_apply(x, bias, self)


def test_gate_and_up_call_the_wrapper_once_and_vllms_own_kernels_never(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((LoRAModelManager, "set_adapter_mapping"), (LoRAConfig, "compute_hash"),
                        (column_parallel_linear, "_mcp_apply")):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))
    made, (a, b), ids = wrapper(), stacks(), [11, 12, 0, 14]
    layer = GateUp(made, a, b, sharded=False)
    made.weft_meet({"gate_up": layer}, RANKS)
    mapped(made, ids)
    x = torch.randn(len(ids), INPUT).bfloat16()
    with pytest.raises((RuntimeError, AssertionError)):  # as vLLM calls them: into tables that nobody keeps
        layer.apply(x)
    vllm_plugin.install(type("Platform", (), {}), LoRAModelManager, LoRAConfig, column_parallel_linear)
    close(layer.apply(x), wanted(layer.base_layer(x), x, ids, a, b))
    with pytest.raises((RuntimeError, AssertionError)):  # what is spread over GPUs is left to vLLM
        GateUp(made, a, b, sharded=True).apply(x)


def test_vllms_own_kernels_are_not_called_where_ours_do_all() -> None:
    made, (a, b) = wrapper(), stacks()
    made.weft_meet({"qkv": module(a, b)}, RANKS)
    for call in (made.add_shrink, made.add_expand):
        with pytest.raises(RuntimeError, match="WEFT_LORA_KERNELS"):
            call(None)


def test_what_the_kernels_do_not_take_runs_on_vllms_own_and_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(theirs.PunicaWrapperGPU, "add_lora_linear", lambda self, *rest, **named: calls.append("linear"))
    made, (a, b), (wide_a, wide_b) = wrapper(), stacks(), stacks(torch.float64)
    modules = {"qkv": module(a, b), "o": module(wide_a, wide_b), "up": module(a, b, sharded=True), "lm_head": object()}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made.weft_meet(modules, RANKS)
    said = [record.message for record in caplog.records if record.name == logger.name]
    assert len(said) == 3 and sum("float64" in one for one in said) == sum("spread over" in one for one in said) == 1
    mapped(made, [11, 0])
    assert made.token_mapping_meta.num_tokens_per_lora[:2].tolist() == [1, 1]  # what vLLM's own kernels read is there
    x, y = torch.randn(2, INPUT).double(), torch.zeros(2, sum(WIDTHS)).double()
    made.add_lora_linear(y, x, wide_a, wide_b, 1.0, WIDTHS)
    assert calls == ["linear"] and not y.any()


def test_a_gpu_that_does_not_take_the_kernels_runs_vllms_own_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(theirs.PunicaWrapperGPU, "add_lora_linear", lambda self, *rest, **named: calls.append("linear"))

    def refused(*arguments: Any) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr("weft.actors.punica.warm_up", refused)
    made, (a, b) = wrapper(), stacks()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made.weft_meet({"qkv": module(a, b)}, RANKS)
    said = [record.message for record in caplog.records if record.name == logger.name]
    assert [one.rpartition(": ")[2] for one in said] == ["out of shared memory"]
    mapped(made, [11, 0])
    assert made.token_mapping_meta.num_tokens_per_lora[:2].tolist() == [1, 1]  # what vLLM's own kernels read is there
    y = torch.zeros(2, sum(WIDTHS)).bfloat16()
    made.add_lora_linear(y, torch.randn(2, INPUT).bfloat16(), a, b, 1.0, WIDTHS)
    assert calls == ["linear"] and not y.any()


def test_an_adapter_whose_rank_nobody_told_has_the_widest() -> None:
    made, (a, b) = wrapper(), stacks()
    made.weft_meet({"qkv": module(a, b)}, {})
    mapped(made, [12, 14])
    x, y = torch.randn(2, INPUT).bfloat16(), torch.zeros(2, sum(WIDTHS)).bfloat16()
    found = y.clone()
    made.add_lora_linear(found, x, a, b, 1.0, WIDTHS)
    close(found, wanted(y, x, [12, 14], a, b))


def test_an_adapter_without_a_slot_is_an_error() -> None:
    assert slots_of([0, 15, 11], IDS).tolist() == [-1, 4, 0]
    with pytest.raises(ValueError, match="13"):
        slots_of([11, 13], IDS)
