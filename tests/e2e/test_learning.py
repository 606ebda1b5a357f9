"""A whole run learns, keeps its bounds, and leaves adapters that others can load."""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from weft.actors.cluster import Cluster
from weft.configs.schema import ClusterConfig

STEPS = 20
NAMES = ("calculator-strict", "calculator-cispo", "letters")
METRICS = {f"ray_weft_{name}" for name in ("reward_mean", "staleness_max", "logprob_diff", "eval_reward", "step")}


@pytest.fixture(scope="module")
def run(weft: Any, adapters: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = weft(tmp_path_factory.mktemp("learning") / "run", adapters, "adapters=three", "cluster.dashboard_port=0")
    assert run.wait() == 0, run.output()[-4000:]
    return run


def prometheus_text(folder: Path) -> str:
    """What Ray's nodes show to Prometheus now, found as Prometheus finds it."""
    ray_folder = Path(tempfile.gettempdir()) / f"weft-ray-{Cluster(ClusterConfig(), str(folder)).run_id}"
    try:
        found = json.loads((ray_folder / "prom_metrics_service_discovery.json").read_text())
        targets = [target for group in found for target in group["targets"]]
        return "".join(urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode() for target in targets)
    except (OSError, HTTPException, ValueError):  # not yet there, or being written
        return ""


def metrics_of(name: str, text: str) -> set[str]:
    """The names of what is there of this adapter."""
    lines = [line for line in text.splitlines() if line.startswith("ray_weft_")]
    return {line.split("{")[0] for line in lines if f'adapter="{name}"' in line}


def test_each_adapters_metrics_stand_together_in_rays_prometheus_text_however_old_some_are(
    weft: Any, adapters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """logprob_diff, of which not every step has one, was last set some steps ago. The run has many, and need not end."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    long = ("every.num_steps=300", "every.batch_size=32", "every.eval_prompts=8")
    run = weft(tmp_path / "run", adapters, "adapters=three", *long, "cluster.dashboard_port=0")
    shown = dict.fromkeys(NAMES, set[str]())  # of each adapter, the most that stood there at once

    def all_stand() -> bool:
        text = prometheus_text(run.folder)
        shown.update({name: max(before, metrics_of(name, text), key=len) for name, before in shown.items()})
        return all(names >= METRICS for names in shown.values())

    run.wait_until(all_stand, "every metric of every adapter")
    run.process.terminate()
    assert run.wait() == 130, run.output()[-4000:]


def test_a_users_file_and_reward_a_sweep_and_a_warm_start_from_an_earlier_run(run: Any, weft: Any, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"Say {number}", "wanted": str(number)} for number in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = weft(
        Path("out"), "environment=jsonl", "environment.settings.path=questions.jsonl",
        "environment.settings.reward=rewards.digits", "sweep.learning_rate=[1e-3,4e-3]",
        f"template.lora.warm_start={run.summary()['adapters']['letters']['peft_path']}", "template.lora.rank=4",
        "template.lora.alpha=8", "every.num_steps=2", "every.batch_size=16", "every.group_size=4", "every.eval_prompts=8",
        "every.sampling.max_tokens=8", "cluster.dashboard_port=0", cwd=tmp_path,
    )  # fmt: skip
    assert own.wait() == 0, own.output()[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["adapters"]) == 2
    (warned,) = [warning for warning in summary["warnings"] if "questions.jsonl has " in warning]
    assert "fewer than eval_prompts=8" in warned and warned in own.output()
    assert all(adapter["state"] == "finished" and adapter["version"] == 2 for adapter in summary["adapters"].values())
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(step["logprob_diff"] for step in steps if "logprob_diff" in step) < 1e-3
    begun = {name: weights(tmp_path / "out" / "adapters" / name) for name in summary["adapters"]}
    before = weights(Path(run.summary()["adapters"]["letters"]["peft_path"]))
    moved = sorted(float((after - before).abs().mean()) for after in begun.values())
    assert 0 < moved[0] < moved[1] < before.abs().mean(), "both went on from there, each at its own learning rate"


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


REWARDS = """
import random, time

def digits(completion, row):
    time.sleep(0.01)  # blocks its own thread
    return sum(character.isdigit() for character in completion) / 8 + random.random() / 8  # no two alike: each step teaches
"""


def test_held_out_success_rises(run: Any) -> None:
    for name, adapter in run.summary()["adapters"].items():
        assert adapter["state"] == "finished"
        assert adapter["version"] == STEPS
        assert adapter["eval_base"] <= 0.5, name
        assert adapter["eval_final"] > 0.7, (name, adapter["eval_base"], adapter["eval_final"])


def test_no_adapter_exceeds_its_bound_and_asynchrony_is_real(run: Any) -> None:
    summary = run.summary()
    assert summary["staleness_violations"] == 0
    seen = {name: adapter["max_staleness_seen"] for name, adapter in summary["adapters"].items()}
    assert seen["calculator-strict"] == 0
    assert 1 <= seen["calculator-cispo"] <= 2
    assert seen["letters"] == 1


def test_trainer_and_sampler_agree_on_every_log_probability(run: Any) -> None:
    differences = [step["logprob_diff"] for step in run.steps() if "logprob_diff" in step]
    first = [step["logprob_diff"] for step in run.steps() if step["step"] == 1]
    assert len(first) == 3
    assert max(differences) < 1e-3


def test_samples_of_every_step_and_evaluation_can_be_read(run: Any) -> None:
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    bounds = {name: adapter["max_staleness"] for name, adapter in run.summary()["adapters"].items()}
    for name in NAMES:
        own = [line for line in lines if line["adapter"] == name]
        trained = [line for line in own if not line["held_out"]]
        assert {line["step"] for line in trained} == set(range(1, STEPS + 1))
        assert all(0 <= line["step"] - 1 - version <= bounds[name] for line in trained for version in line["versions"])
        held_out = [(line["step"], line["prompt_index"]) for line in own if line["held_out"]]
        assert held_out == [(step, index) for step in (0, STEPS) for index in range(4)]
        for line in own:
            roles = [message["role"] for message in line["completion"]]
            assert roles.count("assistant") == line["turns"] and line["prompt"][-1]["role"] == "user"
            if name == "calculator-strict" and line["reward"] == 1:
                assert "FinalAnswer" in line["completion"][-1]["content"], "what was rewarded"
    assert any(message["role"] == "tool" and message["content"] for line in lines for message in line["completion"])
    assert max(len(line) for line in (run.folder / "events.jsonl").read_text().splitlines()) < 4000


def test_every_promised_number_is_in_the_summary(run: Any) -> None:
    summary = run.summary()
    assert summary["wall_seconds"] > 0
    for adapter in summary["adapters"].values():
        assert {"state", "version", "eval_base", "eval_final", "max_staleness", "max_staleness_seen"} <= adapter.keys()
        assert adapter["tokens_trained"] > 0
        assert adapter["tokens_sampled"] > 0
        assert Path(adapter["peft_path"]).is_dir()
    assert summary["work"]["sampler_seconds"] > 0 and summary["work"]["trainer_seconds"] > 0
    sampler, relay = summary["members"]["samplers"]["sampler-0"], summary["members"]["sync"]["param-sync"]
    assert 0 < sampler["cached_tokens"] < sampler["prompt_tokens"] and relay["bytes_sent"] > 0
    assert sampler["installs"] >= 3 * (STEPS + 1)


def test_the_folder_holds_the_report_the_plots_and_tensorboard(run: Any) -> None:
    report = (run.folder / "report.html").read_text()
    assert "calculator-cispo" in report
    assert 'src="http' not in report
    assert list(run.folder.glob("**/*.png"))
    assert list(run.folder.glob("tensorboard/*/events.out.tfevents.*"))
    assert len(run.steps()) == 3 * STEPS
    trace = json.loads((run.folder / "trace.json").read_text())
    assert sum(record["name"] == "training" for record in trace) == 3 * STEPS


def test_every_process_says_when_it_is_ready(run: Any) -> None:
    said = [line.partition(" is ready after ")[0] for line in run.output().splitlines() if " is ready after " in line]
    assert sorted(said) == ["param-sync", "sampler-0", "trainer-0"]


def test_the_same_command_again_says_that_it_has_finished(run: Any, weft: Any, adapters: str) -> None:
    before = (run.folder / "summary.json").read_bytes()
    again = weft(run.folder, adapters, "adapters=three", "cluster.dashboard_port=0")
    assert again.wait() == 0
    assert "finished" in again.output()
    assert (run.folder / "summary.json").read_bytes() == before


def test_peft_folders_load_in_peft_and_in_vllm_with_the_same_log_probabilities(run: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from weft.actors.base_model import tiny_path

    folders = {name: adapter["peft_path"] for name, adapter in run.summary()["adapters"].items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "What is 12 + 7?"}], add_generation_prompt=True)
    tokens = list(tokens["input_ids"] if not isinstance(tokens, list) else tokens)
    base = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    theirs = {}
    for name, folder in folders.items():
        model = PeftModel.from_pretrained(base, folder)
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        theirs[name] = [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
        base = model.unload()
    engines = _in_vllm(tiny_path(), folders, tokens)
    for name in folders:
        difference = torch.tensor(theirs[name]) - torch.tensor(engines[name])
        assert difference.abs().mean() < 1e-3
    assert theirs["letters"] != theirs["calculator-strict"]


def _in_vllm(model: str, folders: dict[str, str], tokens: list[int]) -> dict[str, list[float]]:
    """Prompt log-probabilities by vLLM's own LoRARequest from disk, in a process that ends with the engine."""
    import os
    import sys

    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-c", VLLM_SCRIPT, json.dumps([model, folders, tokens])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, list[float]] = json.loads(done.stdout.strip().split("\n")[-1])
    return answer


VLLM_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
model, folders, tokens = json.loads(sys.argv[1])
llm = LLM(model=model, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=16, max_loras=4, max_model_len=256)
found = {}
for number, (name, folder) in enumerate(folders.items(), 1):
    request = LoRARequest(name, number, folder)
    output, = llm.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=request)
    found[name] = [step[token].logprob for token, step in zip(tokens[1:], output.prompt_logprobs[1:])]
print(json.dumps(found))
"""
