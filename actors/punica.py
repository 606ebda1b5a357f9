"""LoRA inside vLLM on a GPU: kernels.lora_decode where vLLM's own kernels would run.

    batch ──> manager ──> update_metadata ──> Work's table, one copy a change of the batch
    linear ──> base product ──> add_lora_linear ──> weft::lora_linear ──> shrink, expand

vLLM makes the wrapper that its platform names; `vllm_plugin` has it name this one. The op is opaque to torch.compile and
changes its first argument, as vLLM's own do; a captured graph reads the table at its fixed address. Adapters stay in vLLM's
stacked buffers. What the kernels do not take runs as it did, and is said once: adapters of embeddings, heads and experts,
`fully_sharded_loras`, ranks above 128. Of a tensor parallel engine each worker has a part of A or of B, and so of the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from weft.kernels.lora_decode import Work, add_lora, misfit, warm_up

logger = logging.getLogger("vllm.plugins.weft")


def _lora_linear(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    table: Tensor,
    idle: Tensor,
    max_tokens: int,
    scale: float,
    add: bool,
) -> None:
    if not idle.item():  # a tensor of the CPU's: a graph of a batch without adapters holds no launch
        add_lora(y, x, a, b, table, max_tokens, scale, add)


def _traced(*arguments: Any) -> None:
    return None


_LIBRARY = torch.library.Library("weft", "FRAGMENT")
_LIBRARY.define("lora_linear" + torch.library.infer_schema(_lora_linear, mutates_args=["y"]))
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("lora_linear", _lora_linear, _device)
_LIBRARY._register_fake("lora_linear", _traced)


class DecodeLora(PunicaWrapperGPU):  # type: ignore[misc]
    """PunicaWrapperGPU whose linears are ours."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.weft_tokens = max_num_batched_tokens
        self.weft_work = Work(max_num_batched_tokens, self.max_loras, device)
        self.weft_table = self.weft_work.table
        self.weft_idle = torch.tensor([True])
        self.weft_ranks: dict[int, int] = {}  # by adapter id; of those that are not here, the widest is taken
        self.weft_alone: bool | None = None
        self.weft_refused = False  # by the GPU

    def weft_meet(self, modules: dict[str, Any], ranks: dict[int, int]) -> None:
        """Learn the engine's layers, once, and the ranks of the adapters of the next batch."""
        self.weft_ranks = ranks
        if self.weft_alone is None:
            reasons = {_why_not(module) for module in modules.values()} - {""}
            self.weft_alone = not reasons
            for reason in sorted(reasons):
                logger.warning("weft's LoRA kernels leave to vLLM's own: %s", reason)
            ours = [module for module in modules.values() if not _why_not(module)]
            kinds = {tuple(one.shape for one in (*each.lora_a_stacked, *each.lora_b_stacked)): each for each in ours}
            try:
                for module in kinds.values():
                    warm_up(module.lora_a_stacked, module.lora_b_stacked, self.weft_tokens)
            except Exception as error:  # noqa: BLE001 whatever this GPU refuses, vLLM starts without us, and says so
                self.weft_alone, self.weft_refused = False, True
                logger.warning("weft's LoRA kernels leave all to vLLM's own, since this GPU does not take them: %s", error)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called when the batch's tokens or adapters have changed."""
        if not self.weft_alone:  # what vLLM's own kernels read, which some layer may yet need
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = slots_of(mapping.index_mapping, lora_index_to_id)
        widest = self.lora_config.max_lora_rank
        ranks = [min(self.weft_ranks.get(one or 0, widest), widest) for one in lora_index_to_id]
        self.weft_idle.fill_(self.weft_work.update(slots, ranks) == 0)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Tensor | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y [T, O] += scale * B A x, each token with its own adapter. Stacked: [slots, 1, R, I], [slots, 1, O_s, R]."""
        theirs = self.weft_refused or misfit(lora_a_stacked, lora_b_stacked)
        if theirs or kwargs or x.dtype != lora_a_stacked[0].dtype:
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, add_inputs=add_inputs, **kwargs
            )
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        stacks = list(lora_a_stacked), list(lora_b_stacked)
        torch.ops.weft.lora_linear(y, x, *stacks, self.weft_table, self.weft_idle, self.weft_tokens, scale, add_inputs)

    def add_shrink(self, *arguments: Any, **kwargs: Any) -> None:
        self._check_theirs()
        super().add_shrink(*arguments, **kwargs)

    def add_expand(self, *arguments: Any, **kwargs: Any) -> None:
        self._check_theirs()
        super().add_expand(*arguments, **kwargs)

    def _check_theirs(self) -> None:
        """vLLM's own kernels would read tables that nobody has written. It traces its layers as it starts."""
        if self.weft_alone:
            raise RuntimeError("a layer calls vLLM's own LoRA kernels, though weft's were to do all: WEFT_LORA_KERNELS=0")


def slots_of(ids: Sequence[int], index_to_id: Sequence[int | None]) -> np.ndarray:
    """Each token's slot: -1 for id 0, which is the base alone. Raises ValueError for an id that has no slot."""
    place = {one: slot for slot, one in enumerate(index_to_id) if one} | {0: -1}
    found, where = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    missing = [one for one in found.tolist() if one not in place]
    if missing:
        raise ValueError(f"adapters {missing} are in the batch, but in no slot of the engine")
    return np.array([place[one] for one in found.tolist()], np.int32)[where] if len(found) else np.empty(0, np.int32)


def _why_not(module: Any) -> str:
    """Why a layer of vLLM's runs on vLLM's own kernels; empty where it runs on ours."""
    a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
    if not isinstance(a, tuple) or not isinstance(b, tuple) or not hasattr(module, "n_slices"):
        return type(module).__name__
    if module.lora_config.fully_sharded_loras:
        return f"{type(module).__name__}, whose adapters are spread over GPUs"
    why = misfit(a, b)
    return f"{type(module).__name__}: {why}" if why else ""
