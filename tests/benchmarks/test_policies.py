"""What the policies of experiments.py do to the pools, in virtual time, and the trainer that moves its adapters' states."""

from __future__ import annotations

import asyncio
import importlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.actors.base_model import tiny_path
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig, ClusterConfig, Config, LoraConfig, ModelConfig, RunConfig, TrainerConfig
from weft.pipeline.events import GroupSampled, LaunchEnded, Synced
from weft.pipeline.interfaces import Pools
from weft.transport import messages
from weft.transport.messages import AdapterRef, TrainBatch

SWAPPED = 3 * 4  # bytes of masters and moments, an element of the adapter


@dataclass
class Mover:
    """Stands where a trainer's process is asked how many adapters its card may hold."""

    world: Any
    asked: list[int] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)  # before each time it was asked

    async def request(self, message: Any) -> messages.Saved:
        self.asked.append(int(message.folder))
        self.launches.append(len(self.world.launches))
        return messages.Saved({"bytes_up": str(100 * len(self.asked))})


def run(benchmark, simulation, folder, names, adapters=5, **world_settings):
    """-> (policies, mover) of equal on-policy experiments."""
    configs = tuple(simulation.adapter_config(f"a.{i}", num_steps=4, batch_size=8, group_size=4) for i in range(adapters))
    config = Config(RunConfig(dir=str(folder)), ModelConfig(), ClusterConfig(), configs)

    async def both():
        world = simulation.World(random.Random(0), capacity=64, spread=False, **world_settings)
        samplers, trainers = simulation.SimulatedSamplers(world), simulation.SimulatedTrainers(world)
        trainers._members = [mover := Mover(world)]
        pools = Pools(samplers, trainers, simulation.SimulatedSync(world, samplers, trainers))
        done = await benchmark.run_both(config, pools, names, clock=asyncio.get_running_loop().time)
        benchmark.check(done, configs)
        return done, mover

    return simulation.run_virtual(both)


def of(policy, kind):
    return [event for event in policy.events if isinstance(event, kind)]


def test_time_shared_samples_nothing_while_anything_trains_or_syncs(benchmark, simulation, tmp_path):
    policies, mover = run(benchmark, simulation, tmp_path, ["serial-on-policy", "serial-time-shared"])
    for policy in policies.values():
        busy = [(end.time - end.seconds, end.time) for end in of(policy, LaunchEnded)]
        busy += [(synced.time - synced.seconds, synced.time) for synced in of(policy, Synced)]
        sampled = [(group.start, group.time) for group in of(policy, GroupSampled)]
        overlaps = [min(one[1], two[1]) - max(one[0], two[0]) for one in busy for two in sampled]
        assert max(overlaps) < 1e-6
    steps = 2 * 4  # of the first two experiments
    assert len(of(policies["serial-time-shared"], LaunchEnded)) == steps
    assert mover.asked == [1, *[0] * (steps + 2), 64], "once after each publish, the first of each adapter too"
    measured = {name: benchmark.measure(policy) for name, policy in policies.items()}
    assert measured["serial-time-shared"]["moved_mb_a_step"] == pytest.approx(100 * (steps + 3) / steps / 1e6)
    told = benchmark.versus(measured)["serial-time-shared"]
    assert set(told) == {"baseline", "first_experiment_time"}, "two experiments have no final time of five"


def test_swap_holds_two_states_for_as_long_as_it_lasts_and_a_launch_takes_one(benchmark, simulation, tmp_path):
    policies, mover = run(benchmark, simulation, tmp_path, ["staleness-0", "swap", "staleness-1"])
    assert mover.asked == [2, ClusterConfig().trainer.device_adapters]
    before, after = mover.launches
    assert after - before == 5 * 4, "its launches, one adapter each, and no other policy's"
    assert benchmark.measure(policies["swap"])["adapters_per_launch"] == 1.0
    assert benchmark.measure(policies["staleness-0"])["moved_mb_a_step"] == 0


def test_a_launch_takes_as_many_on_policy_adapters_as_its_policy_says(benchmark, simulation, tmp_path):
    """Of nine adapters that come back at once: a third, two, all that wait, one, all that wait."""
    names = ["staleness-0", "staleness-0-few", "all-ready", "one-a-launch", "lock-step"]
    policies, _ = run(benchmark, simulation, tmp_path, names, adapters=9, rollout_seconds=0.2)
    sizes = {name: [len(launch.tokens) for launch in of(policy, LaunchEnded)] for name, policy in policies.items()}
    assert [max(sizes[name]) for name in names] == [3, 2, 8, 1, 8], "the first to come finds the trainer free"


def batch_of(ref: AdapterRef) -> TrainBatch:
    rng = np.random.default_rng(ref.version)
    mask = np.tile(np.arange(8) >= 4, 2)
    logprobs, versions = np.where(mask, -5.0, 0.0).astype(np.float32), np.where(mask, ref.version, messages.UNSAMPLED)
    tokens, advantages = rng.integers(0, 256, 16).astype(np.int32), np.array([1.0, -1.0], np.float32)
    return TrainBatch(
        ref, tokens, np.array([0, 8, 16], np.int32), mask, logprobs, versions.astype(np.int32), advantages,
        np.zeros(2, np.int32), 8, 2,
    )  # fmt: skip


def test_a_trainer_that_swaps_moves_every_state_and_ends_with_the_bits_of_one_that_does_not(benchmark, tmp_path):
    measured, policies = importlib.import_module("measured"), importlib.import_module("policies")
    rank, names = 4, ("one", "two", "three")
    configs = [AdapterConfig(name=name, lora=LoraConfig(rank=rank)) for name in names]

    async def train(folder: Path, most: int | None) -> tuple[dict[str, np.ndarray], int, int]:
        trainer = measured.MeasuredTrainer(tiny_path(), "float32", TrainerConfig(), str(folder), str(folder / "slabs"))
        await trainer.start()
        pool = type("Pool", (), {"_members": [type("Member", (), {"request": staticmethod(trainer.handle)})]})
        for config in configs:
            await trainer.handle(messages.AddAdapter(to_mapping(config)))
        before = 0 if most is None else await policies.hold_on_device(pool, most)
        for version in range(2):
            for name in names:
                await trainer.handle(messages.TrainStep((batch_of(AdapterRef(name, 0, version)),)))
        handles = [await trainer.handle(messages.Publish(AdapterRef(name, 0, 2))) for name in names]
        moved = 0 if most is None else await policies.hold_on_device(pool, 0) - before
        await trainer.aclose()
        return {handle.ref.name: np.fromfile(handle.path, np.float32) for handle in handles}, moved, handles[0].nbytes

    kept, *_ = asyncio.run(train(tmp_path / "kept", None))
    swapped, moved, nbytes = asyncio.run(train(tmp_path / "swapped", 1))
    assert all(np.array_equal(kept[name], swapped[name]) for name in names)
    turns = 3 * len(names)  # two steps of each and a publish: in and, for the next one or at the end, out
    new = len(names) * (SWAPPED - 4)  # which come without moments, for they are zero
    assert moved == nbytes // 4 * (2 * turns * SWAPPED - new)
