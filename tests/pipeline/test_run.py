"""The pipeline in virtual time: hundreds of worlds with random durations and deaths; the simulated pools assert the laws."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import pytest

from weft.configs.schema import LossConfig
from weft.pipeline import run as run_module
from weft.pipeline.events import AdapterFailed, CheckpointWritten, LaunchEnded, Phase, PhaseChanged, StepTaken, Warned
from weft.pipeline.run import Pipeline
from weft.pipeline.staleness import StalenessError, StalenessGate
from weft.transport.errors import InstallError

SEEDS = 25  # a block


def deaths(seed):
    """Kills samplers and trainer a few times, at random moments of the run."""

    async def beside(simulated):
        chance = random.Random(seed)
        world = simulated.world
        pace = world.rollout_seconds + world.train_seconds + world.sync_seconds + world.restart_seconds
        for _ in range(chance.randint(1, 6)):
            await asyncio.sleep(chance.expovariate(1 / (4 * pace)))
            await chance.choice([*simulated.samplers.processes, simulated.trainers.process]).die()

    return beside


def in_order(config):
    """The prompts of every step when training is first in, first out and nothing is lost or done twice."""
    per_step = config.groups_per_step
    return [tuple(range(step * per_step, (step + 1) * per_step)) for step in range(config.num_steps)]


@pytest.mark.parametrize("block", range(6))
def test_staleness_never_exceeds_each_adapters_own_bound(simulation, memory_folder, block):
    for seed in range(block * SEEDS, (block + 1) * SEEDS):
        world, configs = simulation.random_world(seed)
        outcome = simulation.simulate(world, memory_folder / str(seed), configs)
        for config in configs:
            adapter = outcome.statistics.adapters[config.name]
            assert adapter.phase is Phase.FINISHED
            assert adapter.version == config.num_steps
            assert adapter.max_staleness_seen == max(world.ages[config.name]) <= config.max_staleness
            assert world.trained[config.name] == in_order(config)
        assert outcome.statistics.staleness_violations == 0


@pytest.mark.parametrize("block", range(6))
def test_all_adapters_finish_in_order_whatever_dies(simulation, memory_folder, block):
    for seed in range(1000 + block * SEEDS, 1000 + (block + 1) * SEEDS):
        world, configs = simulation.random_world(seed)
        outcome = simulation.simulate(world, memory_folder / str(seed), configs, deaths(seed))
        for config in configs:
            adapter = outcome.statistics.adapters[config.name]
            assert (adapter.phase, adapter.version) == (Phase.FINISHED, config.num_steps)
            assert world.trained[config.name] == in_order(config)
            assert adapter.max_staleness_seen <= config.max_staleness


def test_whose_rewards_never_differ_is_warned_of_once_and_no_other(simulation, memory_folder):
    """Nor one whose rewards come to differ in time, nor one that has learnt all."""
    late = iter([1.0] * (2 * 4) + [0.0, 1.0] * 100)  # two steps of four rollouts
    done = iter([0.0, 1.0] * 2 + [1.0] * 100)
    rewards = {"same": lambda: 1.0, "late": late.__next__, "done": done.__next__, "any": iter(range(10**6)).__next__}
    configs = [simulation.adapter_config(name, num_steps=8, batch_size=4, group_size=2, max_staleness=0) for name in rewards]
    world = simulation.World(random.Random(0), reward=lambda name, prompt: float(rewards[name]()))
    outcome = simulation.simulate(world, memory_folder, configs)
    assert outcome.statistics.warnings == (f"same: {run_module.BARREN}",)


def test_whose_run_goes_on_after_it_has_learnt_all_is_not_warned_of(simulation, memory_folder):
    for steps, reward in ((2, None), (8, lambda name, prompt: 1.0)):
        config = simulation.adapter_config("a", num_steps=steps, batch_size=4, group_size=2)
        outcome = simulation.simulate(simulation.World(random.Random(0), reward=reward), memory_folder, [config])
        assert (outcome.statistics.adapters["a"].version, outcome.statistics.warnings) == (steps, ())


def test_what_is_to_be_warned_of_as_a_run_begins_is_warned_of_once(simulation, memory_folder):
    async def main():
        simulated = simulation.Simulation(simulation.World(random.Random(0)), memory_folder)
        for _ in range(2):
            simulated.pipeline.warn("few rows")
        return await simulated.run([simulation.adapter_config("a")])

    outcome = simulation.run_virtual(main)
    assert outcome.statistics.warnings == ("few rows",)
    assert [(event.adapter, event.message) for event in outcome.events if isinstance(event, Warned)] == [("", "few rows")]


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_the_staleness_bound_is_reached(simulation, memory_folder, bound):
    config = simulation.adapter_config("a", max_staleness=bound, num_steps=8)
    world = simulation.World(random.Random(0), capacity=1000, rollout_seconds=0.1, train_seconds=5.0, spread=False)
    outcome = simulation.simulate(world, memory_folder, [config])
    assert outcome.statistics.adapters["a"].max_staleness_seen == bound


def beyond_bound(simulation, folder):
    """How many of some worlds of the staleness test end because a group was too old."""
    caught = 0
    for seed in range(40):
        world, configs = simulation.random_world(seed)
        world.count_places = False  # the mutations break law 10 too: let them come to law 1
        try:
            simulation.simulate(world, folder / str(seed), configs)
        except* StalenessError:
            caught += 1
    return caught


class WideGate(StalenessGate):
    """The mutation: one place too many."""

    def __init__(self, groups_per_step, max_staleness):
        super().__init__(groups_per_step, max_staleness)
        self.places += 1


class EarlyGate(StalenessGate):
    """The mutation: places come back when a version is sent, not when it is installed."""

    def release(self, groups):
        pass

    release_early = StalenessGate.release


def test_a_gate_with_one_place_too_many_is_caught(simulation, memory_folder, monkeypatch):
    monkeypatch.setattr(run_module, "StalenessGate", WideGate)
    assert beyond_bound(simulation, memory_folder) > 0


def test_violations_are_counted_in_the_batches_whatever_the_gate_and_its_guard_think(simulation, memory_folder, monkeypatch):
    class OpenGate(StalenessGate):
        def __init__(self, groups_per_step, max_staleness):
            super().__init__(groups_per_step, max_staleness + 2)

    train = simulation.SimulatedTrainers._train

    def train_without_looking(self, batch):
        config = self.world.configs[batch.ref.name]
        self.world.configs[batch.ref.name] = dataclasses.replace(config, max_staleness=99)
        return train(self, batch)

    monkeypatch.setattr(run_module, "StalenessGate", OpenGate)
    monkeypatch.setattr(run_module, "staleness", lambda group, version, bound: 0)
    monkeypatch.setattr(simulation.SimulatedTrainers, "_train", train_without_looking)
    world = simulation.World(random.Random(0), count_places=False)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config("a", max_staleness=1, num_steps=8)])
    adapter = outcome.statistics.adapters["a"]
    assert max(world.ages["a"]) > 1 and adapter.max_staleness_seen == 0, "the plant is there, and the guard is blind"
    steps = [event for event in outcome.events if isinstance(event, StepTaken)]
    assert [max(step.token_ages) for step in steps] == world.ages["a"]
    late = sum(count for step in steps for age, count in step.token_ages.items() if age > 1)
    assert adapter.staleness_violations == outcome.statistics.staleness_violations == late > 0


def test_a_release_before_the_install_is_caught(simulation, memory_folder, monkeypatch):
    publish = Pipeline._publish

    async def publish_after_release(self, adapter):
        if adapter.gate is not None:
            adapter.gate.release_early(adapter.config.groups_per_step)
        return await publish(self, adapter)

    monkeypatch.setattr(run_module, "StalenessGate", EarlyGate)
    monkeypatch.setattr(Pipeline, "_publish", publish_after_release)
    assert beyond_bound(simulation, memory_folder) > 0


def test_many_strictly_on_policy_adapters_keep_both_pools_full(simulation, memory_folder):
    configs = [simulation.adapter_config(f"a{i}", max_staleness=0, num_steps=20) for i in range(16)]
    world = simulation.World(random.Random(0), capacity=8, rollout_seconds=1.0, train_seconds=1.0, sync_seconds=0.02)
    outcome = simulation.simulate(world, memory_folder, configs, token_budget=24, checkpoint_every=100)
    assert min(outcome.statistics.samplers.busy, outcome.statistics.trainers.busy) > 0.9
    assert outcome.statistics.samplers.load > 0.8
    assert {age for ages in world.ages.values() for age in ages} == {0}


def test_one_strictly_on_policy_adapter_leaves_pools_idle(simulation, memory_folder):
    world = simulation.World(random.Random(0), capacity=4, train_seconds=1.0, spread=False)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config("a", max_staleness=0)])
    assert outcome.statistics.samplers.busy + outcome.statistics.trainers.busy < 1.0


def test_a_reward_that_raises_ends_its_adapter_alone(simulation, memory_folder):
    def reward(name, prompt_index):
        return 1 / 0 if name == "a1" and prompt_index == 5 else prompt_index % 2

    configs = [simulation.adapter_config(f"a{i}") for i in range(3)]
    outcome = simulation.simulate(simulation.World(random.Random(0), reward=reward), memory_folder, configs)
    phases = {name: adapter.phase for name, adapter in outcome.statistics.adapters.items()}
    assert phases == {"a0": Phase.FINISHED, "a1": Phase.FAILED, "a2": Phase.FINISHED}
    assert "Traceback of the sampler" in outcome.statistics.adapters["a1"].traceback
    (failed,) = [event for event in outcome.events if isinstance(event, AdapterFailed)]
    assert (failed.adapter, failed.reason) == ("a1", "the reward raised")


def test_a_reward_that_is_not_finite_ends_its_adapter_alone(simulation, memory_folder):
    world = simulation.World(random.Random(0), reward=lambda name, prompt: float("nan") if name == "a0" else 1.0)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config(f"a{i}") for i in range(2)])
    assert outcome.statistics.adapters["a0"].phase is Phase.FAILED
    assert "reward nan" in outcome.statistics.adapters["a0"].traceback
    assert outcome.statistics.adapters["a1"].phase is Phase.FINISHED


def test_a_loss_that_is_not_finite_ends_its_adapter_alone(simulation, memory_folder):
    world = simulation.World(random.Random(0), loss_fault=lambda ref: ref.name == "a0" and ref.version == 3)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config(f"a{i}") for i in range(3)])
    assert outcome.statistics.adapters["a0"].phase is Phase.FAILED
    assert outcome.statistics.adapters["a0"].version == 3
    assert "the loss is nan" in outcome.statistics.adapters["a0"].traceback
    assert outcome.statistics.adapters["a1"].phase is outcome.statistics.adapters["a2"].phase is Phase.FINISHED


def test_a_version_that_cannot_be_installed_ends_its_adapter_alone(simulation, memory_folder, monkeypatch):
    publish = simulation.SimulatedSync.publish

    async def refuse(self, ref, supersedes):
        if ref.name == "a0" and ref.version == 2:
            raise InstallError("it samples as the base does")
        return await publish(self, ref, supersedes)

    monkeypatch.setattr(simulation.SimulatedSync, "publish", refuse)
    world = simulation.World(random.Random(0))
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config(f"a{i}") for i in range(2)])
    assert outcome.statistics.adapters["a0"].phase is Phase.FAILED
    assert outcome.statistics.adapters["a1"].phase is Phase.FINISHED


def test_a_checkpoint_that_is_not_what_was_written_ends_its_adapter_alone(simulation, memory_folder, monkeypatch):
    save = simulation.SimulatedTrainers.save

    async def altered(self, ref, folder):
        saved = await save(self, ref, folder)
        if ref.name == "a0" and ref.version == 2:
            (Path(folder) / "weights.json").write_text("{}")
        return saved

    monkeypatch.setattr(simulation.SimulatedTrainers, "save", altered)
    world = simulation.World(random.Random(0))
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config(f"a{i}") for i in range(2)])
    assert outcome.statistics.adapters["a0"].phase is Phase.FAILED
    assert "not what the trainer wrote" in outcome.statistics.adapters["a0"].traceback
    assert outcome.statistics.adapters["a1"].phase is Phase.FINISHED


def test_whoever_waits_for_an_adapter_to_leave_does_not_outwait_the_run(simulation, memory_folder):
    waited = []

    def reward(name, prompt_index):
        if prompt_index == 9:
            raise KeyError("a bug")
        return prompt_index % 2

    async def main():
        simulated = simulation.Simulation(simulation.World(random.Random(0), reward=reward, train_seconds=9.0), memory_folder)

        async def leave():
            await asyncio.sleep(1.0)
            await simulated.pipeline.leave("other")
            waited.append(asyncio.get_running_loop().time())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leave())
            configs = [simulation.adapter_config("a", batch_size=20), simulation.adapter_config("other")]
            with pytest.raises(BaseExceptionGroup):
                await simulated.pipeline.run(configs)

    simulation.run_virtual(main)
    assert waited


def test_a_fault_of_ours_ends_the_run(simulation, memory_folder):
    def reward(name, prompt_index):
        if name == "a1" and prompt_index == 5:
            raise KeyError("a bug")
        return prompt_index % 2

    configs = [simulation.adapter_config(f"a{i}") for i in range(3)]
    with pytest.raises(BaseExceptionGroup) as caught:
        simulation.simulate(simulation.World(random.Random(0), reward=reward), memory_folder, configs)
    assert {type(leaf) for leaf in run_module.leaves(caught.value)} == {KeyError}


def test_a_trainer_that_always_dies_ends_the_run(simulation, memory_folder):
    async def beside(simulated):
        while True:
            await asyncio.sleep(0.5)
            await simulated.trainers.process.die()

    world = simulation.World(random.Random(0), train_seconds=100.0, rollout_seconds=0.1, restart_seconds=0.1, spread=False)
    with pytest.raises(BaseExceptionGroup) as caught:
        simulation.simulate(world, memory_folder, [simulation.adapter_config("a")], beside)
    assert "killed" in str(list(run_module.leaves(caught.value)))


def test_a_prompt_that_always_kills_its_sampler_ends_its_adapter(simulation, memory_folder):
    async def beside(simulated):
        while True:
            await asyncio.sleep(1.0)
            await simulated.samplers.process.die()

    world = simulation.World(random.Random(0), rollout_seconds=100.0, restart_seconds=0.1, spread=False)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config("a")], beside)
    assert outcome.statistics.adapters["a"].phase is Phase.FAILED
    assert "5 samplers died of prompt" in outcome.statistics.adapters["a"].traceback


def test_a_prompt_that_always_kills_its_sampler_ends_no_other_adapter(simulation, memory_folder, monkeypatch):
    rollout = simulation.SimulatedSamplers.rollout
    killers = []

    async def deadly(self, ref, prompt_index, *others):
        if (ref.name, prompt_index) == ("a0", 5):
            killers[0].set()
        return await rollout(self, ref, prompt_index, *others)

    async def beside(simulated):
        killers.append(asyncio.Event())
        while True:
            await killers[0].wait()
            killers[0].clear()
            await asyncio.sleep(1e-6)  # it runs by now, whether or not it waited for the sampler
            await simulated.samplers.process.die()

    monkeypatch.setattr(simulation.SimulatedSamplers, "rollout", deadly)
    configs = [simulation.adapter_config(f"a{i}", num_steps=20, max_staleness=3) for i in range(4)]
    world = simulation.World(random.Random(0), capacity=100)
    adapters = simulation.simulate(world, memory_folder, configs, beside).statistics.adapters
    assert adapters["a0"].phase is Phase.FAILED
    assert "samplers died of prompt 5" in adapters["a0"].traceback
    assert {adapters[f"a{i}"].phase for i in (1, 2, 3)} == {Phase.FINISHED}


def test_a_trainers_death_rolls_back_its_adapters_under_a_new_lineage(simulation, memory_folder):
    async def beside(simulated):
        await asyncio.sleep(9.5)
        await simulated.trainers.process.die()

    world = simulation.World(random.Random(0), rollout_seconds=0.3, train_seconds=0.7, spread=False)
    configs = [simulation.adapter_config(f"a{i}", num_steps=20) for i in range(3)]
    outcome = simulation.simulate(world, memory_folder, configs, beside)
    for config in configs:
        steps = [event for event in outcome.events if isinstance(event, StepTaken) and event.adapter == config.name]
        assert {step.lineage for step in steps} == {0, 1}
        first = next(step for step in steps if step.lineage == 1)
        assert (first.version - 1) % 2 == 0 and first.version > 1  # from its newest checkpoint, not from nothing
        assert outcome.statistics.adapters[config.name].rollbacks == 1
        assert world.trained[config.name] == in_order(config)
    assert any("a trainer died" in event.message for event in outcome.events if isinstance(event, Warned))


def test_a_trainers_death_is_told_at_once_to_adapters_that_wait_for_rollouts(simulation, memory_folder):
    async def beside(simulated):
        await asyncio.sleep(20.2)
        await simulated.trainers.process.die()

    world = simulation.World(random.Random(0), capacity=4, rollout_seconds=0.5, train_seconds=0.5, spread=False)
    slow = simulation.adapter_config("slow", num_steps=2, batch_size=200)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config("fast", num_steps=60), slow], beside)
    rolled_back = {
        event.adapter: event.time
        for event in outcome.events
        if isinstance(event, PhaseChanged) and event.phase is Phase.ROLLING_BACK
    }
    assert rolled_back["slow"] == pytest.approx(20.2) and rolled_back["fast"] < 20.5  # who learns of it amid a sync ends that
    assert len([event for event in outcome.events if isinstance(event, Warned)]) == 1
    assert {adapter.rollbacks for adapter in outcome.statistics.adapters.values()} == {1}


def test_a_trainers_death_ends_an_evaluation_at_once(simulation, memory_folder):
    async def beside(simulated):
        await asyncio.sleep(20.2)
        await simulated.trainers.process.die()

    world = simulation.World(random.Random(0), capacity=4, rollout_seconds=0.5, train_seconds=0.5, spread=False)
    slow = simulation.adapter_config("slow", num_steps=2, eval_prompts=400)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config("fast", num_steps=60), slow], beside)
    told = {event.adapter: event.time for event in outcome.events if getattr(event, "phase", "") is Phase.ROLLING_BACK}
    assert told["slow"] == pytest.approx(20.2)
    assert {adapter.phase for adapter in outcome.statistics.adapters.values()} == {Phase.FINISHED}


@pytest.mark.parametrize("eval_prompts", [0, 400])
def test_a_trainers_death_is_told_when_all_adapters_wait_and_nobody_calls_it(
    simulation, memory_folder, monkeypatch, eval_prompts
):
    rollout = simulation.SimulatedSamplers.rollout

    async def stuck(self, ref, *others):
        if ref.lineage == 0:
            await asyncio.Event().wait()
        return await rollout(self, ref, *others)

    async def beside(simulated):
        await asyncio.sleep(20.0)
        await simulated.trainers.process.die()
        await asyncio.sleep(20.0)  # long after its restart: another death
        await simulated.trainers.process.die()

    monkeypatch.setattr(simulation.SimulatedSamplers, "rollout", stuck)
    configs = [simulation.adapter_config(f"a{i}", num_steps=100, eval_prompts=eval_prompts) for i in range(3)]
    outcome = simulation.simulate(simulation.World(random.Random(0), spread=False), memory_folder, configs, beside)
    told = [event.time for event in outcome.events if getattr(event, "phase", "") is Phase.ROLLING_BACK]
    assert told[:3] == [20.0] * 3
    assert {adapter.phase for adapter in outcome.statistics.adapters.values()} == {Phase.FINISHED}
    assert len([event for event in outcome.events if isinstance(event, Warned)]) == 2  # once a death


def test_deaths_of_the_trainer_while_an_adapter_waits_for_its_rollouts_are_not_held_against_it(simulation, memory_folder):
    async def beside(simulated):
        for _ in range(8):
            await asyncio.sleep(30.0)
            await simulated.trainers.process.die()

    world = simulation.World(random.Random(0), capacity=4, rollout_seconds=1.0, spread=False)
    slow = simulation.adapter_config("slow", num_steps=1, batch_size=400)
    outcome = simulation.simulate(world, memory_folder, [slow], beside)
    assert (outcome.statistics.adapters["slow"].phase, outcome.statistics.adapters["slow"].rollbacks) == (Phase.FINISHED, 8)


def test_a_group_is_done_again_while_another_sampler_is_still_being_restarted(simulation, memory_folder, monkeypatch):
    async def not_whole(self):
        await asyncio.sleep(1000.0)

    async def beside(simulated):
        await asyncio.sleep(2.5)
        await simulated.samplers.process.die()

    monkeypatch.setattr(simulation.SimulatedSamplers, "wait_ready", not_whole)
    world = simulation.World(random.Random(0), spread=False)
    outcome = simulation.simulate(world, memory_folder, [simulation.adapter_config("a")], beside)
    assert outcome.statistics.time < 100.0


def test_an_adapter_of_no_steps_is_evaluated_and_exported(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=0, eval_prompts=3)
    adapter = simulation.simulate(simulation.World(random.Random(0)), memory_folder, [config]).statistics.adapters["a"]
    assert (adapter.phase, adapter.version) == (Phase.FINISHED, 0)
    assert None not in (adapter.eval_base, adapter.eval_final)
    assert adapter.peft_path


def test_adapters_join_and_leave_a_running_pipeline(simulation, memory_folder):
    async def beside(simulated):
        await asyncio.sleep(5.0)
        simulated.pipeline.join(simulation.adapter_config("late", num_steps=4))
        with pytest.raises(ValueError, match="late"):
            simulated.pipeline.join(simulation.adapter_config("late", num_steps=4))
        await simulated.pipeline.leave("early")
        assert simulated.pipeline.statistics().adapters["early"].phase is Phase.LEFT
        assert "early" not in simulated.samplers.added
        assert "early" not in simulated.trainers.held

    world = simulation.World(random.Random(0))
    configs = [simulation.adapter_config("early", num_steps=500), simulation.adapter_config("other", num_steps=20)]
    outcome = simulation.simulate(world, memory_folder, configs, beside)
    early, late = outcome.statistics.adapters["early"], outcome.statistics.adapters["late"]
    assert late.phase is outcome.statistics.adapters["other"].phase is Phase.FINISHED
    assert 0 < early.version < 500
    written = [event.version for event in outcome.events if isinstance(event, CheckpointWritten) and event.adapter == "early"]
    assert written[-1] == early.version
    assert (memory_folder / "adapters" / "early" / "adapter.json").exists()


def test_an_adapter_that_left_goes_on_when_it_joins_again(simulation, memory_folder):
    config = simulation.adapter_config("a", num_steps=30)

    async def beside(simulated):
        await asyncio.sleep(8.0)
        await simulated.pipeline.leave("a")
        assert 0 < simulated.pipeline.statistics().adapters["a"].version < 30
        simulated.pipeline.join(config)

    world = simulation.World(random.Random(0))
    other = simulation.adapter_config("other", num_steps=60)
    outcome = simulation.simulate(world, memory_folder, [config, other], beside)
    assert outcome.statistics.adapters["a"].phase is Phase.FINISHED
    assert world.trained["a"] == in_order(config)


@pytest.mark.parametrize("seed", range(20))
def test_joins_leaves_and_deaths_at_any_moment_disturb_nobody_else(simulation, memory_folder, seed):
    async def beside(simulated):
        chance, names = random.Random(seed), [config.name for config in configs]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deaths(seed)(simulated))
            for i in range(4):
                await asyncio.sleep(chance.expovariate(1 / 5))
                simulated.pipeline.join(simulation.adapter_config(f"late{i}", max_staleness=i % 3))
                names.append(f"late{i}")
                await asyncio.sleep(chance.expovariate(1 / 5))
                await simulated.pipeline.leave(names.pop(chance.randrange(len(names))))

    world, configs = simulation.random_world(seed)
    configs = [*configs, simulation.adapter_config("steady", num_steps=40)]
    world.live_versions += (10,) * 10  # room for those that come
    outcome = simulation.simulate(world, memory_folder, configs, beside)
    assert all(adapter.phase in (Phase.FINISHED, Phase.LEFT) for adapter in outcome.statistics.adapters.values())
    assert outcome.statistics.adapters["steady"].version == 40 or outcome.statistics.adapters["steady"].phase is Phase.LEFT


def test_rows_without_an_advantage_still_make_steps(simulation, memory_folder):
    world = simulation.World(random.Random(0), reward=lambda name, prompt: 1.0)
    config = simulation.adapter_config("a", loss=LossConfig())
    outcome = simulation.simulate(world, memory_folder, [config])
    assert outcome.statistics.adapters["a"].version == config.num_steps
    assert outcome.statistics.adapters["a"].tokens_trained == 0
    assert outcome.statistics.adapters["a"].tokens_sampled == config.num_steps * config.batch_size * 2


def test_no_two_groups_of_a_small_task_draw_the_same_noise(simulation, memory_folder, monkeypatch):
    """Three prompts in eight places: one comes again while its version is still the newest."""
    rollout, add, drawn = simulation.SimulatedSamplers.rollout, simulation.SimulatedSamplers.add, []

    async def watched(self, ref, prompt_index, group_size, held_out, seat, epoch, texts):
        drawn.append((ref.version, prompt_index, epoch))
        return await rollout(self, ref, prompt_index, group_size, held_out, seat, epoch, texts)

    async def small(self, *asked):
        await add(self, *asked)
        return 3

    monkeypatch.setattr(simulation.SimulatedSamplers, "rollout", watched)
    monkeypatch.setattr(simulation.SimulatedSamplers, "add", small)
    one = simulation.adapter_config("a", batch_size=8, group_size=2)
    simulation.simulate(simulation.World(random.Random(0)), memory_folder, [one])
    assert len({draw[:2] for draw in drawn}) < len(drawn) == 24, "a prompt came twice under one version"
    assert len({draw[1:] for draw in drawn}) == len(drawn)


def test_held_out_prompts_are_evaluated_before_and_after(simulation, memory_folder):
    world = simulation.World(random.Random(0), reward=lambda name, prompt: 0.25)
    config = simulation.adapter_config("a", eval_prompts=7)
    adapter = simulation.simulate(world, memory_folder, [config]).statistics.adapters["a"]
    assert adapter.eval_base == adapter.eval_final == 0.25


@pytest.mark.parametrize("bound", [0, 1])
def test_many_adapters_sync_to_one_sampler_each_and_keep_all_samplers_as_full_as_one_big_one(
    simulation, memory_folder, bound
):
    """Sixteen adapters whose rollouts fill the samplers; what affinity costs is the unevenness of whole adapters."""

    def seconds(samplers):
        configs = [simulation.adapter_config(f"a{i:02}", num_steps=20, max_staleness=bound) for i in range(16)]
        world = simulation.World(
            random.Random(0), samplers=samplers, capacity=32 // samplers, rollout_seconds=4.0, train_seconds=0.5,
            live_versions=tuple(config.live_versions for config in configs),
        )  # fmt: skip
        outcome = simulation.simulate(world, memory_folder / str(samplers), configs)
        return outcome.statistics.time, world

    one, _ = seconds(1)
    four, world = seconds(4)
    assert four < 1.1 * one
    late = world.syncs[len(world.syncs) // 4 :]
    assert sum(late) / len(late) < 1.7, "guests are few"
    for sampler in range(4):
        at_home = sum(count for (_, where), count in world.served.items() if where == sampler)
        assert at_home > sum(world.served.values()) / 8


def test_an_adapter_alone_uses_every_sampler(simulation, memory_folder):
    world = simulation.World(random.Random(0), samplers=3, capacity=64)
    simulation.simulate(world, memory_folder, [simulation.adapter_config("a", num_steps=20, batch_size=24)])
    assert min(world.served["a", sampler] for sampler in range(3)) > 0.2 * sum(world.served.values())


def test_ready_adapters_share_launches(simulation, memory_folder):
    configs = [simulation.adapter_config(f"a{i}") for i in range(6)]
    world = simulation.World(random.Random(0), capacity=100, rollout_seconds=0.5, train_seconds=2.0)
    outcome = simulation.simulate(world, memory_folder, configs)
    launches = [event for event in outcome.events if isinstance(event, LaunchEnded)]
    assert len(launches) < sum(config.num_steps for config in configs) / 2


def test_the_pipeline_runs_under_uvloop(simulation, memory_folder):
    import uvloop

    world = simulation.World(random.Random(0), rollout_seconds=0.001, train_seconds=0.001, sync_seconds=0.001)
    configs = [simulation.adapter_config(f"a{i}", eval_prompts=3) for i in range(3)]

    async def main():
        return await simulation.Simulation(world, memory_folder).run(configs)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(main())
    assert all(adapter.phase is Phase.FINISHED for adapter in outcome.statistics.adapters.values())


def test_a_deadlock_fails_at_once(simulation):
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(simulation.Deadlock, match="main"):
        simulation.run_virtual(main)
