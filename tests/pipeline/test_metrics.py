"""What is measured reaches every sink under the field's names, and survives a crash and a resume."""

import dataclasses
import json
import math
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weft.pipeline.events import Evaluated, Phase, PhaseChanged, StepTaken
from weft.pipeline.history import History
from weft.pipeline.metrics import Metrics, gauge_name


def step(version: int, reward: float = 0.5, lineage: int = 0, time: float | None = None, **changes: object) -> StepTaken:
    made = StepTaken(
        float(version) if time is None else time, "a", lineage, version, 9, reward, 0.1, (0, 1), 1, 16, 1.5, 0.0, 100, 200,
        1.0, 0.5, 0.25, 0.25, {"loss": 0.25, "grad_norm": 0.5, "logprob_diff": 2e-5}, {"tools": 2.0},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_every_step_is_one_line_with_the_names_of_the_field(tmp_path, synthetic_run):
    run = synthetic_run(num_steps=4)
    with Metrics(tmp_path) as metrics:
        events = list(run.events())
        for event in events:
            metrics(event)
    written = lines(tmp_path / "metrics.jsonl")
    assert len(written) == sum(isinstance(event, StepTaken) for event in events) == 8 * 4
    named = {"adapter", "lineage", "step", "reward/mean", "staleness/max", "loss", "grad_norm", "kl", "entropy", "logprob_diff"}
    assert all(named <= line.keys() for line in written)
    assert len(lines(tmp_path / "events.jsonl")) == 1 + len(events) - len(written)


def test_times_of_a_step_add_up(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics(step(1))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["time/step"] == 2.0 == sum(line[f"time/{part}"] for part in ("rollout", "queue", "train", "sync"))
    assert line["tokens/per_second"] == 50.0
    assert line["staleness/groups"] == [0, 1] and line["staleness/max"] == 1 and line["staleness/mean"] == 0.5
    assert line["env/tools"] == 2.0


def test_numbers_that_are_not_finite_are_null_in_the_line_and_no_gauge(tmp_path):
    seen = {}
    with Metrics(tmp_path, record=lambda name, value, tags: seen.update({name: value})) as metrics:
        metrics(step(1, metrics={"loss": math.nan, "grad_norm": math.inf, "kl": 0.5}))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["grad_norm"] is None and line["kl"] == 0.5
    assert "weft_loss" not in seen and seen["weft_kl"] == 0.5


def test_gauges_have_prometheus_names_and_the_same_tags_each_time(tmp_path, synthetic_run):
    run, tags_of = synthetic_run(num_steps=2), {}
    with Metrics(
        tmp_path, lambda name, value, tags: tags_of.setdefault(name, set()).add(tuple(tags)), run.statistics
    ) as metrics:
        for event in run.events():
            metrics(event)
    assert {"weft_reward_mean", "weft_staleness_max", "weft_tokens_trained", "weft_eval_reward", "weft_step"} <= tags_of.keys()
    assert tags_of["weft_reward_mean"] == {("adapter",)} and tags_of["weft_pool_busy"] == {("pool",)}
    assert all(len(tags) == 1 for tags in tags_of.values())
    assert gauge_name("logprob_diff") == "weft_logprob_diff"


def test_a_resumed_run_continues_its_files_and_the_last_line_of_a_step_counts(tmp_path):
    with Metrics(tmp_path) as metrics:
        for version in (1, 2, 3):
            metrics(step(version, reward=0.1 * version))
    with Metrics(tmp_path) as metrics:
        assert metrics.session == 1
        for version in (2, 3, 4):
            metrics(step(version, reward=0.5 + 0.1 * version, lineage=1))
    adapter = History.read(tmp_path).adapters["a"]
    assert [line["step"] for line in adapter.steps] == [1, 2, 3, 4]
    assert [line["lineage"] for line in adapter.steps] == [0, 1, 1, 1]
    assert sorted(line["step"] for line in adapter.redone) == [2, 3]
    assert len(lines(tmp_path / "metrics.jsonl")) == 6, "nothing is taken from the file"


def test_sessions_follow_each_other_in_time(tmp_path):
    for _ in range(2):
        with Metrics(tmp_path) as metrics:
            metrics(PhaseChanged(0.0, "a", Phase.SAMPLING))
            metrics(PhaseChanged(4.0, "a", Phase.TRAINING))
            metrics(Evaluated(5.0, "a", 0, False, 0.5, 8))
    history = History.read(tmp_path)
    assert history.sessions == [0.0, 5.0] and history.seconds == 10.0
    assert [(i.phase.value, i.start, i.end) for i in history.phases] == [
        ("sampling", 0.0, 4.0), ("training", 4.0, 5.0), ("sampling", 5.0, 9.0), ("training", 9.0, 10.0),
    ]  # fmt: skip


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics(step(1))
        metrics(step(2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with Metrics(tmp_path) as metrics:
        metrics(step(2, reward=0.75))
    adapter = History.read(tmp_path).adapters["a"]
    assert [line["reward/mean"] for line in adapter.steps] == [0.5, 0.75]


def test_each_line_is_on_disk_before_the_next_event(tmp_path):
    metrics = Metrics(tmp_path)
    for version in (1, 2):
        metrics(step(version))
        assert len(lines(tmp_path / "metrics.jsonl")) == version
    metrics.close()


def test_tensorboard_reads_one_folder_an_adapter_and_forgets_what_was_undone(tmp_path):
    for lineage, versions in ((0, (1, 2, 3)), (1, (2, 3))):
        with Metrics(tmp_path) as metrics:
            for version in versions:
                metrics(step(version, reward=lineage + 0.1 * version, lineage=lineage))
    read = EventAccumulator(str(tmp_path / "tensorboard" / "a"))
    read.Reload()
    assert {"reward/mean", "loss", "staleness/max"} <= set(read.Tags()["scalars"])
    seen = [(event.step, event.value) for event in read.Scalars("reward/mean")]
    assert seen == [(1, pytest.approx(0.1)), (2, pytest.approx(1.2)), (3, pytest.approx(1.3))]


def test_metrics_need_no_torch_and_no_tensorflow():
    import subprocess

    code = "import sys, weft.pipeline.metrics, weft.pipeline.table, weft.pipeline.report; print(sorted(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "tensorflow", "ray", "vllm", "zmq") if f"'{name}'" in told]
