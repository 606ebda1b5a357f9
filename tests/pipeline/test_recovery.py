"""Runs that are killed and started again, in virtual time: they end as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from dataclasses import replace

import pytest

from weft.pipeline.checkpoint import replace_folder
from weft.pipeline.events import AdapterFailed, Evaluated, Phase, StepTaken, Warned
from weft.pipeline.recovery import goes_on


def killed_at(simulation, world, folder, configs, seconds):
    """Run for `seconds`, or to the end. Pools are fresh, as after the death of everything; the disk is what it was."""
    world.acknowledged.clear()
    world.running.clear()
    world.rollouts.clear()

    async def main():
        simulated = simulation.Simulation(world, folder)
        try:
            async with asyncio.timeout(seconds):
                return await simulated.run(configs)
        except TimeoutError:
            return simulated.events

    return simulation.run_virtual(main)


def digests(folder, configs):
    """What became of each adapter."""
    return {
        config.name: json.loads((folder / "adapters" / config.name / "adapter.json").read_text())["digest"]
        for config in configs
    }


@pytest.mark.parametrize("seed", range(30))
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(simulation, memory_folder, seed):
    world, configs = simulation.random_world(seed)
    whole = simulation.simulate(world, memory_folder / "whole", configs)
    chance = random.Random(seed)
    world, _ = simulation.random_world(seed)
    pace = whole.statistics.time / 3
    for _ in range(4):
        killed_at(simulation, world, memory_folder / "cut", configs, chance.uniform(0, pace))
    outcome = killed_at(simulation, world, memory_folder / "cut", configs, None)
    for config in configs:
        adapter = outcome.statistics.adapters[config.name]
        assert (adapter.phase, adapter.version, len(adapter.rewards)) == (Phase.FINISHED, config.num_steps, config.num_steps)
        assert adapter.max_staleness_seen <= config.max_staleness
        assert (adapter.eval_base is None) == (adapter.eval_final is None) == (config.eval_prompts == 0)
        assert adapter.tokens_sampled == config.num_steps * config.batch_size * 2
    assert digests(memory_folder / "cut", configs) == digests(memory_folder / "whole", configs)


def test_a_resumed_run_goes_on_from_its_checkpoint_under_a_new_lineage(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=12, eval_prompts=4)
    world = simulation.World(random.Random(0), spread=False)
    events = killed_at(simulation, world, memory_folder, [config], 10.0)
    reached = max(event.version for event in events if isinstance(event, StepTaken))
    outcome = killed_at(simulation, world, memory_folder, [config], None)
    steps = [event for event in outcome.events if isinstance(event, StepTaken)]
    assert {step.lineage for step in steps} == {1}
    assert steps[0].version == reached // 2 * 2 + 1  # a checkpoint every second step
    assert [event.final for event in outcome.events if isinstance(event, Evaluated)] == [True]  # eval_base is known
    assert outcome.statistics.adapters["a"].eval_base is not None


def test_a_finished_adapter_is_not_trained_again_and_its_entry_is_kept(simulation, memory_folder):
    configs = [simulation.adapter_config("a", eval_prompts=3), simulation.adapter_config("b", num_steps=40)]
    first = killed_at(simulation, simulation.World(random.Random(0)), memory_folder, configs[:1], None)
    second = killed_at(simulation, simulation.World(random.Random(1)), memory_folder, configs, None)
    kept, before = second.statistics.adapters["a"], first.statistics.adapters["a"]
    assert replace(kept, joined=0.0, ended=0.0, staleness=0, installed=0, groups_in_flight=0) == replace(
        before, joined=0.0, ended=0.0, staleness=0, installed=0, groups_in_flight=0
    )
    assert not [event for event in second.events if isinstance(event, StepTaken) and event.adapter == "a"]


def test_trainers_are_told_how_many_adapters_they_are_for_and_those_that_have_ended_are_none(simulation, memory_folder):
    """So that the last few of a run, resumed or rolled back, are shared out among all trainers."""

    async def beside(simulated):
        await asyncio.sleep(5.0)
        assert world.expected == {"b": 2, "c": 2}, "a has finished in the first run"
        await simulated.pipeline.leave("b")
        await simulated.trainers.process.die()

    a, b, c = (simulation.adapter_config(name, num_steps=steps) for name, steps in (("a", 6), ("b", 60), ("c", 60)))
    killed_at(simulation, simulation.World(random.Random(0)), memory_folder, [a], None)
    world = simulation.World(random.Random(1))
    outcome = simulation.simulate(world, memory_folder, [a, b, c], beside)
    assert outcome.statistics.adapters["c"].rollbacks == 1
    assert world.expected == {"b": 2, "c": 1}, "b has left in this one"


def test_an_exported_folder_that_a_kill_left_aside_is_in_its_place_again(simulation, memory_folder):
    config = simulation.adapter_config("a")
    killed_at(simulation, simulation.World(random.Random(0)), memory_folder, [config], None)
    final, written = memory_folder / "adapters" / "a", memory_folder / "adapters" / ".a.writing"
    exported = digests(memory_folder, [config])
    written.mkdir()
    real = os.replace

    def half_way(source, target):
        if source == written:
            raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", half_way)
        replace_folder(written, final)
    assert not final.exists()
    outcome = killed_at(simulation, simulation.World(random.Random(0)), memory_folder, [config], None)
    assert outcome.statistics.adapters["a"].peft_path == str(final) and digests(memory_folder, [config]) == exported


def test_a_finished_adapter_goes_on_when_it_is_given_more_steps(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=4, eval_prompts=3)
    world = simulation.World(random.Random(0))
    killed_at(simulation, world, memory_folder, [config], None)
    outcome = killed_at(simulation, world, memory_folder, [replace(config, num_steps=7)], None)
    assert [event.version for event in outcome.events if isinstance(event, StepTaken)] == [5, 6, 7]
    assert len(world.trained["a"]) == 7
    assert [event.version for event in outcome.events if isinstance(event, Evaluated)] == [7]


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=10)
    world = simulation.World(random.Random(0), spread=False)
    killed_at(simulation, world, memory_folder, [config], 12.0)
    complete = sorted(path for path in (memory_folder / "checkpoints" / "a").iterdir() if path.name.startswith("00000-"))
    assert len(complete) == 2
    (complete[-1] / "weights.json").write_bytes(b"{")
    outcome = killed_at(simulation, world, memory_folder, [config], None)
    (warning,) = [event for event in outcome.events if isinstance(event, Warned)]
    assert warning.adapter == "a" and str(complete[-1]) in warning.message
    first = next(event for event in outcome.events if isinstance(event, StepTaken))
    assert first.version == int(complete[0].name.split("-")[1]) + 1
    assert outcome.statistics.adapters["a"].phase is Phase.FINISHED


def test_an_adapter_whose_checkpoints_are_all_damaged_fails_alone_and_none_is_touched(simulation, memory_folder):
    configs = [simulation.adapter_config(name, num_steps=6) for name in ("a", "b")]
    world = simulation.World(random.Random(0), spread=False)
    killed_at(simulation, world, memory_folder, configs, 8.0)
    damaged = list((memory_folder / "checkpoints" / "a").glob("00000-*"))
    for folder in damaged:
        (folder / "manifest.json").unlink()
    outcome = killed_at(simulation, world, memory_folder, configs, None)
    (failure,) = [event for event in outcome.events if isinstance(event, AdapterFailed)]
    assert failure.adapter == "a" and "no checkpoint is whole" in failure.reason
    assert all(folder.is_dir() and str(folder) in failure.reason for folder in damaged), "whoever can mend them still can"
    assert outcome.statistics.adapters["b"].phase is Phase.FINISHED


def test_another_configuration_is_refused_before_any_pool_is_asked(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=4)
    killed_at(simulation, simulation.World(random.Random(0)), memory_folder, [config], 5.0)
    world = simulation.World(random.Random(0))
    with pytest.raises(BaseExceptionGroup) as caught:
        killed_at(simulation, world, memory_folder, [simulation.adapter_config("b"), replace(config, max_staleness=3)], None)
    assert "adapters.a.max_staleness=3: must be 1" in str(caught.value.exceptions[0])
    assert not world.configs


def test_a_failed_adapter_is_tried_again_by_the_next_run(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=6)
    world = simulation.World(random.Random(0), loss_fault=lambda ref: ref.version == 3)
    assert killed_at(simulation, world, memory_folder, [config], None).statistics.adapters["a"].phase is Phase.FAILED
    world.loss_fault = lambda ref: False
    outcome = killed_at(simulation, world, memory_folder, [config], None)
    assert outcome.statistics.adapters["a"].phase is Phase.FINISHED
    assert [event.version for event in outcome.events if isinstance(event, StepTaken)] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("found", "width", "line"),
    [
        ({"a": 0}, 80, "goes on: 5 from step 0"),
        ({"a": 4}, 80, "goes on: a from step 4 (4 from step 0)"),
        (
            {"a": 4, "b": 5, "c": 2, "d": 6},
            76,
            "goes on: a from step 4, b from step 5, c from step 2 (1 from step 0, 1 done)",
        ),
        (
            {"a": 4, "b": 5, "c": 2, "d": 6},
            73,
            "goes on: a from step 4 (2 more from steps 2 to 5, 1 from step 0, 1 done)",
        ),
        ({"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}, 20, "goes on: 5 from step 2"),
    ],
)
def test_where_a_run_goes_on_is_one_line_of_names_and_counts(simulation, found, width, line):
    assert goes_on([simulation.adapter_config(name) for name in "abcde"], found, width) == line


def test_where_a_run_goes_on_counts_each_adapter_once_in_a_line_that_fits(simulation):
    chance = random.Random(0)
    for _ in range(300):
        names = [f"{'x' * chance.randint(1, 30)}{i}" for i in range(chance.randint(1, 40))]
        found = {name: chance.randint(0, 6) for name in names if chance.random() < 0.8}
        line = goes_on([simulation.adapter_config(name) for name in names], found, width := chance.randint(80, 160))
        assert len(line) <= width
        named = re.findall(r"(x+\d+) from step (\d)", line)
        assert all(found[name] == int(step) for name, step in named)
        assert len(named) + sum(map(int, re.findall(r"\b(\d+) (?:more from|from step|done)", line))) == len(names)
