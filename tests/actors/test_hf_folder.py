"""A model folder that is not whole is refused before anything is built, by a message that names what is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from weft.actors.hf_folder import check_folder, read_config
from weft.actors.model import load_model

torch.set_num_threads(1)
CONFIG = Qwen3Config(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
UP = "model.layers.1.mlp.up_proj.weight"


def save(folder: Path, config: PreTrainedConfig = CONFIG, **saving: str) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **saving)
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save(tmp_path / "whole")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return save(tmp_path / "shards", max_shard_size="4KB")


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(folder: Path, *words: str) -> None:
    """check_folder and load_model both raise one ValueError with all these words."""
    for function in (check_folder, lambda path: load_model(path, torch.float32)):
        with pytest.raises(ValueError) as error:
            function(folder)
        missing = [word for word in words if word not in str(error.value)]
        assert not missing, f"{missing} not in: {error.value}"


def test_a_whole_folder_passes(whole: Path, shards: Path, tmp_path: Path) -> None:
    tied = save(tmp_path / "tied", LlamaConfig(**{**CONFIG.to_dict(), "model_type": "llama", "tie_word_embeddings": True}))
    for folder in (whole, shards, tied, str(whole)):
        check_folder(folder)
    assert read_config(whole)["model_type"] == "qwen3"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "must be a folder")


def test_a_folder_without_config_is_refused(whole: Path) -> None:
    (whole / "config.json").unlink()
    refused(whole, "whole/config.json", "must be there")


@pytest.mark.parametrize(("text", "words"), [("{", "must be JSON"), ("[1]", "must be a JSON object, not list")])
def test_a_config_that_is_no_json_object_is_refused(whole: Path, text: str, words: str) -> None:
    (whole / "config.json").write_text(text)
    refused(whole, "config.json", words)


def test_a_folder_without_weights_is_refused(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    refused(whole, str(whole), "has no weights", "model.safetensors")
    (whole / "pytorch_model.bin").write_bytes(b"")
    refused(whole, "pytorch_model.bin is of another format")


def test_a_missing_shard_is_refused(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    refused(shards, str(shards), gone.name, "missing", "model.safetensors.index.json names it")


def test_an_index_without_a_map_is_refused(shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(shards, "model.safetensors.index.json", "weight_map")


def test_a_missing_tensor_is_refused(whole: Path) -> None:
    change_tensors(whole, lambda tensors: tensors.pop(UP))
    refused(whole, str(whole), UP, "[20, 12]", "missing")


def test_a_tensor_of_another_shape_is_refused(whole: Path) -> None:
    change_tensors(whole, lambda tensors: tensors.update({UP: torch.zeros(20, 11)}))
    refused(whole, "model.safetensors", UP, "is [20, 11] there", "must be [20, 12]")


def test_a_config_of_another_size_is_refused(whole: Path) -> None:
    change_config(whole, vocab_size=32)
    refused(whole, "model.embed_tokens.weight", "is [31, 12] there", "must be [32, 12]")


def test_a_tensor_without_place_is_refused(whole: Path) -> None:
    change_config(whole, model_type="llama", architectures=["LlamaForCausalLM"])
    refused(whole, "k_norm.weight", "has no place")


def test_a_layer_too_many_is_refused(whole: Path) -> None:
    change_config(whole, num_hidden_layers=1)
    refused(whole, "model.layers.1.", "has no place")


def test_weights_that_are_no_floats_are_refused(whole: Path) -> None:
    change_tensors(whole, lambda tensors: tensors.update({UP: torch.zeros(20, 12, dtype=torch.int8)}))
    refused(whole, "model.safetensors", UP, "I8", "F32")


@pytest.mark.parametrize("cut", [0, 5, -7])
def test_a_file_cut_short_is_refused(whole: Path, cut: int) -> None:
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(whole, str(file), "must be a whole safetensors file")


def test_an_unsupported_architecture_is_refused_with_those_supported(whole: Path) -> None:
    change_config(whole, model_type="gemma3", architectures=["Gemma3ForCausalLM"])
    refused(whole, "config.json", "gemma3", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


def test_a_head_stored_beside_a_tied_embedding_is_not_read(whole: Path) -> None:
    change_config(whole, tie_word_embeddings=True)
    decoder = load_model(whole, torch.float32)
    assert decoder.head is decoder.embedding


def test_a_message_is_one_line(whole: Path) -> None:
    change_config(whole, hidden_size=-1)
    with pytest.raises(ValueError, match=re.compile(r"^[^\n]*hidden_size=-1: must be a whole number above 0$")):
        check_folder(whole)
