"""vLLM's plugin of weft: in every process of a vLLM that weft is installed beside, whoever started it.

vLLM calls `register` (entry point `vllm.general_plugins`) before it makes a model. On a supported version on an NVIDIA GPU it
then has vLLM make `punica.DecodeLora`; otherwise, and with WEFT_LORA_KERNELS=0, vLLM is left as it is. That is an environment
variable because a plugin is told nothing else, in whichever process it runs. What vLLM does with it on a card, and how fast:
benchmarks/results/decode-h200.json.

Four of vLLM's functions are replaced, in the versions whose source was read for it:
    platform.get_punica_wrapper            names ours
    LoRAModelManager.set_adapter_mapping   tells it the layers and the ranks of the batch's adapters before its tokens; and a
                                           batch is looked at again, were it the same, when slots or ranks have changed since:
                                           vLLM 0.24 compares the adapters' ids alone, and weft fills slots by itself
    column_parallel_linear._mcp_apply      gate and up have one adapter call, as o and down do, not vLLM's shrink and expand
    LoRAConfig.compute_hash                compiled models with our kernels and without are not each other's
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from typing import Any

SUPPORTED = ("0.24.",)  # beginnings of versions
VARIABLE = "WEFT_LORA_KERNELS"
logger = logging.getLogger("vllm.plugins.weft")


def register() -> None:
    """May be called more than once in a process; says once what it does not do."""
    if os.environ.get(VARIABLE) == "0":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        logger.debug("weft's LoRA kernels are for NVIDIA GPUs: this vLLM keeps its own")
        return
    version = _version()
    if not version.startswith(SUPPORTED):
        _say_once(f"weft's LoRA kernels support vLLM {', '.join(SUPPORTED)}x, not {version}: its own run")
        return
    try:
        from vllm.config.lora import LoRAConfig
        from vllm.lora.layers import column_parallel_linear
        from vllm.lora.model_manager import LoRAModelManager

        install(type(current_platform), LoRAModelManager, LoRAConfig, column_parallel_linear)
    except (ImportError, AttributeError) as error:  # what this raises would end a vLLM that may not even use LoRA
        _say_once(f"weft's LoRA kernels do not know this vLLM {version}: its own run: {error}")


def _say_once(what: str) -> None:
    if not getattr(register, "said", False):
        register.said = True  # type: ignore[attr-defined]
        logger.warning("%s", what)


def install(platform: Any, manager: Any, config: Any, layers: Any) -> None:
    """Replace the four, once. platform, manager, config: vLLM's classes; layers: its module of column-parallel layers.

    Raises AttributeError, and has replaced none, where one of them is not there.
    """
    name = "weft.actors.punica.DecodeLora"
    if getattr(platform, "weft_installed", False):
        return
    set_theirs, hash_theirs = manager.set_adapter_mapping, config.compute_hash
    apply_theirs, base = layers._mcp_apply, layers.BaseLinearLayerWithLoRA

    def set_adapter_mapping(self: Any, mapping: Any) -> None:
        known = self._registered_adapters
        ranks = {one: rank_of(known[one]) for one in set(mapping.index_mapping) if one and one in known}
        seen = ranks, list(self.lora_index_to_id)
        if seen != getattr(self, "weft_seen", None):
            self.weft_seen, self._last_mapping = seen, None
            for wrapper in self.punica_wrapper_mapping.values():
                if hasattr(wrapper, "weft_meet"):
                    wrapper.weft_meet(self.modules, ranks)
        set_theirs(self, mapping)

    def mcp_apply(x: Any, bias: Any, layer: Any) -> Any:
        if layer.lora_config.fully_sharded_loras:  # its low rows are to be gathered over GPUs
            return apply_theirs(x, bias, layer)
        return base.apply(layer, x, bias)

    platform.weft_installed = True
    platform.get_punica_wrapper = classmethod(lambda cls: name)
    manager.set_adapter_mapping = set_adapter_mapping
    layers._mcp_apply = mcp_apply
    config.compute_hash = lambda self: f"{hash_theirs(self)}-weft"


def rank_of(adapter: Any) -> int:
    """The most rows that any of its A has: PEFT's rank_pattern gives some layers more than the adapter's own rank, which
    vLLM 0.24 does not read, and applies. Read once, for there are hundreds. adapter: vLLM's LoRAModel."""
    if not hasattr(adapter, "weft_rank"):
        layers = [one.lora_a if isinstance(one.lora_a, list | tuple) else [one.lora_a] for one in adapter.loras.values()]
        adapter.weft_rank = max([adapter.rank, *(a.shape[-2] for parts in layers for a in parts if a is not None)])
    return int(adapter.weft_rank)


def _version() -> str:
    """Of the installed distribution: to import it for its version alone takes seconds."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
