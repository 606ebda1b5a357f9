"""The arithmetic of benchmarks/experiments.py, and what every committed result must say of itself."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from weft.configs.schema import AdapterConfig, ClusterConfig, Config, ModelConfig, RunConfig
from weft.pipeline.events import GroupSampled, LaunchEnded, Phase, PhaseChanged, PipelineStatistics, PoolStatistics, StepTaken
from weft.pipeline.interfaces import Pools

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def result(benchmark, simulation, tmp_path_factory):
    """(policies, their numbers) of four experiments on simulated pools: no durations but the mean ones."""
    folder = tmp_path_factory.mktemp("experiments")
    adapters = tuple(
        simulation.adapter_config(f"a.{i}", num_steps=3 + i, batch_size=8, group_size=4, max_staleness=i % 3) for i in range(4)
    )
    config = Config(RunConfig(dir=str(folder)), ModelConfig(), ClusterConfig(), adapters)
    policies = simulation.run_virtual(lambda: both(benchmark, simulation, config))
    benchmark.check(policies, adapters)
    return policies, {name: benchmark.measure(policy) for name, policy in policies.items()}


async def both(benchmark, simulation, config, names=("serial", "together")):
    world = simulation.World(random.Random(0), capacity=64, train_seconds=1.0, spread=False)
    samplers, trainers = simulation.SimulatedSamplers(world), simulation.SimulatedTrainers(world)
    pools = Pools(samplers, trainers, simulation.SimulatedSync(world, samplers, trainers))
    return await benchmark.run_both(config, pools, names, clock=asyncio.get_running_loop().time)


def pool(busy_seconds: float, load: float = 0.5) -> PoolStatistics:
    return PoolStatistics(capacity=8, in_flight=0, waiting=0, load=load, busy=0.0, busy_seconds=busy_seconds)


def pipeline(time: float, busy_seconds: float, load: float = 0.5) -> PipelineStatistics:
    return PipelineStatistics(time, {}, pool(busy_seconds, load), pool(busy_seconds, load))


def step(time: float, adapter: str, seconds: float = 1.0) -> StepTaken:
    return StepTaken(
        time, adapter, 0, 1, 1, 0.5, 0.1, (0, 1), 1, 8, 1.0, 0.0, 100, 200, seconds, 0.0, seconds, 0.0
    )  # fmt: skip


def test_experiment_times_are_of_the_ends_since_the_policy_began(benchmark):
    policy = benchmark.Policy("serial")
    for begun, name, length in ((0.0, "a.serial", 10.0), (10.0, "b.serial", 20.0), (30.0, "c.serial", 6.0)):
        observe = policy.observer(begun)
        observe(GroupSampled(2.0, name, 0, 0.5, 0, 8, 100, False))
        observe(GroupSampled(2.0, name, 0, 0.0, 0, 8, 100, True))
        observe(LaunchEnded(4.0, 1.5, {name: 200}))
        observe(step(5.0, name))
        observe(PhaseChanged(length, name, Phase.FINISHED))
        policy.pipelines.append(pipeline(length, length / 2))
    measured = benchmark.measure(policy)
    assert measured["ends"] == {"a": 10.0, "b": 30.0, "c": 36.0}
    assert measured["first_experiment_time"] == 10.0
    assert measured["mean_experiment_time"] == pytest.approx(76.0 / 3)
    assert measured["final_experiment_time"] == 36.0
    assert measured["rollout_time"] == {"median": 1.5, "p10": 1.5, "p90": 1.5, "count": 3}, "held-out rollouts are not counted"
    assert measured["step_time"]["median"] == 2.0 and measured["launch_time"]["median"] == 1.5
    assert measured["tokens_sampled"] == 300 and measured["tokens_trained_per_second"] == pytest.approx(600 / 36)
    assert measured["pools"]["samplers"]["busy"] == pytest.approx(0.5)
    assert measured["max_staleness_seen"] == 1 and measured["adapters_per_launch"] == 1.0


def test_busy_shares_weigh_each_pipeline_by_its_time(benchmark):
    shares = importlib.import_module("policy_numbers").share([(10.0, pool(10.0, load=1.0)), (30.0, pool(0.0, load=0.0))])
    assert shares == {"busy": 0.25, "load": 0.25, "capacity": 8}


def test_a_ratio_above_one_says_that_together_is_sooner(benchmark):
    names = ("first_experiment_time", "mean_experiment_time", "final_experiment_time")
    told = benchmark.ratios({"serial": dict.fromkeys(names, 30.0), "together": dict.fromkeys(names, 10.0)})
    assert [told[name]["value"] for name in names] == [3.0, 3.0, 3.0]
    assert {entry["baseline"] for entry in told.values()} == {"serial"}


def test_each_policy_does_what_its_name_says(benchmark, simulation, tmp_path):
    adapters = tuple(
        simulation.adapter_config(f"a.{i}", num_steps=4, batch_size=8, group_size=4, max_staleness=2) for i in range(3)
    )
    config = Config(RunConfig(dir=str(tmp_path)), ModelConfig(), ClusterConfig(), adapters)
    names = ("serial-on-policy", "lock-step", "one-a-launch", "staleness-0", "staleness-1")
    policies = simulation.run_virtual(lambda: both(benchmark, simulation, config, names))
    measured = {name: benchmark.measure(policy) for name, policy in policies.items()}
    for name, most in zip(names, (0, 0, 0, 0, 1), strict=True):
        assert measured[name]["max_staleness_seen"] <= most
        assert measured[name]["steps"] == 12
    assert measured["one-a-launch"]["adapters_per_launch"] == 1.0
    assert measured["staleness-1"]["adapters_per_launch"] > 1.0
    taken = [event for event in policies["lock-step"].events if isinstance(event, StepTaken)]
    assert [event.version for event in sorted(taken, key=lambda event: event.time)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    told = benchmark.versus(measured)
    assert set(told) == set(names[1:])
    assert {entry["baseline"] for entry in told.values()} == {"serial-on-policy"}
    assert told["staleness-0"]["final_experiment_time"] > 1.0


def test_no_policy_is_sooner_than_the_bound_of_its_pools(benchmark, simulation, tmp_path):
    adapters = tuple(simulation.adapter_config(f"a.{i}", num_steps=6, batch_size=8, group_size=4) for i in range(4))
    config = Config(RunConfig(dir=str(tmp_path)), ModelConfig(), ClusterConfig(), adapters)
    names = ("serial-on-policy", "lock-step", "one-a-launch", "staleness-0", "staleness-2")
    policies = simulation.run_virtual(lambda: both(benchmark, simulation, config, names))
    measured = {name: benchmark.measure(policy) for name, policy in policies.items()}
    found = benchmark.bound_of(measured, adapters)
    assert set(found["steps_per_second"]) == set(names)
    for name, steps in found["steps_per_second"].items():
        assert 0.1 < steps["share"] <= 1.001, (name, found)
    assert benchmark.bound_of({"staleness-0": measured["staleness-0"]}, adapters) == {}


def test_a_bound_by_the_trainer_grows_with_the_trainers(benchmark):
    def measured(rollout: float, trainers: int) -> dict:
        parts = {"rollout": {"median": rollout}, "sync": {"median": 0.0}}
        shares = {"trainers": {"capacity": trainers}}
        return {"step_parts": parts, "pools": shares, "train_seconds_a_step": 0.5, "steps": 8, "final_experiment_time": 8.0}

    for trainers, bound in ((1, 2.0), (2, 4.0)):
        names = ("serial-on-policy", "lock-step", "staleness-0")
        policies = {name: measured(1.0 if name.startswith("serial") else 1.1, trainers) for name in names}
        found = benchmark.bound_of(policies, range_of(8))["steps_per_second"]
        assert found["staleness-0"]["bound"] == pytest.approx(bound)
        assert found["staleness-0"]["share"] == pytest.approx(1 / bound)
        assert found["serial-on-policy"]["bound"] == pytest.approx(1 / (1.0 + 0.5 / trainers)), "its steps may be shared"


def range_of(number: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(max_staleness=0)] * number


def test_serial_experiments_have_all_trainers_to_themselves_and_warm_up_so(benchmark, simulation, tmp_path):
    expected = list[int]()

    class TwoTrainers(simulation.SimulatedTrainers):
        capacity = 2

        async def add(self, config: AdapterConfig, lineage: int) -> None:
            expected.append(self.expected)
            await super().add(config, lineage)

    async def run() -> object:
        world = simulation.World(random.Random(0), capacity=64, train_seconds=1.0, spread=False)
        samplers, trainers = simulation.SimulatedSamplers(world), TwoTrainers(world)
        pools = Pools(samplers, trainers, simulation.SimulatedSync(world, samplers, trainers))
        return await benchmark.run_both(config, pools, clock=asyncio.get_running_loop().time)

    adapters = tuple(simulation.adapter_config(f"a.{i}", num_steps=2, batch_size=8, group_size=4) for i in range(3))
    config = Config(RunConfig(dir=str(tmp_path)), ModelConfig(), ClusterConfig(), adapters)
    simulation.run_virtual(run)
    assert expected == [3, 3, 3, 1, 1, 1, 1, 3, 3, 3], "as each joined: all, then one, to warm up; serial; together"


def test_a_row_is_written_as_its_policy_ends_unless_it_has_not_finished(result, benchmark, simulation, tmp_path):
    policies, measured = result
    adapters = tuple(simulation.adapter_config(f"a.{i}") for i in range(4))
    config = Config(RunConfig(dir=str(tmp_path)), ModelConfig(), ClusterConfig(), adapters)
    assert benchmark.row_of(policies["together"], config) == measured["together"]
    assert json.loads((tmp_path / "together.trace.json").read_text()), "a trace of its middle"
    late = dataclasses.replace(config, adapters=(*adapters, simulation.adapter_config("a.late")))
    assert benchmark.row_of(policies["serial"], late) is None
    assert not (tmp_path / "serial.trace.json").exists()


def test_a_result_is_named_by_the_gpus_that_its_cluster_takes(benchmark, monkeypatch):
    record = importlib.import_module("record")
    monkeypatch.setattr(record, "_gpus", lambda: ["NVIDIA H200, 143771 MiB, 4 MiB"] * 4)
    for settings, name in (
        ({}, "cpu"),
        ({"gpus_per_sampler": 1.0, "gpus_per_trainer": 1.0}, "h200x2"),
        ({"samplers": 2, "trainers": 2, "gpus_per_sampler": 1.0, "gpus_per_trainer": 1.0}, "h200x4"),
        ({"gpus_per_sampler": 0.5, "gpus_per_trainer": 0.5}, "h200x1"),
    ):
        assert record.place(ClusterConfig(**settings)) == name
    monkeypatch.setattr(record, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB, 0 MiB"])
    assert record.place(ClusterConfig(gpus_per_sampler=0.5, gpus_per_trainer=0.5)) == "h100x1"


def test_serial_experiments_never_overlap_and_joint_ones_do(result):
    policies, measured = result
    serial = list(measured["serial"]["ends"].items())
    assert [name for name, _ in serial] == ["a.0", "a.1", "a.2", "a.3"]
    for (_, end), (name, _) in zip(serial, serial[1:], strict=False):
        own = [e.start for e in policies["serial"].events if isinstance(e, GroupSampled) and e.adapter == f"{name}.serial"]
        assert min(own) >= end
    assert measured["serial"]["adapters_per_launch"] == 1.0
    assert measured["together"]["adapters_per_launch"] > 1.5
    assert measured["together"]["final_experiment_time"] < measured["serial"]["final_experiment_time"]


def test_both_policies_do_the_same_work(result):
    _, measured = result
    assert measured["serial"]["steps"] == measured["together"]["steps"] == 3 + 4 + 5 + 6
    assert measured["serial"]["tokens_sampled"] == measured["together"]["tokens_sampled"]
    assert measured["serial"]["ends"].keys() == measured["together"]["ends"].keys()


def test_times_add_up_over_the_pipelines_of_a_policy(result, benchmark):
    policies, measured = result
    whole = benchmark.merged(policies["serial"].pipelines)
    assert whole.time >= measured["serial"]["final_experiment_time"]
    assert len(whole.adapters) == 4 and whole.staleness_violations == 0
    assert whole.trainers.busy == pytest.approx(measured["serial"]["pools"]["trainers"]["busy"])
    trained = sum(event.seconds for event in policies["serial"].events if isinstance(event, LaunchEnded))
    assert whole.trainers.busy_seconds == pytest.approx(trained, rel=0.05)


def test_an_experiment_that_did_not_finish_is_no_number(result, benchmark, simulation):
    policies, _ = result
    adapters = [simulation.adapter_config("another")]
    with pytest.raises(SystemExit, match="another"):
        benchmark.check(policies, adapters)


def test_a_spread_is_median_and_outer_deciles(benchmark):
    spread = importlib.import_module("record").spread
    assert spread(list(range(101))) == {"median": 50, "p10": 10.0, "p90": 90.0, "count": 101}
    assert spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0, "count": 1}
    assert spread([])["count"] == 0


def test_a_result_without_its_hardware_is_refused(benchmark, tmp_path):
    record = importlib.import_module("record")
    whole = dict.fromkeys(record.REQUIRED, "x") | {"hardware": record.hardware(), "versions": record.versions(["numpy"])}
    record.write_result(tmp_path / "x.json", whole)
    assert json.loads((tmp_path / "x.json").read_text()) == whole
    with pytest.raises(ValueError, match=r"lacks commit, hardware\.cpu"):
        record.write_result(tmp_path / "y.json", {**whole, "commit": "", "hardware": {"cores": 2}})
    assert not (tmp_path / "y.json").exists()


def test_the_smoke_form_asks_for_less_and_for_known_settings(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr("weft.actors.preflight.preflight", lambda config: None)
    config = benchmark.prepare([], True, str(tmp_path))
    assert len(config.adapters) == benchmark.SMOKE_ADAPTERS and {adapter.num_steps for adapter in config.adapters} == {4}
    assert len(benchmark.prepare(["every.num_steps=2"], False, str(tmp_path)).adapters) == 8


def test_every_committed_result_says_what_it_was_measured_on(benchmark):
    check_result = importlib.import_module("record").check_result
    seen = set()
    for path in sorted((ROOT / "benchmarks" / "results").glob("**/*.json")):
        result = json.loads(path.read_text())
        check_result(result)
        seen.add(result["benchmark"])
        if result["benchmark"] == "experiments":
            assert all(policy["staleness_violations"] == 0 for policy in result["policies"].values())
            if set(benchmark.POLICIES) <= set(result["policies"]):
                assert result["ratios"] == benchmark.ratios(result["policies"])
            else:
                assert result["versus"] == benchmark.versus(result["policies"])
    assert "experiments" in seen
