"""benchmarks/learning.py: the same adapters in both arms, names of weights that are never used twice, and how it judges."""

from __future__ import annotations

import asyncio
import importlib
import random

import pytest

from weft.configs.schema import ClusterConfig, Config, ModelConfig, RunConfig
from weft.pipeline.interfaces import Pools


@pytest.fixture(scope="module")
def learning(load):
    """benchmarks/learning.py."""
    return load("learning")


def test_an_adapter_is_the_same_in_both_arms_of_a_seed_under_a_lineage_of_its_own(learning, simulation, tmp_path):
    adapters = tuple(simulation.adapter_config(f"a{i}", num_steps=3, eval_prompts=4, max_staleness=i) for i in range(3))
    config = Config(RunConfig(dir=str(tmp_path)), ModelConfig(), ClusterConfig(), adapters)

    async def both():
        world = simulation.World(random.Random(0), capacity=64, spread=False, reward=lambda name, prompt: prompt / 100)
        samplers, trainers = simulation.SimulatedSamplers(world), simulation.SimulatedTrainers(world)
        pools = Pools(samplers, trainers, simulation.SimulatedSync(world, samplers, trainers))
        clock = asyncio.get_running_loop().time
        return world, [await learning.run_seed(config, pools, seed, clock) for seed in range(2)]

    world, runs = simulation.run_virtual(both)
    trained = {ref.lineage for ref in world.names if ref.version}
    assert trained == {0, 1, 2, 3}, "a lineage an arm"
    ends = {(ref.name, ref.lineage): digest for ref, digest in world.names.items() if ref.version == 3}
    assert len(ends) == 3 * 4
    for name in ("a0", "a1", "a2"):
        assert ends[name, 0] == ends[name, 1], "the same prompts in the same order, alone and together"
    for run in runs:
        assert run["together"]["held_out"] == run["alone"]["held_out"]
        assert run["alone"]["adapters_per_launch"] == 1.0 < run["together"]["adapters_per_launch"]


def test_an_adapter_is_judged_by_its_own_spread_or_by_that_of_all_where_it_has_less(learning):
    scores = {
        "alone": {"wide": [0.2, 0.4, 0.6], "best": [1.0, 1.0, 1.0]},
        "together": {"wide": [0.4, 0.5, 0.7], "best": [0.9, 0.8, 0.8]},
    }
    told = learning.compare(scores)
    wide, best = told["adapters"]["wide"], told["adapters"]["best"]
    assert wide["by"] == "own" and wide["in_sd"] == pytest.approx(2 / 3) and wide["within"]
    assert best["by"] == "pooled" and best["allowed"] == pytest.approx((0.2**2 / 2) ** 0.5) and not best["within"]
    assert (told["within"], told["of"]) == (1, 2)
    assert told["all"]["alone"]["mean"] == pytest.approx(0.7) and told["all"]["difference"] == pytest.approx(-1 / 60)


def test_one_seed_judges_nothing(learning):
    told = learning.compare({"alone": {"a": [0.5]}, "together": {"a": [0.5]}})
    assert not told["adapters"]["a"]["within"] and told["adapters"]["a"]["in_sd"] is None
    assert told["within"] == 0


def test_a_result_says_nothing_of_where_a_machine_keeps_its_files(learning):
    without_paths = importlib.import_module("record").without_paths
    result = {
        "command": "python x.py --out /tmp/o/kills.json --base=/dev/shm/base run=1/2",
        "list": ["/a/b/c.py", 3, "a-0/0/58"],
    }
    assert without_paths(result) == {
        "command": "python x.py --out kills.json --base=base run=1/2",
        "list": ["c.py", 3, "a-0/0/58"],
    }
