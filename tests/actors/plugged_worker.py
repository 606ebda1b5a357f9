"""What test_punica_engine.py loads into vLLM's workers: the plug, on a CPU, beside weft's own sync."""

from __future__ import annotations

from typing import Any

import torch
import vllm.lora.punica_wrapper.punica_gpu as theirs
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import column_parallel_linear
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.platforms import current_platform

import weft.kernels.lora_decode as kernels
from weft.actors import vllm_plugin
from weft.actors.sampler_extension import SamplerExtension

theirs.LoRAKernelMeta = LoRAKernelMeta  # imported beside Triton kernels alone, for which there is no driver here
kernels.DTYPES += (torch.float32,)  # so that the comparison is exact: the reference takes any
vllm_plugin.install(type(current_platform), LoRAModelManager, LoRAConfig, column_parallel_linear)


class PluggedWorker(SamplerExtension):
    def plugged(self) -> dict[str, Any]:
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        wrapper = next(iter(manager.punica_wrapper_mapping.values()))
        return {"wrapper": type(wrapper).__name__, "alone": wrapper.weft_alone, "slots": list(manager.lora_index_to_id)}
