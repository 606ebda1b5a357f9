"""The decoder against transformers, and its adapters against PEFT, on small random checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from weft.actors.lora import LoraBatch, LoraPair, SlabLayout, init_pairs, linear_shapes, resolve_targets
from weft.actors.model import Decoder, load_model, save_model
from weft.kernels.logprob import token_logprobs

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3 tied": Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "llama tied": LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama untied": LlamaConfig(**SIZES, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama one head each": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, head_dim=10),
}
LENGTHS = (9, 1, 30, 12, 28)  # 9, 12 and 28, 30 share a bucket; 1 has its own


@pytest.fixture(params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_checkpoint(request.param, tmp_path)


def make_checkpoint(name: str, folder: Path, **saving: str) -> Path:
    """Every tensor is random, norms and biases too: those that transformers starts at 1 and 0 would hide a mistake."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    model.save_pretrained(folder, **saving)
    return folder


def packed(seed: int = 0) -> tuple[Tensor, list[int]]:
    offsets = [0]
    for length in LENGTHS:
        offsets.append(offsets[-1] + length)
    tokens = torch.randint(0, SIZES["vocab_size"], (offsets[-1],), generator=torch.Generator().manual_seed(seed))
    return tokens, offsets


def their_logits(model: torch.nn.Module, tokens: Tensor, offsets: list[int]) -> Tensor:
    """Row by row: nothing is packed and nothing is padded."""
    rows = [tokens[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]
    return torch.cat([model(row[None]).logits[0] for row in rows])


def our_logits(decoder: Decoder, tokens: Tensor, offsets: list[int], lora: LoraBatch | None = None) -> Tensor:
    return decoder(tokens, offsets, lora) @ decoder.head.T


def test_logits_equal_transformers(checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    decoder = load_model(checkpoint, torch.float32)
    batch = packed()
    with torch.no_grad():
        wanted = their_logits(theirs, *batch)
        torch.testing.assert_close(our_logits(decoder, *batch), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.1, "logits too even to tell anything"


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    whole = load_model(make_checkpoint("qwen3 untied", tmp_path / "whole"), torch.float32)
    folder = make_checkpoint("qwen3 untied", tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    shards = load_model(folder, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), shards.parameters(), strict=True))


@pytest.mark.parametrize("place", ["rope_theta beside", "rope_scaling beside"])
def test_rope_is_read_wherever_a_config_keeps_it(place: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama untied", tmp_path)
    batch = packed()
    with torch.no_grad():
        wanted = our_logits(load_model(folder, torch.float32), *batch)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if place == "rope_theta beside":
        config |= {"rope_parameters": {key: rope[key] for key in rope if key != "rope_theta"}, "rope_theta": rope["rope_theta"]}
    else:
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(our_logits(load_model(folder, torch.float32), *batch), wanted)


def test_rows_packed_together_equal_rows_alone(checkpoint: Path) -> None:
    decoder = load_model(checkpoint, torch.float32)
    tokens, offsets = packed()
    with torch.no_grad():
        together = decoder(tokens, offsets)
        for start, stop in zip(offsets, offsets[1:], strict=False):
            alone = decoder(tokens[start:stop], [0, stop - start])
            torch.testing.assert_close(together[start:stop], alone, rtol=1e-5, atol=1e-5)


def test_a_row_sees_neither_its_future_nor_its_neighbours(tmp_path: Path) -> None:
    decoder = load_model(make_checkpoint("qwen3 tied", tmp_path), torch.float32)
    tokens, offsets = packed()
    changed = tokens.clone()
    place = offsets[2] + 10  # inside the third row
    changed[place] = (changed[place] + 1) % SIZES["vocab_size"]
    with torch.no_grad():
        before, after = decoder(tokens, offsets), decoder(changed, offsets)
    moved = [place <= position < offsets[3] for position in range(len(tokens))]
    assert torch.equal((before != after).any(dim=1), torch.tensor(moved))


def test_offsets_may_be_a_tensor_and_tokens_int32(tmp_path: Path) -> None:
    decoder = load_model(make_checkpoint("qwen3 tied", tmp_path), "float32")
    tokens, offsets = packed()
    with torch.no_grad():
        found = decoder(tokens.int(), torch.tensor(offsets, dtype=torch.int32))
        assert torch.equal(found, decoder(tokens, offsets))


def test_the_base_is_frozen(tmp_path: Path) -> None:
    decoder = load_model(make_checkpoint("qwen2 untied", tmp_path), torch.float32)
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["one file", "shards"])
def test_saving_what_was_loaded_gives_the_same_bits(checkpoint: Path, tmp_path: Path, shard: int) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    copy = tmp_path / "copy"
    save_model(load_model(checkpoint, torch.float32), copy, tokenizer_from=checkpoint, max_shard_bytes=shard)
    first, second = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (checkpoint, copy)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (copy / "tokenizer.json").read_text() == "{}"
    theirs = AutoModelForCausalLM.from_pretrained(copy)
    assert theirs.dtype == torch.float32
    batch = packed()
    with torch.no_grad():
        ours = our_logits(load_model(copy, torch.float32), *batch)
        torch.testing.assert_close(ours, their_logits(theirs, *batch), rtol=1e-4, atol=1e-4)


def test_saving_again_in_fewer_files_leaves_no_shard_behind(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3 tied", tmp_path, max_shard_size="20KB")
    decoder = load_model(folder, torch.float32)
    save_model(decoder, folder)
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
    again = load_model(folder, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(decoder.parameters(), again.parameters(), strict=True))


def test_bfloat16_is_as_close_to_fp32_as_transformers_is(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3 untied", tmp_path)
    batch = packed()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = their_logits(exact, *batch)
        their_error = (their_logits(theirs, *batch).float() - wanted).norm()
        ours = our_logits(load_model(folder, "bfloat16"), *batch)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - wanted).norm() < 1.5 * their_error


# ---- adapters ----


def random_adapter(decoder: Decoder, rank: int, targets: tuple[str, ...], seed: int) -> tuple[SlabLayout, Tensor]:
    """-> layout, weights; B is random too, or A would have no gradient."""
    shapes = linear_shapes(decoder.hf_config)
    layout = SlabLayout.build(shapes, resolve_targets(shapes, targets), rank)
    weights = torch.empty(layout.numel)
    draw = torch.Generator().manual_seed(seed)
    init_pairs(layout, weights, draw)
    for _, b in layout.views(weights).values():
        b.copy_(torch.randn(b.shape, generator=draw) * 0.2)
    return layout, weights


def objective(decoder: Decoder, tokens: Tensor, hidden: Tensor) -> Tensor:
    """A sum over tokens whose weights differ: one loss for all rows that is also each row's own."""
    logprobs, _ = token_logprobs(hidden, decoder.head, tokens, torch.full((len(tokens),), 0.7))
    return (logprobs * torch.linspace(-1, 1, SIZES["vocab_size"])[tokens]).sum()


def peft_model(folder: Path, layout: SlabLayout, pairs: dict[str, LoraPair], scale: float) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=layout.rank, lora_alpha=scale * layout.rank, target_modules=list(layout.modules))
    model = get_peft_model(base, config)
    for name, (a, b) in pairs.items():
        module = model.base_model.model.get_submodule(name)
        module.lora_A.default.weight.data.copy_(a)
        module.lora_B.default.weight.data.copy_(b)
    return model


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("gate_up_proj", "o_proj")], ids=str)
def test_an_adapters_logits_and_gradients_equal_pefts(checkpoint: Path, targets: tuple[str, ...]) -> None:
    decoder = load_model(checkpoint, torch.float32)
    layout, weights = random_adapter(decoder, 4, targets, seed=1)
    gradients = torch.zeros_like(weights)
    leaves = layout.leaves(weights, gradients)
    theirs = peft_model(checkpoint, layout, leaves, scale=1.5)
    tokens, offsets = packed()
    hidden = decoder(tokens, offsets, LoraBatch.build([0, len(tokens)], [1.5], [leaves]))
    wanted = their_logits(theirs, tokens, offsets)
    with torch.no_grad():
        base = decoder(tokens, offsets)
    assert (hidden - base).abs().max() > 0.05, "an adapter that changes nothing tells nothing"
    torch.testing.assert_close(hidden @ decoder.head.T, wanted, rtol=1e-4, atol=1e-4)

    objective(decoder, tokens, hidden).backward()
    chosen = torch.log_softmax(wanted / 0.7, dim=1).gather(1, tokens[:, None])[:, 0]
    (chosen * torch.linspace(-1, 1, SIZES["vocab_size"])[tokens]).sum().backward()
    for name, found in layout.views(gradients).items():
        module = theirs.base_model.model.get_submodule(name)
        for one, other in zip(found, (module.lora_A.default.weight.grad, module.lora_B.default.weight.grad), strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7, name


# adapter: rank, targets, scale, rows that are its own
ADAPTERS = (
    (4, ("all-linear",), 2.0, (0, 1)),
    (1, ("q_proj", "down_proj"), 0.5, (1, 2)),
    (8, ("k_proj", "up_proj"), 1.0, (2, 2)),  # no tokens in this batch
    (16, ("all-linear",), 4.0, (2, 5)),
)


def test_adapters_trained_together_equal_each_alone(checkpoint: Path) -> None:
    decoder = load_model(checkpoint, torch.float32)
    tokens, offsets = packed()
    layouts, weights = zip(*(random_adapter(decoder, *shape[:2], seed=n) for n, shape in enumerate(ADAPTERS)), strict=True)
    scales = [shape[2] for shape in ADAPTERS]
    bounds = [0, *(offsets[rows[1]] for *_, rows in ADAPTERS)]

    joint = [torch.zeros_like(slab) for slab in weights]
    leaves = [layout.leaves(*slabs) for layout, *slabs in zip(layouts, weights, joint, strict=True)]
    hidden = decoder(tokens, offsets, LoraBatch.build(bounds, scales, leaves))
    objective(decoder, tokens, hidden).backward()

    for n, (*_, (first, last)) in enumerate(ADAPTERS):
        if first == last:
            assert joint[n].count_nonzero() == 0, "no tokens, no gradient"
            continue
        solo = torch.zeros_like(weights[n])
        own = tokens[offsets[first] : offsets[last]]
        rows = [bound - offsets[first] for bound in offsets[first : last + 1]]
        batch = LoraBatch.build([0, len(own)], [scales[n]], [layouts[n].leaves(weights[n], solo)])
        alone = decoder(own, rows, batch)
        torch.testing.assert_close(hidden[offsets[first] : offsets[last]], alone, rtol=1e-5, atol=1e-5)
        objective(decoder, own, alone).backward()
        assert (joint[n] - solo).norm() <= 1e-5 * solo.norm()


def test_an_adapter_of_nan_harms_no_other(tmp_path: Path) -> None:
    decoder = load_model(make_checkpoint("qwen3 tied", tmp_path), torch.float32)
    tokens, offsets = packed()
    bounds = [0, offsets[2], offsets[3], offsets[5]]
    layout, sound = random_adapter(decoder, 4, ("all-linear",), seed=0)

    def run(middle: Tensor) -> tuple[Tensor, list[Tensor]]:
        gradients = [torch.zeros_like(sound) for _ in range(3)]
        leaves = [layout.leaves(slab, gradient) for slab, gradient in zip((sound, middle, sound), gradients, strict=True)]
        hidden = decoder(tokens, offsets, LoraBatch.build(bounds, [1.0] * 3, leaves))
        objective(decoder, tokens, hidden).backward()
        return hidden.detach(), gradients

    healthy, poisoned = run(sound), run(torch.full_like(sound, float("nan")))
    others = [place for place in range(len(tokens)) if not bounds[1] <= place < bounds[2]]
    assert torch.equal(healthy[0][others], poisoned[0][others])
    assert poisoned[0][bounds[1] : bounds[2]].isnan().all()
    assert all(torch.equal(healthy[1][n], poisoned[1][n]) for n in (0, 2))
    assert not poisoned[1][1].isfinite().all()


def test_without_lora_the_base_answers_as_if_no_adapter_were_there(tmp_path: Path) -> None:
    decoder = load_model(make_checkpoint("qwen2 tied", tmp_path), torch.float32)
    tokens, offsets = packed()
    layout, weights = random_adapter(decoder, 4, ("all-linear",), seed=0)
    for _, b in layout.views(weights).values():
        b.zero_()
    with torch.no_grad():
        base = decoder(tokens, offsets, None)
        fresh = decoder(tokens, offsets, LoraBatch.build([0, len(tokens)], [1.0], [layout.leaves(weights, None)]))
    torch.testing.assert_close(base, fresh, rtol=0, atol=0)


def test_gradients_gather_over_launches_in_one_buffer(tmp_path: Path) -> None:
    decoder = load_model(make_checkpoint("qwen3 tied", tmp_path), torch.float32)
    tokens, offsets = packed()
    layout, weights = random_adapter(decoder, 4, ("all-linear",), seed=0)
    gradients = torch.zeros_like(weights)
    batch = LoraBatch.build([0, len(tokens)], [1.0], [layout.leaves(weights, gradients)])
    objective(decoder, tokens, decoder(tokens, offsets, batch)).backward()
    once = gradients.clone()
    objective(decoder, tokens, decoder(tokens, offsets, batch)).backward()
    torch.testing.assert_close(gradients, 2 * once, rtol=1e-6, atol=1e-6)


def test_bfloat16_adapters_gather_fp32_gradients_near_the_exact_ones(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3 untied", tmp_path)
    tokens, offsets = packed()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load_model(folder, dtype)
        layout, weights = random_adapter(decoder, 4, ("all-linear",), seed=0)
        gradients = torch.zeros_like(weights)
        batch = LoraBatch.build([0, len(tokens)], [1.0], [layout.leaves(weights.to(dtype), gradients)])
        objective(decoder, tokens, decoder(tokens, offsets, batch)).backward()
        results.append(gradients)
    exact, rounded = results
    assert rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.1 * exact.norm()
