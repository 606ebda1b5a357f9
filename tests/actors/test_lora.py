"""Targets by name, and the slab in which one adapter lies."""

import pytest
import torch

from weft.actors.lora import LoraBatch, SlabLayout, init_pairs, linear_shapes, resolve_targets

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SHAPES = linear_shapes(CONFIG)
LAST = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ends(names: tuple[str, ...]) -> list[str]:
    """The last words of the first layer's names."""
    return [name.rpartition(".")[2] for name in names if ".layers.0." in name]


def test_linears_come_in_model_order_with_their_shapes() -> None:
    assert ends(tuple(SHAPES)) == list(LAST)
    assert list(SHAPES)[7] == "model.layers.1.self_attn.q_proj"
    first = [SHAPES[name] for name in list(SHAPES)[:7]]
    assert first == [(32, 12), (16, 12), (16, 12), (12, 32), (20, 12), (20, 12), (12, 20)]


@pytest.mark.parametrize(
    ("wanted", "excluded", "found"),
    [
        (("all-linear",), (), LAST),
        (("v_proj", "q_proj"), (), ("q_proj", "v_proj")),
        (("self_attn.o_proj",), (), ("o_proj",)),
        (("qkv_proj",), (), ("q_proj", "k_proj", "v_proj")),
        (("mlp.gate_up_proj", "q_proj"), (), ("q_proj", "gate_proj", "up_proj")),
        (("all-linear",), ("qkv_proj", "down_proj"), ("o_proj", "gate_proj", "up_proj")),
        (("q_proj", "q_proj", "all-linear"), ("q_proj",), LAST[1:]),
    ],
)
def test_a_target_is_all_linear_a_dotted_ending_or_a_fused_name(
    wanted: tuple[str, ...], excluded: tuple[str, ...], found: tuple[str, ...]
) -> None:
    resolved = resolve_targets(SHAPES, wanted, excluded)
    assert ends(resolved) == list(found)
    assert len(resolved) == 2 * len(found)


def test_a_full_name_is_that_linear_alone() -> None:
    name = "model.layers.1.mlp.up_proj"
    assert resolve_targets(SHAPES, [name]) == (name,)
    fused = "model.layers.1.self_attn.qkv_proj"
    assert resolve_targets(SHAPES, [fused], ["k_proj"]) == (fused.replace("qkv", "q"), fused.replace("qkv", "v"))


@pytest.mark.parametrize("name", ["c_attn", "proj", "lm_head", "embed_tokens", "q_proj.", "", "model.layers.2.mlp.up_proj"])
def test_a_name_that_fits_nothing_is_refused_with_what_the_model_has(name: str) -> None:
    for setting in ("target_modules", "exclude_modules"):
        lists = {"target_modules": ["all-linear"], "exclude_modules": ()} | {setting: [name]}
        with pytest.raises(ValueError, match=setting) as error:
            resolve_targets(SHAPES, **lists)
        assert repr(name) in str(error.value)
        assert ", ".join(LAST) in str(error.value)


def test_excluding_all_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing"):
        resolve_targets(SHAPES, ["q_proj"], ["all-linear"])


def test_a_slab_is_a_then_b_of_each_target_in_model_order() -> None:
    modules = resolve_targets(SHAPES, ["down_proj", "q_proj"])
    layout = SlabLayout.build(SHAPES, tuple(reversed(modules)), rank=3)
    assert layout.modules == modules
    assert layout.numel == 2 * (3 * 12 + 32 * 3 + 3 * 20 + 12 * 3)
    flat = torch.arange(layout.numel, dtype=torch.float32)
    laid = torch.cat([part.flatten() for pair in layout.views(flat).values() for part in pair])
    assert torch.equal(laid, flat)
    a, b = layout.views(flat)[modules[0]]
    assert a.shape == (3, 12) and b.shape == (32, 3)
    assert a.data_ptr() == flat.data_ptr(), "views, not copies"


def test_a_module_that_the_model_lacks_has_no_place_in_a_slab() -> None:
    with pytest.raises(ValueError, match="'lm_head'"):
        SlabLayout.build(SHAPES, ["lm_head"], rank=2)


def test_a_slab_of_another_size_is_refused() -> None:
    layout = SlabLayout.build(SHAPES, resolve_targets(SHAPES, ["q_proj"]), rank=2)
    with pytest.raises(AssertionError, match="slab of shape"):
        layout.views(torch.zeros(layout.numel + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_adds_into_the_gradient_slab(dtype: torch.dtype) -> None:
    layout = SlabLayout.build(SHAPES, resolve_targets(SHAPES, ["up_proj"]), rank=2)
    weights, gradients = torch.ones(layout.numel, dtype=dtype), torch.zeros(layout.numel)
    leaves = layout.leaves(weights, gradients)
    for _ in range(2):
        sum(part.sum() for pair in leaves.values() for part in pair).backward()
    assert torch.equal(gradients, torch.full_like(gradients, 2.0))
    gradients.zero_()
    assert all(part.grad.count_nonzero() == 0 for pair in leaves.values() for part in pair)


def test_a_step_on_the_weight_slab_is_seen_by_the_leaves() -> None:
    layout = SlabLayout.build(SHAPES, resolve_targets(SHAPES, ["up_proj"]), rank=2)
    weights = torch.zeros(layout.numel)
    leaves = layout.leaves(weights, torch.zeros(layout.numel))
    weights.fill_(3.0)
    assert all(bool((part == 3.0).all()) for pair in leaves.values() for part in pair)


def test_version_0_is_the_base_and_the_same_for_one_seed() -> None:
    layout = SlabLayout.build(SHAPES, resolve_targets(SHAPES, ["all-linear"]), rank=2)
    slabs = [torch.full((layout.numel,), float("nan")) for _ in range(3)]
    for slab, seed in zip(slabs, (1, 1, 2), strict=True):
        init_pairs(layout, slab, torch.Generator().manual_seed(seed))
    assert torch.equal(slabs[0], slabs[1]) and not torch.equal(slabs[0], slabs[2])
    for a, b in layout.views(slabs[0]).values():
        assert b.count_nonzero() == 0
        assert 0 < a.abs().max() <= a.shape[1] ** -0.5


def test_a_batch_gives_each_linear_every_adapters_pair_or_none() -> None:
    names = ("q_proj", "up_proj")
    layouts = [
        SlabLayout.build(SHAPES, resolve_targets(SHAPES, [name]), rank) for name, rank in zip(names, (2, 3), strict=True)
    ]
    batch = LoraBatch.build([0, 4, 9], [1.0, 2.0], [layout.views(torch.zeros(layout.numel)) for layout in layouts])
    a, b = batch.columns("model.layers.0.mlp.up_proj")
    assert a[0] is None and b[0] is None
    assert a[1] is not None and a[1].shape == (3, 12) and b[1] is not None and b[1].shape == (20, 3)
    assert batch.columns("model.layers.0.mlp.down_proj") == ([None, None], [None, None])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "qwen2.*qwen3.*llama"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForCausalLM"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'.*llama3"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic'"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_a_config_that_weft_cannot_run_is_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_shapes(CONFIG | change)
