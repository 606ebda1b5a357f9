"""Laws of the shipped base model and of the script that makes it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from weft.actors.base_model import tiny_path
from weft.actors.base_model.demonstrations import TASKS, make
from weft.actors.base_model.measure import measure
from weft.actors.base_model.pretrain import Data, Settings, encode, make_model, pretrain
from weft.actors.base_model.tokenizer import END_OF_TURN, make_tokenizer, render
from weft.actors.environments.calculator import TOOLS
from weft.actors.environments.load import load_environment

SMALL = Settings(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
SMOKE = dataclasses.replace(SMALL, demonstrations=180, batch_size=16, steps=4, warmup=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def demonstrations():
    return make(seed=5, count=900)


def test_the_shipped_folder_is_a_small_qwen3_of_plain_files(model: object) -> None:
    files = list(Path(tiny_path()).iterdir())
    assert sum(file.stat().st_size for file in files) < 6 * 2**20
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    weights = load_file(Path(tiny_path()) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_shipped_folder_is_of_the_shape_that_the_script_makes(model: Qwen3ForCausalLM, tokenizer: object) -> None:
    made = make_tokenizer()
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(made.backend_tokenizer.to_str())
    assert tokenizer.chat_template == made.chat_template
    fresh = make_model(Settings(), made)
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert model.generation_config.eos_token_id == fresh.generation_config.eos_token_id
    assert tokenizer.eos_token == END_OF_TURN


@settings(max_examples=50)
@given(text=st.text(max_size=80))
def test_any_text_survives_the_tokenizer(tokenizer: object, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_letters_of_a_word_are_tokens_of_their_own(tokenizer: object) -> None:
    assert tokenizer.tokenize("4071") == ["4", "0", "7", "1"]
    assert tokenizer.tokenize("the") == ["t", "h", "e"]


def test_the_template_renders_tools_calls_and_outputs(tokenizer: object) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "<tool_call>x</tool_call>"},
        {"role": "tool", "content": "55"},
    ]
    text = render(tokenizer, messages, TOOLS, True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n" + json.dumps(TOOLS[0]) + "\n" + json.dumps(TOOLS[1]))
    assert text.endswith(
        "<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>x</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n55\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(tokenizer, messages[:2], (), False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
    )


def test_what_is_rendered_is_a_prefix_of_what_is_rendered_with_more_turns(tokenizer: object, demonstrations: list) -> None:
    for demonstration in demonstrations[::20]:
        messages = [*demonstration.prompt.messages, *demonstration.turns]
        whole = render(tokenizer, messages, demonstration.prompt.tools, False)
        for count in range(len(demonstration.prompt.messages), len(messages)):
            assert whole.startswith(render(tokenizer, messages[:count], demonstration.prompt.tools, False))


def test_prompts_and_demonstrations_are_short(tokenizer: object, demonstrations: list) -> None:
    data = encode(demonstrations, tokenizer)
    assert np.diff(data.offsets).max() <= 96
    for task in TASKS:
        environment = load_environment(task.target, task.settings)
        texts = [environment.prompt(i, True) for i in range(50)]
        assert max(len(tokenizer.encode(render(tokenizer, p.messages, p.tools, True))) for p in texts) <= 45, task.name


def test_demonstrations_are_of_mixed_quality_in_every_task(demonstrations: list) -> None:
    assert {demonstration.task for demonstration in demonstrations} == {task.name for task in TASKS}
    for task in TASKS:
        rewards = [d.reward for d in demonstrations if d.task == task.name]
        assert 0.15 < np.mean(rewards) < 0.6, task.name
        assert abs(sum(weight for weight, _ in task.modes) - 1) < 1e-9


def test_no_demonstration_has_a_held_out_prompt(demonstrations: list) -> None:
    for task in TASKS:
        environment = load_environment(task.target, {**task.settings, **({} if task.target == "jsonl" else {"seed": 1})})
        held_out = {json.dumps(list(environment.prompt(i, True).messages)) for i in range(300)}
        seen = {json.dumps(list(d.prompt.messages)) for d in demonstrations if d.task == task.name}
        assert not held_out & seen, task.name


def test_the_assistants_tokens_alone_have_a_loss(tokenizer: object, demonstrations: list) -> None:
    data = encode(demonstrations[:200], tokenizer)
    for row, demonstration in enumerate(demonstrations[:200]):
        span = slice(data.offsets[row], data.offsets[row + 1])
        said = tokenizer.decode(data.tokens[span][data.mask[span]].tolist())
        assert said == "".join(t["content"] + END_OF_TURN for t in demonstration.turns if t["role"] == "assistant")


def test_saved_data_are_the_same_when_loaded(tmp_path: Path, tokenizer: object, demonstrations: list) -> None:
    data = encode(demonstrations[:50], tokenizer)
    data.save(tmp_path / "data.npz")
    loaded = Data.load(tmp_path / "data.npz")
    for name in ("tokens", "mask", "offsets"):
        np.testing.assert_array_equal(getattr(data, name), getattr(loaded, name))


def test_the_base_succeeds_sometimes_at_every_task(model: object, tokenizer: object) -> None:
    torch.manual_seed(0)
    for task in TASKS:
        success = measure(model, tokenizer, load_environment(task.target, task.settings), episodes=200)
        assert 0.2 < success.reward < 0.5, task.name
        assert success.longest <= 20 and success.prompt_tokens <= 40, task.name


def test_pretraining_makes_a_folder_that_loads_and_repeats_itself(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tmp_path / name, SMOKE, seed, "cpu")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = render(tokenizer, [{"role": "user", "content": "Calculate 2 + 3."}], (), True)
    logits = loaded(torch.tensor([tokenizer.encode(text)])).logits
    assert logits.shape[-1] == loaded.config.vocab_size and torch.isfinite(logits).all()


def test_pretraining_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pretrain(tmp_path / "a", dataclasses.replace(SMOKE, steps=60, warmup=5, learning_rate=1e-2), 0, "cpu")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.6 * losses[0]
