"""Who takes part in train_step: each makes one optimizer step of every adapter out of the same batches.

N adapters, T tokens of all, S tokens of a row, D elements of an adapter, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes, resolve_targets
from weft.actors.model import Decoder
from weft.actors.slab_batch import SlabBatch
from weft.kernels.logprob import token_logprobs
from weft.kernels.optim import SlabStep, adamw_steps

RULE = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}
LOOPED = 16  # of PEFT's adapters, which it trains one after the other
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
}
SMALL = QWEN3_4B | {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@dataclass(frozen=True)
class Case:
    """One shape of work. launch_tokens: at most so many tokens in one forward and backward."""

    name: str
    adapters: int
    tokens_each: int
    row: int  # S
    launch_tokens: int = 32768
    rank: int = 32
    targets: tuple[str, ...] = ("all-linear",)
    registered: int = 0  # adapters in memory; 0: those that train
    lengths: tuple[int, ...] = ()  # of the rows of an adapter, where they differ
    solo: bool = False  # our kernels one adapter at a time are a row too
    fp8: bool = False  # and the base in FP8

    @property
    def tokens(self) -> int:
        return self.adapters * self.tokens_each

    def rows(self) -> list[int]:
        """Lengths of one adapter's rows."""
        return list(self.lengths) or [self.row] * (self.tokens_each // self.row)


def random_decoder(config: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """Weights N(0, 0.02), norms 1, made on the device."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    draw = torch.Generator(device).manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if name.endswith("norm"):
            weight.fill_(1)
        else:
            weight.normal_(0, 0.02, generator=draw)
    return decoder


class Adapter:
    """Slabs of one adapter: A and B both random, for a B of zero would hide half of the gradients."""

    def __init__(self, layout: SlabLayout, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.layout = layout
        self.state = torch.zeros(3, layout.numel, device=device)
        self.state[0].normal_(0, 0.02, generator=torch.Generator(device).manual_seed(seed))
        self.weights = self.state[0].to(dtype) if dtype != torch.float32 else self.state[0]
        self.gradient = torch.zeros(layout.numel, device=device)
        self.scale = 1.0
        self.steps = 0

    def step(self) -> SlabStep:
        self.steps += 1
        return SlabStep(*self.state, self.gradient, self.weights, self.steps, **RULE)


def make_adapters(case: Case, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> list[Adapter]:
    shapes = linear_shapes(config)
    layout = SlabLayout.build(shapes, resolve_targets(shapes, case.targets), case.rank)
    return [Adapter(layout, device, dtype, seed) for seed in range(case.registered or case.adapters)]


@dataclass
class Batch:
    """All rows of all adapters, adapter after adapter. tokens, targets int [T], weights fp32 [T]: the loss is sum of weight
    times log-probability over all positions."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def random(cls, case: Case, vocabulary: int, device: torch.device) -> Batch:
        draw = torch.Generator(device).manual_seed(7)
        ids = torch.randint(vocabulary, (2, case.tokens), generator=draw, device=device)
        weights = torch.randn(case.tokens, generator=draw, device=device) / case.tokens_each
        return cls(ids[0], ids[1], weights)


class Weft:
    """All adapters in as few launches as launch_tokens allows, or one after the other (solo). fp8: the base's products."""

    def __init__(self, decoder: Decoder, adapters: list[Adapter], case: Case, solo: bool = False, fp8: bool = False) -> None:
        decoder.use_fp8(fp8)
        self.decoder, self.adapters, self.case = decoder, adapters, case
        self.batch = Batch.random(case, decoder.head.shape[0], decoder.head.device)
        together = 1 if solo else max(1, case.launch_tokens // case.tokens_each)
        self.launches = [range(at, min(at + together, case.adapters)) for at in range(0, case.adapters, together)]
        self.solo = solo

    def step(self) -> None:
        for launch in self.launches:
            self.gradients(launch)
            if self.solo:
                adamw_steps([self.adapters[n].step() for n in launch])
        if not self.solo:
            adamw_steps([adapter.step() for adapter in self.adapters[: self.case.adapters]])

    def gradients(self, launch: range) -> None:
        """Of the adapters in `launch`, into their slabs."""
        case, pieces = self.case, max(1, -(-self.case.tokens_each // self.case.launch_tokens))
        rows = case.rows() if pieces == 1 else [case.row] * (case.launch_tokens // case.row)
        for piece in range(pieces):
            count = sum(rows)
            start = launch.start * case.tokens_each + piece * count
            at = slice(start, start + len(launch) * count)
            offsets = [n * count for n in range(len(launch) + 1)]
            bounds = torch.tensor([0, *rows * len(launch)]).cumsum(0).tolist()
            hidden = self.decoder(self.batch.tokens[at], bounds, self.lora(launch, offsets, piece == 0))
            backward(hidden, self.decoder, self.batch, at)

    def lora(self, launch: range, offsets: list[int], fresh: bool) -> SlabBatch | LoraBatch:
        chosen = [self.adapters[n] for n in launch]
        scales = [adapter.scale for adapter in chosen]
        if self.decoder.head.is_cuda:
            columns = zip(*((one.layout, one.weights, one.gradient) for one in chosen), strict=True)
            return SlabBatch(tuple(offsets), tuple(scales), *columns, (fresh,) * len(chosen))
        for adapter in chosen:
            if fresh:
                adapter.gradient.zero_()
        return LoraBatch.build(offsets, scales, [one.layout.leaves(one.weights, one.gradient) for one in chosen])


class Base:
    """The same tokens through the base alone: forward, and backward to the embeddings. No adapter, no optimizer."""

    name = "base without LoRA"

    def __init__(self, decoder: Decoder, case: Case) -> None:
        decoder.use_fp8(False)
        self.decoder, self.case = decoder, case
        self.batch = Batch.random(case, decoder.head.shape[0], decoder.head.device)

    def step(self) -> None:
        case = self.case
        tokens = min(case.launch_tokens // case.row * case.row, case.tokens)

        def needs_gradient(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0].detach().requires_grad_(), *inputs[1:])

        hook = self.decoder.layers[0].register_forward_pre_hook(needs_gradient)
        for start in range(0, case.tokens, tokens):
            at = slice(start, min(start + tokens, case.tokens))
            bounds = list(range(0, at.stop - start + 1, case.row))
            backward(self.decoder(self.batch.tokens[at], bounds), self.decoder, self.batch, at)
        hook.remove()


def backward(hidden: Tensor, decoder: Decoder, batch: Batch, at: slice) -> None:
    heat = torch.ones(at.stop - at.start, device=hidden.device)
    logprobs, _ = token_logprobs(hidden, decoder.head, batch.targets[at], heat)
    (logprobs * batch.weights[at]).sum().backward()


class Peft:
    """PEFT and transformers, one adapter at a time: forward, backward, clip, fused AdamW; bf16 throughout, sdpa, no recompute,
    at most `most` tokens in one call (what fits, and no slower a token than fewer). One adapter stands for all of them, so that
    it never pays for swapping; of a loop over many, LOOPED turns are timed and stand for the rest."""

    name = "peft"

    def __init__(self, case: Case, device: torch.device, config: dict[str, Any], most: int = 8192) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.case, self.most = case, most
        self.looped = min(case.adapters, LOOPED)
        self.stands_for = case.adapters / self.looped
        settings = Qwen3Config(**{key: value for key, value in config.items() if key != "architectures"})
        settings._attn_implementation = "sdpa"
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            base = Qwen3ForCausalLM(settings)
            torch.set_default_dtype(torch.float32)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=names, init_lora_weights=False)
        self.model = get_peft_model(base, lora, autocast_adapter_dtype=False)
        self.model.config.use_cache = False
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.batch = Batch.random(case, config["vocab_size"], device)

    def step(self) -> None:
        case = self.case
        for n in range(self.looped):
            start = n * case.tokens_each
            for at in range(0, case.tokens_each, max(self.most, case.row)):
                count = min(max(self.most, case.row), case.tokens_each - at)
                ids = self.batch.tokens[start + at : start + at + count].view(-1, case.row)
                self.model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
