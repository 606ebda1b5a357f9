"""PEFT folders out and in: peft and vLLM load what we write, and we refuse what is of another shape."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes, resolve_targets
from weft.actors.model import Decoder, load_model, save_model
from weft.actors.peft_folder import check_peft_folder, read_peft_folder, write_peft_folder

torch.set_num_threads(1)
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SHAPES = linear_shapes(MODEL)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    decoder, generator = Decoder(MODEL), torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    save_model(decoder, tmp_path / "base")
    return tmp_path / "base"


def _adapter(targets: tuple[str, ...] = ("all-linear",), rank: int = 3) -> tuple[SlabLayout, Tensor]:
    layout = SlabLayout.build(SHAPES, resolve_targets(SHAPES, targets), rank)
    return layout, 0.3 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj"), ("model.layers.1.self_attn.v_proj",)])
def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, targets: tuple[str, ...]) -> None:
    layout, flat = _adapter(targets)
    for _ in range(2):  # over an adapter that is there already
        write_peft_folder(tmp_path / "peft", layout, flat, 6.0, "base")
    assert torch.equal(read_peft_folder(tmp_path / "peft", layout, 6.0), flat)
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("targets", [("all-linear",), ("model.layers.1.self_attn.v_proj", "gate_proj")])
def test_peft_over_transformers_gives_the_same_logits(tmp_path: Path, base: Path, targets: tuple[str, ...]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    layout, flat = _adapter(targets)
    write_peft_folder(tmp_path / "peft", layout, flat, 6.0, str(base))
    tokens = torch.randint(0, 97, (11,), generator=torch.Generator().manual_seed(3))
    decoder = load_model(base, torch.float32)
    lora = LoraBatch.build([0, 11], [2.0], [layout.views(flat)])
    ours = decoder(tokens, [0, 11], lora) @ decoder.head.T
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(layout.entries)
    with torch.no_grad():
        theirs = model(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = decoder(tokens, [0, 11], None) @ decoder.head.T
    assert float((plain - ours).abs().max()) > 1e-2  # the adapter does something


def test_vllm_reads_every_tensor_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    layout, flat = _adapter()
    write_peft_folder(tmp_path, layout, flat, 6.0, "base")
    helper = PEFTHelper.from_local_dir(str(tmp_path), 128)
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    place = {"device": "cpu", "dtype": torch.float32}
    loaded = LoRAModel.from_local_checkpoint(str(tmp_path), expected, helper, lora_model_id=1, **place)
    assert set(loaded.loras) == set(layout.modules)
    for name, (a, b) in layout.views(flat).items():
        assert loaded.loras[name].scaling == 2.0
        torch.testing.assert_close(loaded.loras[name].lora_a, a)
        torch.testing.assert_close(loaded.loras[name].lora_b, b)


def test_an_adapter_of_another_shape_is_refused_by_tensor_and_shape(tmp_path: Path) -> None:
    layout, flat = _adapter()
    write_peft_folder(tmp_path, layout, flat, 6.0, "base")
    with pytest.raises(ValueError, match=r"r=3 there, rank=4 by the configuration"):
        check_peft_folder(tmp_path, _adapter(rank=4)[0], 6.0)
    with pytest.raises(ValueError, match=r"lora_alpha=6 there, alpha=8 by the configuration"):
        check_peft_folder(tmp_path, layout, 8.0)
    with pytest.raises(ValueError, match=r"proj.lora_A.weight is \[3, \d+\] there, no target"):
        check_peft_folder(tmp_path, _adapter(("q_proj",))[0], 6.0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: torch.zeros(31, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"PEFT folder {tmp_path}: tensor {name} is \[31, 3\] there, \[32, 3\] by"):
        read_peft_folder(tmp_path, layout, 6.0)
    del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is missing there, \[32, 3\] by the configuration"):
        read_peft_folder(tmp_path, layout, 6.0)


def test_a_folder_that_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    layout, flat = _adapter()
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        check_peft_folder(tmp_path / "nowhere", layout, 6.0)
    write_peft_folder(tmp_path, layout, flat, 6.0, "base")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for key, value in (
        ("use_rslora", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("bias", "all"),
        ("alora_invocation_tokens", [5]),
    ):
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"{key}=.*must be absent or"):
            check_peft_folder(tmp_path, layout, 6.0)
    path.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type='IA3': must be 'LORA'"):
        check_peft_folder(tmp_path, layout, 6.0)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_peft_folder(tmp_path, layout, 6.0)
    path.write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cut short or altered"):
        check_peft_folder(tmp_path, layout, 6.0)
    weights.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        check_peft_folder(tmp_path, layout, 6.0)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    layout, flat = _adapter()
    flat[5] = torch.nan
    write_peft_folder(tmp_path, layout, flat, 6.0, "base")
    with pytest.raises(ValueError, match="not finite"):
        read_peft_folder(tmp_path, layout, 6.0)


def test_a_folder_that_peft_itself_saved_is_a_warm_start(tmp_path: Path, base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    layout, _ = _adapter(("q_proj", "v_proj"))
    flat = read_peft_folder(tmp_path / "peft", layout, 6.0)
    state = dict(model.named_parameters())
    for name, (a, b) in layout.views(flat).items():
        assert torch.equal(a, state[f"base_model.model.{name}.lora_A.default.weight"])
        assert torch.equal(b, state[f"base_model.model.{name}.lora_B.default.weight"])


def test_an_adapter_of_a_base_that_peft_has_changed_is_refused_until_it_is_converted(tmp_path: Path, base: Path) -> None:
    """PiSSA begins with the largest directions of the base's own weights, and takes them out of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ("q_proj", "v_proj")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), init_lora_weights="pissa"))
    settings = model.peft_config["default"]
    settings.init_lora_weights = True
    model.save_pretrained(tmp_path / "first")  # as PEFT's documentation has it
    settings.init_lora_weights = "pissa"
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += 0.05 * torch.randn(weight.shape) * ("lora" in name)
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="init_lora_weights='pissa': must leave the base as it is"):
        check_peft_folder(tmp_path / "peft", _adapter(targets)[0], 6.0)

    tokens = torch.randint(0, 97, (11,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens[None]).logits[0]
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    layout, _ = _adapter(targets, rank=6)  # what was trained, less what was there at first
    flat, decoder = read_peft_folder(tmp_path / "converted", layout, 12.0), load_model(base, torch.float32)
    ours = decoder(tokens, [0, 11], LoraBatch.build([0, 11], [2.0], [layout.views(flat)])) @ decoder.head.T
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
