"""The plug in a real engine: vLLM's own manager and layers around our wrapper, on this CPU by the reference kernels; adapters
by vLLM's loader, and by weft's sync."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.actors.base_model import tiny_path
from weft.actors.checksum import checksum
from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes
from weft.actors.model import load_model
from weft.actors.peft_folder import write_peft_folder
from weft.kernels.logprob import token_logprobs

RANKS = (8, 16, 3)
MIX = (0, 1, 2, -1, 2, 0, 0)  # the adapter of each request, -1 the base alone
SCALE = 2.0
ENGINE = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
asked = json.loads(sys.argv[1])
llm = LLM(model=asked["base"], dtype="float32", enable_lora=True, max_loras=2, max_cpu_loras=3, max_lora_rank=16,
          max_num_seqs=16, max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=1 << 27, block_size=32, seed=0,
          lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], max_num_batched_tokens=512,
          tensor_parallel_size=asked["workers"], distributed_executor_backend="mp" if asked["workers"] > 1 else "uni",
          worker_extension_cls="plugged_worker.PluggedWorker")

def sync(added, removed):
    for n in removed:
        llm.collective_rpc("slab_remove", args=(n + 1,))
    for n, path, slab in added:
        data = open(path, "rb").read()
        llm.collective_rpc("slab_receive", args=(path, slab | {"nbytes": len(data)}, None, data, n + 1, 0))
        while "pending" in llm.collective_rpc("slab_install", args=(path, n + 1)):
            pass

def rollout(mix):
    prompts = [[(7 * i + 3 * j) % 200 + 5 for j in range(9 + i)] for i in range(len(mix))]
    params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False)
    requests = [LoRARequest(f"adapter {n}", n + 1, asked["folder"] + f"/{n}") if n >= 0 else None for n in mix]
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params, lora_request=requests, use_tqdm=False)
    rows = []
    for n, prompt, out in zip(mix, prompts, outputs):
        tokens = list(out.outputs[0].token_ids)
        said = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
        rows.append([n, [*prompt, *tokens], [one[token].logprob for token, one in zip([*prompt[1:], *tokens], said)]])
    return rows

rows = []
for added, removed, mix in asked["turns"]:
    sync(added, removed)
    rows += rollout(mix)
print("FOUND" + json.dumps({"workers": llm.collective_rpc("plugged"), "rows": rows}))
"""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's own choice leaves no core for a second worker
}


class Adapters:
    """Of these ranks, random, under a base; each over the linears that its number says."""

    def __init__(self, base: str, ranks: Sequence[int], without: Mapping[int, str], scale: float) -> None:
        shapes = linear_shapes(json.loads((Path(base) / "config.json").read_text()))
        modules = [[name for name in shapes if without.get(n, "none of them") not in name] for n in range(len(ranks))]
        self.base, self.scale = base, scale
        self.layouts = [SlabLayout.build(shapes, own, rank) for own, rank in zip(modules, ranks, strict=True)]
        self.slabs = [
            torch.randn(one.numel, generator=torch.Generator().manual_seed(n)) * 0.05 for n, one in enumerate(self.layouts)
        ]

    def check(self, rows: Sequence[tuple[int, list[int], list[float]]]) -> None:
        """Every token of prompts and answers has the trainer's log-probability under its adapter, and not the base's."""
        decoder = load_model(self.base, torch.float32)
        for n, tokens, found in rows:
            ids = torch.tensor(tokens)
            offsets = [0, len(ids) - 1]
            own = LoraBatch.build(offsets, [self.scale], [self.layouts[n].views(self.slabs[n])]) if n >= 0 else None
            wanted, bare = (logprobs(decoder, ids, batch) for batch in (own, None))
            assert found == pytest.approx(wanted, abs=1e-3), f"adapter {n}"
            assert n < 0 or max(abs(one - other) for one, other in zip(wanted, bare, strict=True)) > 0.1


def logprobs(decoder: torch.nn.Module, ids: torch.Tensor, batch: LoraBatch | None) -> list[float]:
    with torch.no_grad():
        found, _ = token_logprobs(decoder(ids[:-1], [0, len(ids) - 1], batch), decoder.head, ids[1:], torch.ones(len(ids) - 1))
    return found.tolist()


def run(asked: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", ENGINE, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    assert [(one["wrapper"], one["alone"]) for one in found["workers"]] == [("DecodeLora", True)] * asked["workers"]
    return found


def test_an_engine_with_the_plug_samples_with_the_trainers_own_log_probabilities(tmp_path: Path) -> None:
    """vLLM's loader. Three adapters of three ranks over two slots, so that one is put where another was."""
    adapters = Adapters(tiny_path(), RANKS, {}, 1.0)
    for n, (layout, slab) in enumerate(zip(adapters.layouts, adapters.slabs, strict=True)):
        write_peft_folder(tmp_path / str(n), layout, slab, layout.rank, adapters.base)
    asked = {"base": adapters.base, "folder": str(tmp_path), "workers": 1, "turns": [[[], [], MIX]]}
    adapters.check(run(asked)["rows"])


@pytest.mark.parametrize("workers", [1, 2])
def test_adapters_that_wefts_own_sync_puts_beside_it_are_each_their_own_and_none_that_had_their_slot(
    workers: int, tmp_path: Path
) -> None:
    """The first has rank 16; where it was comes one of rank 3 that leaves a linear out, for the very same batch of prompts."""
    adapters = Adapters(tiny_path(), (16, 8, 3), {2: "o_proj"}, SCALE)

    def slab(n: int) -> list[Any]:
        path, layout = tmp_path / str(n), adapters.layouts[n]
        path.write_bytes(adapters.slabs[n].numpy().tobytes())
        said = {"rank": layout.rank, "modules": layout.modules, "dtype": "float32", "scale": SCALE}
        return [n, str(path), said | {"checksum": int(checksum(adapters.slabs[n]))}]

    first, second = [0, 1, -1, 0, 1, 0], [2, 1, -1, 2, 1, 2]
    turns = [[[slab(0), slab(1)], [], first], [[slab(2)], [0], second]]
    found = run({"base": adapters.base, "folder": str(tmp_path), "workers": workers, "turns": turns})
    assert [one["slots"] for one in found["workers"]] == [[3, 2]] * workers
    adapters.check(found["rows"])
