"""The plug in a real engine: vLLM's own manager, loader and layers around our wrapper, on this CPU by the reference kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft.actors.base_model import tiny_path
from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes
from weft.actors.model import load_model
from weft.actors.peft_folder import write_peft_folder
from weft.kernels.logprob import token_logprobs

RANKS = (8, 16, 3)
MIX = (0, 1, 2, -1, 2, 0, 0)  # the adapter of each request, -1 the base alone
ENGINE = """
import json, sys
import vllm.lora.punica_wrapper.punica_gpu as theirs
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
theirs.LoRAKernelMeta = LoRAKernelMeta  # imported beside Triton kernels alone, for which there is no driver here
import torch
import weft.kernels.lora_decode as kernels
kernels.DTYPES += (torch.float32,)  # so that the comparison is exact: the reference takes any
from vllm.config.lora import LoRAConfig
from vllm.lora.model_manager import LoRAModelManager
from vllm.platforms import current_platform
from weft.actors import vllm_plugin
from vllm.lora.layers import column_parallel_linear
vllm_plugin.install(type(current_platform), LoRAModelManager, LoRAConfig, column_parallel_linear)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, folder, mix = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model=base, dtype="float32", enable_lora=True, max_loras=2, max_cpu_loras=3, max_lora_rank=16, max_num_seqs=16,
          max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=1 << 27, block_size=32, enable_prefix_caching=False,
          lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], max_num_batched_tokens=512, seed=0)
prompts = [[(7 * i + 3 * j) % 200 + 5 for j in range(9 + i)] for i in range(len(mix))]
params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
requests = [LoRARequest(f"adapter {n}", n + 1, f"{folder}/{n}") if n >= 0 else None for n in mix]
outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params, lora_request=requests, use_tqdm=False)
manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
wrapper = next(iter(manager.punica_wrapper_mapping.values()))
print("FOUND" + json.dumps({
    "wrapper": type(wrapper).__name__, "alone": wrapper.weft_alone,
    "rows": [[prompt, list(out.outputs[0].token_ids), [position[token].logprob for token, position
              in zip(out.outputs[0].token_ids, out.outputs[0].logprobs)]] for prompt, out in zip(prompts, outputs)]}))
"""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def test_an_engine_with_the_plug_samples_with_the_trainers_own_log_probabilities(tmp_path: Path) -> None:
    """Three adapters of three ranks over two slots, so that one is put where another was, and a request without any."""
    base = tiny_path()
    shapes = linear_shapes(json.loads((Path(base) / "config.json").read_text()))
    layouts = [SlabLayout.build(shapes, tuple(shapes), rank) for rank in RANKS]
    slabs = [torch.randn(one.numel, generator=torch.Generator().manual_seed(n)) * 0.05 for n, one in enumerate(layouts)]
    for n, (layout, slab) in enumerate(zip(layouts, slabs, strict=True)):
        write_peft_folder(tmp_path / str(n), layout, slab, layout.rank, base)
    command = [sys.executable, "-c", ENGINE, base, str(tmp_path), json.dumps(MIX)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    assert (found["wrapper"], found["alone"]) == ("DecodeLora", True)
    decoder = load_model(base, torch.float32)
    bare_differs = False
    for n, (prompt, tokens, sampled) in zip(MIX, found["rows"], strict=True):
        ids = torch.tensor([*prompt, *tokens])
        own = LoraBatch.build([0, len(ids) - 1], [1.0], [layouts[n].views(slabs[n])]) if n >= 0 else None
        wanted, bare = (logprobs(decoder, ids, len(prompt), batch) for batch in (own, None))
        assert torch.tensor(sampled).tolist() == pytest.approx(wanted, abs=1e-3)
        bare_differs |= n >= 0 and max(abs(one - other) for one, other in zip(wanted, bare, strict=True)) > 0.1
    assert bare_differs, "the adapters change nothing, and so the test says nothing"


def logprobs(decoder: torch.nn.Module, ids: torch.Tensor, prompt: int, batch: LoraBatch | None) -> list[float]:
    with torch.no_grad():
        hidden = decoder(ids[:-1], [0, len(ids) - 1], batch)[prompt - 1 :]
        found, _ = token_logprobs(hidden, decoder.head, ids[prompt:], torch.ones(len(ids) - prompt))
    return found.tolist()
