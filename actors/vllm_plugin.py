"""vLLM's plugin of weft: in every process of a vLLM that weft is installed beside, whoever started it.

vLLM calls `register` (entry point `vllm.general_plugins`) before it makes a model. With WEFT_LORA_KERNELS=1, on a supported
version on an NVIDIA GPU, it then has vLLM make `punica.DecodeLora`; otherwise vLLM is left as it is. That is an environment
variable because a plugin is told nothing else, in whichever process it runs. It is off by itself until
benchmarks/decode.py has shown on a card that vLLM with it is right and never slower.

Five of vLLM's functions are replaced, in the versions whose source was read for it:
    platform.get_punica_wrapper             names ours
    LoRAModelManager._set_adapter_mapping   tells it the layers and the ranks of the batch's adapters before its tokens
    LoRAModelManager.activate_adapter       a slot has new weights: the next batch is looked at again, were it the same
    column_parallel_linear._mcp_apply       gate and up have one adapter call, as q, k and v do, not vLLM's shrink and expand
    LoRAConfig.compute_hash                 compiled models with our kernels and without are not each other's
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
    if os.environ.get(VARIABLE) != "1":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        logger.debug("weft's LoRA kernels are for NVIDIA GPUs: this vLLM keeps its own")
        return
    version = _version()
    if not version.startswith(SUPPORTED):
        if not getattr(register, "said", False):
            register.said = True  # type: ignore[attr-defined]
            logger.warning("weft's LoRA kernels support vLLM %sx, not %s: its own run", ", ".join(SUPPORTED), version)
        return
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import column_parallel_linear
    from vllm.lora.model_manager import LoRAModelManager

    install(type(current_platform), LoRAModelManager, LoRAConfig, column_parallel_linear)


def install(platform: Any, manager: Any, config: Any, layers: Any) -> None:
    """Replace the five, once. platform, manager, config: vLLM's classes; layers: its module of column-parallel layers."""
    name = "weft.actors.punica.DecodeLora"
    if getattr(platform, "weft_installed", False):
        return
    platform.weft_installed = True
    platform.get_punica_wrapper = classmethod(lambda cls: name)
    set_theirs, activate_theirs, hash_theirs = manager._set_adapter_mapping, manager.activate_adapter, config.compute_hash
    apply_theirs, base = layers._mcp_apply, layers.BaseLinearLayerWithLoRA

    def set_adapter_mapping(self: Any, mapping: Any) -> None:
        known = self._registered_adapters
        ranks = {one: known[one].rank for one in set(mapping.index_mapping) if one and one in known}
        for wrapper in self.punica_wrapper_mapping.values():
            if hasattr(wrapper, "weft_meet"):
                wrapper.weft_meet(self.modules, ranks)
        set_theirs(self, mapping)

    def activate_adapter(self: Any, lora_id: int) -> Any:
        changed = activate_theirs(self, lora_id)
        if changed:
            self._last_mapping = None
        return changed

    def mcp_apply(x: Any, bias: Any, layer: Any) -> Any:
        if layer.lora_config.fully_sharded_loras:  # its low rows are to be gathered over GPUs
            return apply_theirs(x, bias, layer)
        return base.apply(layer, x, bias)

    manager._set_adapter_mapping, manager.activate_adapter = set_adapter_mapping, activate_adapter
    layers._mcp_apply = mcp_apply
    config.compute_hash = lambda self: f"{hash_theirs(self)}-weft"


def _version() -> str:
    """Of the installed distribution: to import it for its version alone takes seconds."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
