"""What of decode.py runs inside vLLM's worker: random adapters into their slots, and a profile."""

from __future__ import annotations

from typing import Any

import torch
from decode_engine import random_slab
from vllm.lora.lora_model import LoRAModel

from weft.actors.sampler_extension import SamplerExtension
from weft.kernels.pack import scatter_slab

KINDS = {  # the first whose word is in a kernel's name
    "lora shrink": ("_shrink",),
    "lora expand": ("_expand",),
    "attention": ("flash", "fmha", "attn", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "copies and zeros": ("memcpy", "memset", "fillfunctor"),
}


class DecodeWorker(SamplerExtension):
    def decode_fill(self, lora_id: int, rank: int) -> None:
        modules = list(self.weft_shapes)
        form = self._new_form("bench", tuple(modules), rank)
        slot = self._claim(lora_id)
        assert slot is not None
        slab = random_slab(form.layout.numel, lora_id, self.device)  # type: ignore[attr-defined]
        assert not scatter_slab(slab, form.places, slot, 1.0).item()
        self.weft_manager._registered_adapters[lora_id] = LoRAModel(lora_id, rank, {})
        self.weft_manager._active_adapters[lora_id] = None

    def decode_wrapper(self) -> str:
        manager = getattr(self.model_runner, "lora_manager", None)  # type: ignore[attr-defined]
        if manager is None:
            return ""
        wrappers = manager._adapter_manager.punica_wrapper_mapping.values()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the adapters are in their slots
        return ", ".join(type(one).__name__ for one in wrappers)

    def decode_profile_start(self) -> None:
        self.decode_seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        self.decode_seen.__enter__()

    def decode_profile_end(self) -> dict[str, dict[str, float]]:
        """kind -> launches and microseconds."""
        torch.cuda.synchronize()
        self.decode_seen.__exit__(None, None, None)
        found: dict[str, Any] = {}
        for event in self.decode_seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                name = event.name.lower()
                kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
                own = found.setdefault(kind, {"launches": 0, "microseconds": 0.0})
                own["launches"] += 1
                own["microseconds"] += event.device_time
        return found
