"""The frozen base: a decoder of the Qwen2, Qwen3 and Llama families over packed rows, with LoRA in every linear.

T tokens of all rows, n rows, H hidden size, V vocabulary, I MLP width, D head size.
What shares its input is one product: q, k and v lie in one weight, gate and up in another; adapters keep the parts' names.
Only adapters are trained: the base has no gradient, and its norms and products compute none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.actors.architecture import Architecture
from weft.actors.attention import Attention, plan_attention
from weft.actors.hf_folder import MAX_SHARD_BYTES, check_folder, read_config, read_tensors, write_folder
from weft.actors.layers import rms_norm, rope_table, rotate, swiglu
from weft.actors.lora import LoraBatch
from weft.kernels.lora import fused_lora_linear

__all__ = ["Decoder", "check_folder", "load_model", "read_config", "save_model"]


class Linear(nn.Module):
    """One product for linears that share their input; `names` are those linears', of `widths` outputs each."""

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool) -> None:
        super().__init__()
        self.names = tuple(names)
        self.widths = tuple(out for out, _ in shapes)
        self.weight = _frozen(sum(self.widths), shapes[0][1])
        self.bias = _frozen(sum(self.widths)) if bias else None

    def forward(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """x [T, I] -> [T, sum(widths)]"""
        if lora is None:
            return F.linear(x, self.weight, self.bias)
        a, b = zip(*(lora.columns(name) for name in self.names), strict=True)
        return fused_lora_linear(x, self.weight, self.bias, self.widths, a, b, lora.scales, lora.offsets)


class Layer(nn.Module):
    """One block: attention, then MLP, each after a norm and beside a residual."""

    def __init__(self, architecture: Architecture, linears: Mapping[str, tuple[tuple[int, int], bool]], index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"

        def linear(*names: str) -> Linear:
            full = [f"{prefix}.{name}" for name in names]
            return Linear(full, [linears[name][0] for name in full], linears[full[0]][1])

        self.architecture = architecture
        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")
        self.attention_norm = _frozen(architecture.hidden_size)
        self.mlp_norm = _frozen(architecture.hidden_size)
        self.q_norm = _frozen(architecture.head_dim) if architecture.head_norm else None
        self.k_norm = _frozen(architecture.head_dim) if architecture.head_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, lora: LoraBatch | None) -> Tensor:
        """x [T, H] -> [T, H]; cos and sin [T, 1, D / 2]"""
        arch = self.architecture
        qkv = self.qkv(rms_norm(x, self.attention_norm, arch.rms_norm_eps), lora)
        qk, v = qkv.unflatten(1, (-1, arch.head_dim)).split([arch.num_heads + arch.num_kv_heads, arch.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            weight = torch.cat([self.q_norm.expand(arch.num_heads, -1), self.k_norm.expand(arch.num_kv_heads, -1)])
            qk = rms_norm(qk, weight, arch.rms_norm_eps)
        q, k = rotate(qk, cos, sin).split([arch.num_heads, arch.num_kv_heads], dim=1)
        x = x + self.o(attention(q, k, v).flatten(1), lora)
        hidden = swiglu(self.gate_up(rms_norm(x, self.mlp_norm, arch.rms_norm_eps), lora))
        return x + self.down(hidden, lora)


class Decoder(nn.Module):
    """`forward` gives hidden states; log-probabilities come from them and `head` through kernels.logprob."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.hf_config = dict(hf_config)
        self.architecture = Architecture.from_hf(hf_config)
        linears = {name: (shape, bias) for name, shape, bias in self.architecture.linears()}
        vocabulary = (self.architecture.vocab_size, self.architecture.hidden_size)
        self.embedding = _frozen(*vocabulary)
        self.layers = nn.ModuleList(Layer(self.architecture, linears, i) for i in range(self.architecture.num_layers))
        self.norm = _frozen(self.architecture.hidden_size)
        self.untied_head = None if self.architecture.tied else _frozen(*vocabulary)
        self._rope: tuple[Tensor, Tensor] | None = None  # cos, sin, grown as longer rows come

    @property
    def head(self) -> Tensor:
        """[V, H]"""
        return self.embedding if self.untied_head is None else self.untied_head

    def forward(self, tokens: Tensor, offsets: Sequence[int] | Tensor, lora: LoraBatch | None = None) -> Tensor:
        """tokens int [T], offsets n + 1 row bounds (on the host) from 0 to T -> hidden [T, H] after the last norm.

        Positions start again, and attention is causal, within each row. lora None: the base alone.
        """
        bounds = [int(bound) for bound in offsets]
        lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        assert bounds[0] == 0 and bounds[-1] == tokens.shape[0] and min(lengths) > 0, "rows must cover the tokens, none empty"
        x = F.embedding(tokens.long(), self.embedding)
        cos, sin = self._angles(lengths, x)
        attention = plan_attention(lengths, x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attention, lora)
        return rms_norm(x, self.norm, self.architecture.rms_norm_eps)

    def _angles(self, lengths: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """-> cos, sin [T, 1, D / 2] of every token's position in its row, in x's type."""
        longest = max(lengths)
        if self._rope is None or self._rope[0].shape[0] < longest or self._rope[0].device != x.device:
            size = 1 << (longest - 1).bit_length()
            self._rope = rope_table(self.architecture.rope, self.architecture.head_dim, size, x.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(x.device)
        cos, sin = (table.to(x.dtype)[positions].unsqueeze(1) for table in self._rope)
        return cos, sin


def load_model(folder: str | Path, dtype: torch.dtype | str, device: torch.device | str = "cpu") -> Decoder:
    """The frozen decoder of a Hugging Face folder. Built on the meta device, so that no weight is made only to be overwritten.

    Raises ValueError where `check_folder` does.
    """
    check_folder(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        decoder = Decoder(read_config(folder))
    places = _places(decoder)
    read = read_tensors(folder, [name for names in places.values() for name in names])
    state = {}
    for place, names in places.items():
        parts = [read[name].to(device=device, dtype=dtype) for name in names]
        state[place] = parts[0] if len(parts) == 1 else torch.cat(parts)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval()


def save_model(
    decoder: Decoder, folder: str | Path, tokenizer_from: str | Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes config.json and the weights as transformers and vLLM read them, sharded above max_shard_bytes, and copies the
    tokenizer's files from `tokenizer_from`. Weights that were in `folder` are replaced."""
    state, rows = decoder.state_dict(), decoder.architecture.tensors()
    tensors: dict[str, Tensor] = {}
    for place, names in _places(decoder).items():
        parts = state[place].split([rows[name][0] for name in names])
        tensors.update(zip(names, parts, strict=True))
    config = {key: value for key, value in decoder.hf_config.items() if key != "torch_dtype"}  # its name before transformers 5
    config["dtype"] = str(decoder.embedding.dtype).removeprefix("torch.")
    write_folder(folder, config, tensors, tokenizer_from, max_shard_bytes)


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _places(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    """Our parameter's name -> the checkpoint's names of what lies in it, from the top row down."""
    places: dict[str, tuple[str, ...]] = {"embedding": ("model.embed_tokens.weight",), "norm": ("model.norm.weight",)}
    if decoder.untied_head is not None:
        places["untied_head"] = ("lm_head.weight",)
    for i, layer in enumerate(decoder.layers):
        theirs = f"model.layers.{i}"
        places[f"layers.{i}.attention_norm"] = (f"{theirs}.input_layernorm.weight",)
        places[f"layers.{i}.mlp_norm"] = (f"{theirs}.post_attention_layernorm.weight",)
        if decoder.architecture.head_norm:
            places[f"layers.{i}.q_norm"] = (f"{theirs}.self_attn.q_norm.weight",)
            places[f"layers.{i}.k_norm"] = (f"{theirs}.self_attn.k_norm.weight",)
        for ours in ("qkv", "o", "gate_up", "down"):
            linear = getattr(layer, ours)
            places[f"layers.{i}.{ours}.weight"] = tuple(f"{name}.weight" for name in linear.names)
            if linear.bias is not None:
                places[f"layers.{i}.{ours}.bias"] = tuple(f"{name}.bias" for name in linear.names)
    return places
