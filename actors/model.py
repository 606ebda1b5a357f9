"""The frozen base: a decoder of the Qwen2, Qwen3 and Llama families over packed rows, with LoRA in every linear.

T tokens of all rows, n rows, H hidden size, V vocabulary, I MLP width, D head size.
What shares its input is one product: q, k and v lie in one weight, gate and up in another; adapters keep the parts' names.
Only adapters are trained: the base has no gradient, and its norms and products compute none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.actors.architecture import Architecture
from weft.actors.attention import Attention, plan_attention
from weft.actors.hf_folder import MAX_SHARD_BYTES, check_folder, read_config, read_tensors, write_folder
from weft.actors.layers import add_rms_norm, heads, rms_norm_rows, rope_table, swiglu
from weft.actors.lora import LoraBatch
from weft.actors.recompute import Recompute, choose_recompute
from weft.actors.slab_batch import LinearGroup, SlabBatch
from weft.kernels.fp8 import Fp8Weight, can_multiply, quantize_weight
from weft.kernels.lora import fused_lora_linear, slab_linear, slab_mlp
from weft.kernels.lora.tables import Tables

if TYPE_CHECKING:
    from weft.kernels.lora.fp8 import Fp8Linear

__all__ = ["Decoder", "check_folder", "load_model", "read_config", "save_model"]

LINEARS = 4  # products of a layer: q, k and v; o; gate and up; down


class Linear(nn.Module):
    """One product for linears that share their input; `names` are those linears', of `widths` outputs each."""

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool, index: int) -> None:
        """index: the place among all of the decoder, in model order."""
        super().__init__()
        self.names, self.index = tuple(names), index
        self.widths = tuple(out for out, _ in shapes)
        self.weight = _frozen(sum(self.widths), shapes[0][1])
        self.bias = _frozen(sum(self.widths)) if bias else None
        self.narrow: Fp8Weight | None = None  # the weight in FP8, beside it

    def forward(self, x: Tensor, lora: LoraBatch | Tables | None, source: Callable[[], Tensor] | None = None) -> Tensor:
        """x [T, I] -> [T, sum(widths)]. source: makes x again, where the backward needs it and it should not be kept."""
        if lora is None:
            return nn.functional.linear(x, self.weight, self.bias)
        if isinstance(lora, Tables):
            return slab_linear(x, self.weight, self.bias, lora, lora.groups[self.index], source)
        a, b = zip(*(lora.columns(name) for name in self.names), strict=True)
        return fused_lora_linear(x, self.weight, self.bias, self.widths, a, b, lora.scales, lora.offsets)

    def in_fp8(self, tables: Tables | None) -> Fp8Linear:
        """What the FP8 kernels take."""
        from weft.kernels.lora.fp8 import Fp8Linear  # needs a GPU's driver

        assert self.narrow is not None
        return Fp8Linear(self.narrow, self.bias, tables, None if tables is None else tables.groups[self.index])


class Layer(nn.Module):
    """One block: attention, then MLP, each after a norm and beside a residual."""

    def __init__(self, architecture: Architecture, linears: Mapping[str, tuple[tuple[int, int], bool]], index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"

        def linear(place: int, *names: str) -> Linear:
            full = [f"{prefix}.{name}" for name in names]
            return Linear(full, [linears[name][0] for name in full], linears[full[0]][1], LINEARS * index + place)

        self.architecture = architecture
        self.qkv = linear(0, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear(1, "self_attn.o_proj")
        self.gate_up = linear(2, "mlp.gate_proj", "mlp.up_proj")
        self.down = linear(3, "mlp.down_proj")
        self.attention_norm = _frozen(architecture.hidden_size)
        self.mlp_norm = _frozen(architecture.hidden_size)
        self.q_norm = _frozen(architecture.head_dim) if architecture.head_norm else None
        self.k_norm = _frozen(architecture.head_dim) if architecture.head_norm else None

    def groups(self) -> list[LinearGroup]:
        """Its linears, in the order of their `index`."""
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return [LinearGroup(linear.names, linear.weight.shape[1], linear.widths) for linear in linears]

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        lora: LoraBatch | Tables | None,
        again: bool,
        fp8: bool,
    ) -> tuple[Tensor, Tensor]:
        """x + delta [T, H] -> the same of the next layer: its norm adds them. cos and sin [T, 1, D / 2]. again: what is cheap
        to make again for the backward is not kept. fp8: the products of the base."""
        if fp8:
            assert not isinstance(lora, LoraBatch), "pairs of tensors are for exact weights"
            return self._forward_fp8(x, delta, cos, sin, attention, lora, again)
        arch = self.architecture

        def normed(weight: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor] | None]:
            total, scaled = add_rms_norm(x, delta, weight, arch.rms_norm_eps)
            return total, scaled, partial(rms_norm_rows, total.detach(), weight, arch.rms_norm_eps) if again else None

        x, scaled, source = normed(self.attention_norm)
        qkv = self.qkv(scaled, lora, source)
        sizes = (arch.num_heads, arch.num_kv_heads, arch.rms_norm_eps)
        q, k, v = heads(qkv, self.q_norm, self.k_norm, cos, sin, *sizes)
        delta = self.o(attention(q, k, v).flatten(1), lora)
        x, scaled, source = normed(self.mlp_norm)
        if isinstance(lora, Tables):
            frozen = [(linear.weight, linear.bias) for linear in (self.gate_up, self.down)]
            return x, slab_mlp(scaled, *frozen, lora, (lora.groups[self.gate_up.index], lora.groups[self.down.index]), source)
        return x, self.down(swiglu(self.gate_up(scaled, lora)), lora)

    def _forward_fp8(
        self,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        tables: Tables | None,
        again: bool,
    ) -> tuple[Tensor, Tensor]:
        from weft.kernels.lora import fp8  # needs a GPU's driver

        arch = self.architecture
        x, qkv = fp8.norm_linear(x, delta, self.attention_norm, arch.rms_norm_eps, self.qkv.in_fp8(tables), again)
        q, k, v = heads(qkv, self.q_norm, self.k_norm, cos, sin, arch.num_heads, arch.num_kv_heads, arch.rms_norm_eps)
        delta = fp8.linear(attention(q, k, v).flatten(1), self.o.in_fp8(tables))
        linears = (self.gate_up.in_fp8(tables), self.down.in_fp8(tables))
        return fp8.norm_mlp(x, delta, self.mlp_norm, arch.rms_norm_eps, *linears, again)


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
        self._groups = [group for layer in self.layers for group in layer.groups()]
        self._rope: tuple[Tensor, Tensor] | None = None  # cos, sin, grown as longer rows come
        self._outgrown: list[tuple[Tensor, Tensor] | None] = []  # together as large as the last

    def use_fp8(self, wanted: bool = True) -> None:
        """Whether the layers' products run in FP8. The weights stay beside their FP8 copies.

        Raises ValueError where the device, or a size of the model, does not allow it.
        """
        device = self.head.device
        if wanted and (not can_multiply(device) or self.head.dtype != torch.bfloat16):
            dtype = str(self.head.dtype).removeprefix("torch.")
            raise ValueError(f"FP8 products need a base in bfloat16 on a Hopper GPU or later, this one is {dtype} on {device}")
        for layer in self.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                linear.narrow = quantize_weight(linear.weight) if wanted else None

    @property
    def head(self) -> Tensor:
        """[V, H]"""
        return self.embedding if self.untied_head is None else self.untied_head

    def forward(
        self,
        tokens: Tensor,
        offsets: Sequence[int] | Tensor,
        lora: LoraBatch | SlabBatch | None = None,
        exact: bool = False,
    ) -> Tensor:
        """tokens int [T], offsets n + 1 row bounds (on the host) from 0 to T -> hidden [T, H] after the last norm.

        Positions start again, and attention is causal, within each row. lora None: the base alone. A SlabBatch is for CUDA.
        After `use_fp8`, what is `exact`, and any LoraBatch, still runs on the exact weights: what a sampler computes.
        """
        bounds = [int(bound) for bound in offsets]
        lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        assert bounds[0] == 0 and bounds[-1] == tokens.shape[0] and min(lengths) > 0, "rows must cover the tokens, none empty"
        x = F.embedding(tokens.long(), self.embedding)
        cos, sin = self._angles(lengths, x)
        attention = plan_attention(lengths, x.device, x.dtype)
        tables = lora.tables(self._groups, len(tokens), x.device) if isinstance(lora, SlabBatch) else lora
        recompute, fp8 = Recompute.NONE, self.layers[0].qkv.narrow is not None and not (exact or isinstance(lora, LoraBatch))
        if isinstance(lora, SlabBatch) and torch.is_grad_enabled():
            recompute = choose_recompute(self.architecture, len(tokens), x.dtype, x.device, fp8)
        delta: Tensor | None = None
        for layer in self.layers:
            rest = (cos, sin, attention, tables, recompute is not Recompute.NONE, fp8)
            if recompute is Recompute.LAYERS:
                x, delta = checkpoint(layer, x, delta, *rest, use_reentrant=False)
            else:
                x, delta = layer(x, delta, *rest)
        return add_rms_norm(x, delta, self.norm, self.architecture.rms_norm_eps)[1]

    def _angles(self, lengths: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """-> cos, sin [T, 1, D / 2] of every token's position in its row, in x's type."""
        longest, rope = max(lengths), self._rope
        if rope is None or rope[0].shape[0] < longest or rope[0].device != x.device:
            size = 1 << (longest - 1).bit_length()
            self._outgrown.append(rope)  # a canary may be reading it on another stream: its memory must not be another's yet
            rope = rope_table(self.architecture.rope, self.architecture.head_dim, size, x.device)
            if x.is_cuda:  # nor does the other stream wait for what writes this one
                torch.cuda.current_stream(x.device).synchronize()
            self._rope = rope
        positions = torch.cat([torch.arange(length) for length in lengths])
        if x.is_cuda:  # from pinned memory the copy waits for nothing
            positions = positions.pin_memory().to(x.device, non_blocking=True)
        cos, sin = (table.to(x.dtype)[positions].unsqueeze(1) for table in rope)
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
