"""samples.jsonl says what was written, by which version, for which reward and in which step, and stops nothing."""

import asyncio
import json
import random
from collections import defaultdict

import pytest

from weft.pipeline.events import Evaluated, SampleTold, StepTaken, Transcript
from weft.pipeline.metrics import Metrics
from weft.pipeline.rollout import HELD_OUT_TOLD
from weft.pipeline.samples import Samples, newest_samples

SEEDS = range(25)


def deaths(seed):
    """Kills the trainer, and a sampler, a few times at random moments."""

    async def beside(simulated):
        chance, world = random.Random(seed), simulated.world
        pace = world.rollout_seconds + world.train_seconds + world.sync_seconds
        for process in [simulated.trainers.process, chance.choice(simulated.samplers.processes)] * 2:
            await asyncio.sleep(chance.expovariate(1 / (3 * pace)))
            await process.die()

    return beside


def unheard(message):
    raise AssertionError(message)


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def written(folder, events):
    """The lines of a run's events, by adapter and step."""
    samples = Samples(folder, 0, unheard)
    for event in events:
        samples(event)
    found = defaultdict(list)
    for line in lines(folder):
        found[line["adapter"], line["step"], line["held_out"]].append(line)
    return found


def sample(step=1, adapter="a", lineage=0, text="4", reward=0.5):
    messages = ({"role": "user", "content": "2 + 2?"},), ({"role": "assistant", "content": text},)
    return SampleTold(1.0, adapter, lineage, step, False, Transcript(7, (step - 1,), reward, 3, 1, False, *messages))


def test_every_step_has_the_worst_and_the_best_of_its_first_group_with_reward_and_versions(simulation, memory_folder):
    for seed in SEEDS:
        world, configs = simulation.random_world(seed)
        folder = memory_folder / str(seed)
        found = written(folder, simulation.simulate(world, folder, configs).events)
        for config in configs:
            for step in range(1, config.num_steps + 1):
                told = found[config.name, step, False]
                assert [line["prompt_index"] for line in told] == [(step - 1) * config.groups_per_step] * 2
                for line in told:
                    (sampled,) = line["versions"]
                    lineage, version, prompt, rewards = json.loads(line["completion"][-1]["content"])
                    assert (lineage, version, prompt) == (line["lineage"], sampled, line["prompt_index"]), "of this very text"
                    assert 0 <= step - 1 - sampled <= config.max_staleness and line["tokens"] == 2
                    assert line["prompt"] == [{"role": "user", "content": str(prompt)}]
                assert [line["reward"] for line in told] == [min(rewards), max(rewards)]


def test_each_evaluation_tells_its_first_held_out_prompts(simulation, memory_folder):
    world, _ = simulation.random_world(0)
    config = simulation.adapter_config("a", num_steps=3, eval_prompts=9)
    found = written(memory_folder, simulation.simulate(world, memory_folder, [config]).events)
    for version in (0, 3):
        told = found["a", version, True]
        assert [line["prompt_index"] for line in told] == list(range(HELD_OUT_TOLD))
        assert all(line["versions"] == [version] for line in told)


def test_no_text_is_asked_for_that_is_not_written(simulation, memory_folder):
    for seed in SEEDS:
        world, configs = simulation.random_world(seed)
        folder = memory_folder / str(seed)
        found = written(folder, simulation.simulate(world, folder, configs).events)
        told = {(name, line["prompt_index"], held_out) for (name, _, held_out), of in found.items() for line in of}
        assert set(world.texts) == told
        evaluations = {config.name: 2 * min(config.eval_prompts, HELD_OUT_TOLD) for config in configs}
        assert len(world.texts) == sum(config.num_steps + evaluations[config.name] for config in configs)


def test_a_group_whose_rewards_are_all_one_is_told_once(simulation, memory_folder):
    world, _ = simulation.random_world(0)
    world.reward = lambda name, prompt: 1.0
    config = simulation.adapter_config("a", num_steps=3)
    found = written(memory_folder, simulation.simulate(world, memory_folder, [config]).events)
    assert [len(found["a", step, False]) for step in (1, 2, 3)] == [1, 1, 1]


def test_what_counts_of_each_step_is_of_the_history_that_stands_whatever_dies(simulation, memory_folder):
    undone = 0
    for seed in SEEDS:
        world, configs = simulation.random_world(seed)
        folder = memory_folder / str(seed)
        outcome = simulation.simulate(world, folder, configs, deaths(seed))
        found = written(folder, outcome.events)
        stands = {(event.adapter, event.version): event.lineage for event in outcome.events if isinstance(event, StepTaken)}
        for (name, step), lineage in stands.items():
            told = found[name, step, False]
            undone += len({line["lineage"] for line in told}) - 1
            last = [line for line in told if line["lineage"] == max(line["lineage"] for line in told)]
            assert told[-2:] == last and last[0]["lineage"] == lineage, "the highest lineage is the last, and trained the step"
            assert all(json.loads(line["completion"][0]["content"])[0] == lineage for line in last)
    assert undone > 10


def test_a_sample_is_told_right_after_what_it_belongs_to(simulation, memory_folder):
    world, configs = simulation.random_world(3)
    before = None
    for event in simulation.simulate(world, memory_folder, configs).events:
        if isinstance(event, SampleTold):
            assert (before.adapter, before.version) == (event.adapter, event.version)
            assert isinstance(before, Evaluated if event.held_out else StepTaken)
        else:
            before = event


def test_a_resumed_run_appends_and_a_line_that_a_crash_cut_short_is_ended(tmp_path):
    Samples(tmp_path, 0, unheard)(sample(1))
    Samples(tmp_path, 0, unheard)(sample(2, text='a "} brace'))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-1].partition(b" brace")[0])
    assert newest_samples(tmp_path)["a"]["step"] == 1
    resumed = Samples(tmp_path, 1, unheard)
    resumed(sample(2, lineage=1))
    resumed(sample(1, adapter='b","lineage":9'))
    first, cut, second, other = path.read_text().splitlines()
    assert [json.loads(line)["session"] for line in (first, second, other)] == [0, 1, 1] and cut.endswith('"}')
    assert {name: line["step"] for name, line in newest_samples(tmp_path).items()} == {"a": 2, 'b","lineage":9': 1}


@pytest.mark.parametrize("text", ["two\nlines", "\u2028\x85\x0b\r", '"}\n{"adapter":"b"', "\x00\U0001f600"])
def test_whatever_was_written_is_one_line_and_comes_back(tmp_path, text):
    Samples(tmp_path, 0, unheard)(sample(text=text))
    (line,) = lines(tmp_path)
    assert line["completion"][0]["content"] == text == newest_samples(tmp_path)["a"]["completion"][0]["content"]


def test_a_full_disk_is_warned_of_once_and_stops_nothing(tmp_path):
    warnings = []
    samples = Samples(tmp_path, 0, warnings.append)
    path = tmp_path / "samples.jsonl"
    path.symlink_to("/dev/full")
    for step in (1, 2, 3):
        samples(sample(step))
    assert len(warnings) == 1 and "No space left" in warnings[0] and str(path) in warnings[0]
    path.unlink()
    samples(sample(4))
    assert [line["step"] for line in lines(tmp_path)] == [4] and len(warnings) == 1


def test_no_other_file_holds_the_texts(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics(sample(text="a secret"))
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
