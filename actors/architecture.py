"""What weft reads of a Hugging Face config.json: the shape of a Qwen2, Qwen3 or Llama decoder. No torch.

H hidden size, I MLP width, V vocabulary, D head size; linears are named and shaped [out, in] as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021). `factor` and what follows it belong to the scaled kinds."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class Architecture:
    """The decoder's shape. `from_hf` reads it out of a config.json."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool  # of o_proj
    mlp_bias: bool
    head_norm: bool  # q_norm and k_norm
    tied: bool  # the head is the embedding

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Architecture:
        """Raises ValueError for a family or feature that weft does not run, naming the key, its value and what is supported."""
        family = _family(config)
        sizes = {key: _size(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
        heads = _size(config, "num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
        _check_features(config)
        default_dim = 128 if family == "qwen3" else sizes["hidden_size"] // heads
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            family=family,
            **sizes,
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.get("head_dim") or default_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            head_norm=family == "qwen3",
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def q_size(self) -> int:
        """num_heads * head_dim"""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """num_kv_heads * head_dim"""
        return self.num_kv_heads * self.head_dim

    def linears(self) -> Iterator[tuple[str, tuple[int, int], bool]]:
        """(Hugging Face name, [out, in], has a bias) of every linear but the head, in model order."""
        h, i = self.hidden_size, self.intermediate_size
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            yield f"{attention}.q_proj", (self.q_size, h), self.qkv_bias
            yield f"{attention}.k_proj", (self.kv_size, h), self.qkv_bias
            yield f"{attention}.v_proj", (self.kv_size, h), self.qkv_bias
            yield f"{attention}.o_proj", (h, self.q_size), self.output_bias
            yield f"{mlp}.gate_proj", (i, h), self.mlp_bias
            yield f"{mlp}.up_proj", (i, h), self.mlp_bias
            yield f"{mlp}.down_proj", (h, i), self.mlp_bias

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this model holds."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for name, shape, bias in self.linears():
            shapes[f"{name}.weight"] = shape
            if bias:
                shapes[f"{name}.bias"] = shape[:1]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.head_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


def _family(config: Mapping[str, Any]) -> str:
    names = list(config.get("architectures") or ())
    family = config.get("model_type")
    if family not in FAMILIES or (names and FAMILIES[family] not in names):
        known = ", ".join(f"{key} ({name})" for key, name in FAMILIES.items())
        raise ValueError(f"model_type={family!r}, architectures={names!r}: must be one of {known}")
    return str(family)


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key}={value!r}: must be a whole number above 0")
    return value


def _check_features(config: Mapping[str, Any]) -> None:
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={act!r}: must be silu")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: must be absent, the base is held in float32 or bfloat16")
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    if windowed or (config.get("use_sliding_window") and config.get("sliding_window")):
        raise ValueError("use_sliding_window=True: must be False, attention here is over the whole row")


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps everything in rope_parameters; before it, rope_theta stood beside an optional rope_scaling."""
    found = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type={kind!r}: must be one of {', '.join(ROPE_TYPES)}")
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor: must be 1.0")
    positions = found.get("original_max_position_embeddings") or config.get("max_position_embeddings", 8192)
    return Rope(
        theta=float(found.get("rope_theta", config.get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(found.get("factor", 1.0)),
        low_freq_factor=float(found.get("low_freq_factor", 1.0)),
        high_freq_factor=float(found.get("high_freq_factor", 4.0)),
        original_max_positions=int(positions),
    )
