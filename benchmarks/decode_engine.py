"""One contender of decode.py: a vLLM engine in a process of its own, asked over a pipe.

Adapters are random, and made inside vLLM's worker from a seed: the same number is the same adapter in every engine, and in the
trainer's decoder that decode_check.py compares with.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CAPTURED = (8, 64, 256)  # batches of the rows: the graphs of others would only take time
PROMPT = 128
LONGEST = 2304  # tokens of a sequence
SIZE = 0.02  # of an adapter's random weights
START_S = 400.0


@dataclass(frozen=True)
class Arm:
    """One engine. slots: max_loras, 0 without LoRA. ranks: adapter n has ranks[n % len(ranks)]; the widest is max_lora_rank."""

    name: str
    slots: int = 0
    ranks: tuple[int, ...] = (32,)
    ours: bool = False
    dual: bool = False
    counts: bool = False
    cache_gb: float = 15.5

    @property
    def settings(self) -> dict[str, Any]:
        if not self.slots:
            return {}
        lora = {
            "enable_lora": True,
            "max_loras": self.slots,
            "max_lora_rank": max(self.ranks),
            "lora_target_modules": [*LINEARS],
        }
        return lora | {"max_cpu_loras": self.slots} | ({"specialize_active_lora": True} if self.counts else {})

    @property
    def environment(self) -> dict[str, str]:
        return {"WEFT_LORA_KERNELS": "1" if self.ours else "0", "VLLM_LORA_ENABLE_DUAL_STREAM": "1" if self.dual else "0"}


@dataclass(frozen=True)
class Load:
    """What is asked at once. adapters: of each request, -1 without."""

    adapters: tuple[int, ...]
    generated: int
    prompt: int = PROMPT
    seed: int = 0
    temperature: float = 1.0
    logprobs: int = 0


@dataclass(eq=False)
class Engine:
    """The parent's end. Starts at once; `ready` waits."""

    arm: Arm
    folder: str
    logs: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        log = str(self.logs / f"{self.arm.name}.log".replace(" ", "-"))
        self.process = context.Process(target=serve, args=(theirs, self.arm, self.folder, log))
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        self.facts = self._answer(START_S)

    def ask(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments))
        return self._answer(START_S)

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(("end", ()))
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()

    def _answer(self, timeout_s: float) -> Any:
        try:
            if not self.pipe.poll(timeout_s):
                raise RuntimeError(f"{self.arm.name}: no answer in {timeout_s:.0f} s")
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.arm.name}: the engine's process has died") from None
        if kind == "error":
            raise RuntimeError(f"{self.arm.name}: {value}")
        return value


def random_slab(numel: int, number: int, device: torch.device | str) -> torch.Tensor:
    """Adapter `number`'s weights: A and B alike N(0, SIZE), bf16."""
    draw = torch.Generator(device=device).manual_seed(number)
    return (torch.randn(numel, generator=draw, device=device) * SIZE).bfloat16()


def serve(pipe: Connection, arm: Arm, folder: str, log: str) -> None:
    """The child: answers until it is told to end."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(arm.environment | {"VLLM_CACHE_ROOT": f"{log}.cache", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        began = time.perf_counter()
        served = Served(arm, folder)
        pipe.send(("done", {"start_s": round(time.perf_counter() - began, 1), **served.facts}))
        while (asked := pipe.recv())[0] != "end":
            method, arguments = asked
            pipe.send(("done", getattr(served, method)(*arguments)))
    except Exception as error:  # noqa: BLE001 it is the parent's to know, whatever it is
        import traceback

        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {str(error)[:500]}"))


class Served:
    def __init__(self, arm: Arm, folder: str) -> None:
        from vllm import LLM

        self.arm = arm
        longest = json.loads((Path(folder) / "config.json").read_text())["max_position_embeddings"]
        self.llm = LLM(
            model=folder, dtype="bfloat16", max_model_len=min(LONGEST, longest), max_num_seqs=max(CAPTURED),
            max_num_batched_tokens=8192, gpu_memory_utilization=0.1, kv_cache_memory_bytes=int(arm.cache_gb * 1e9),
            enable_prefix_caching=False, disable_log_stats=True, seed=0,
            compilation_config={"cudagraph_capture_sizes": list(CAPTURED)},
            worker_extension_cls="decode_worker.DecodeWorker", **arm.settings,
        )  # fmt: skip
        self.facts: dict[str, Any] = {"vocabulary": self.llm.get_tokenizer().vocab_size}
        for n in range(arm.slots):
            self._call("decode_fill", n + 1, arm.ranks[n % len(arm.ranks)])
        self.facts["wrapper"] = self._call("decode_wrapper")

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[0]

    def run(self, load: Load) -> dict[str, Any]:
        """-> seconds, the tokens of each request, and their log-probabilities (of the sampled first)."""
        import random

        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        draw = random.Random(load.seed)
        high = min(self.facts["vocabulary"], 150000) - 1
        prompts = [{"prompt_token_ids": [draw.randint(3, high) for _ in range(load.prompt)]} for _ in load.adapters]
        params = SamplingParams(
            temperature=load.temperature, max_tokens=load.generated, ignore_eos=True, logprobs=load.logprobs, detokenize=False
        )
        requests = [LoRARequest(f"adapter {n}", n + 1, f"mem://{n}") if n >= 0 else None for n in load.adapters]
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=requests if self.arm.slots else None)
        took = time.perf_counter() - began
        return {
            "seconds": took,
            "prompts": [prompt["prompt_token_ids"] for prompt in prompts],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [
                [{token: one.logprob for token, one in position.items()} for position in output.outputs[0].logprobs]
                for output in outputs
            ]
            if load.seed < 0
            else None,
        }

    def time(self, load: Load) -> float:
        return float(self.run(load)["seconds"])

    def profile(self, load: Load) -> dict[str, dict[str, float]]:
        self._call("decode_profile_start")
        self.run(load)
        return self._call("decode_profile_end")  # type: ignore[no-any-return]
