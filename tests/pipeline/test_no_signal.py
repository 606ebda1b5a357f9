"""Of each step it is said which share of its groups taught nothing: in every sink, counted in what was trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.configs.schema import AdapterConfig, LossConfig
from weft.pipeline.batch import Ready, figures, make_batch
from weft.pipeline.events import StepTaken
from weft.pipeline.history import History
from weft.pipeline.metrics import Metrics
from weft.pipeline.report import write_report
from weft.pipeline.summary import summarize
from weft.transport.messages import UNSAMPLED, AdapterRef, Group, Sample

REF = AdapterRef("a", 0, 3)
SHARES = {"none": 0, "quarter": 1, "half": 2, "all": 4}  # of four groups


def share(rewards, loss=None):
    """no_signal of a step with these rewards."""
    tokens, versions = np.array([1, 2], np.int32), np.array([UNSAMPLED, 3], np.int32)
    rows = [[Sample(tokens, versions, np.zeros(2, np.float32), reward) for reward in row] for row in rewards]
    groups = [Group(REF, g, tuple(row)) for g, row in enumerate(rows)]
    size = len(rewards[0])
    config = AdapterConfig(name="a", batch_size=size * len(rewards), group_size=size, loss=loss or LossConfig())
    return Ready(make_batch(config, REF, groups), figures(groups), (0,) * len(groups), {0: 1}, ()).no_signal


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rewards", "advantage", "expected"),
    [
        *(([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], name, 0.75) for name in ("grpo", "dr_grpo", "rloo")),
        # Groups that agree are compared with the whole batch, whose mean is 0.5.
        ([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], "reinforce", 0.25),
        ([[0.5, 0.5], [0.5, 0.5]], "reinforce", 1.0),
        ([[0.0, 1.0], [1.0, 0.0]], "grpo", 0.0),
    ],
)
def test_a_group_has_no_signal_where_each_of_its_advantages_is_zero(rewards, advantage, expected, kl):
    assert share(rewards, LossConfig(advantage=advantage, kl_coefficient=kl)) == expected


def test_under_cross_entropy_a_group_has_none_where_nothing_was_rewarded():
    assert share([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], LossConfig(name="cross_entropy")) == 0.5


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=6))
def test_it_is_the_share_of_groups_whose_siblings_agree(rewards):
    assert share(rewards) == sum(len(set(row)) == 1 for row in rewards) / len(rewards)


def test_each_step_of_each_adapter_says_its_own(simulation, memory_folder):
    number = itertools.count()
    configs = [simulation.adapter_config(name, batch_size=8, group_size=2) for name in SHARES]
    world = simulation.World(
        random.Random(0), reward=lambda name, prompt: 0.5 if prompt % 4 < SHARES[name] else float(next(number))
    )
    steps = [event for event in simulation.simulate(world, memory_folder, configs).events if isinstance(event, StepTaken)]
    assert len(steps) == sum(config.num_steps for config in configs)
    assert [step.no_signal for step in steps] == [SHARES[step.adapter] / 4 for step in steps]


def test_it_is_in_the_line_the_gauges_and_the_report(tmp_path, synthetic_run):
    run, gauges = synthetic_run(num_steps=3), []
    with Metrics(tmp_path, lambda name, value, tags: gauges.append((name, value))) as metrics:
        for event in run.events():
            metrics(dataclasses.replace(event, no_signal=0.375) if isinstance(event, StepTaken) else event)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["reward/no_signal"] for line in lines} == {0.375}
    assert ("weft_reward_no_signal", 0.375) in gauges
    history = History.read(tmp_path)
    page = write_report(tmp_path, history, summarize(run.statistics(), history, 1.0), {"adapters": []}).read_text()
    assert "<th>no signal</th>" in page and "<td>0.375</td>" in page


@pytest.mark.parametrize(("value", "own"), [(0.5, True), (None, True), ("half", False), ([0.5], False)])
def test_a_line_that_says_anything_else_there_is_passed_over_and_one_that_says_nothing_is_not(
    tmp_path, synthetic_run, value, own
):
    run = synthetic_run(num_steps=2)
    with Metrics(tmp_path) as metrics:
        for event in run.events():
            metrics(event)
    path = tmp_path / "metrics.jsonl"
    first, *others = [json.loads(text) for text in path.read_text().splitlines()]
    for line in others:  # as of an older run
        del line["reward/no_signal"]
    path.write_text("".join(json.dumps(line) + "\n" for line in ({**first, "reward/no_signal": value}, *others)))
    assert (History.read(tmp_path).passed_over == []) is own
