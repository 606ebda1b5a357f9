"""Do adapters that learn together end where the same adapters end alone?

    python benchmarks/learning.py cluster=h200x2    two GPUs, the base that ships -> benchmarks/results/learning-h200x2.json
    python benchmarks/learning.py                   the same on this CPU -> benchmarks/results/learning-cpu.json
    python benchmarks/learning.py --smoke           two adapters, two seeds, three steps; the result goes to the output folder

On one engine, for each seed: the demo's adapters all at once, then each with both pools to itself. An adapter is the same in
both: name, configuration and seed, hence first weights, prompts and held-out prompts; only its lineage differs, for no name of
weights is used twice. What may come out differently is what the others do to it: who shares its launches and batches, and how
stale its rollouts are within its bound. Steps are fewer than the demo's, so that ten runs of each fit into minutes.

final          held-out score after the last step, over the seeds: mean, and standard deviation (n - 1)
difference     of the means, together - alone
allowed        the standard deviation of alone; where that is below the one pooled over the adapters (the root of the mean of
               their variances), as it is for an adapter that ends at its best with every seed, the pooled one
all            the same for the mean over the adapters of each seed
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import experiments
from record import RESULTS, commit, hardware, versions, write_result

from weft.configs.schema import AdapterConfig, Config
from weft.pipeline.checkpoint import Checkpoints
from weft.pipeline.interfaces import Pools

ARMS = ("together", "alone")
STEPS, SEEDS, ADAPTERS = 10, 5, 8
SMOKE = ("every.batch_size=16", "every.eval_prompts=16")
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # by arm and adapter: final held-out scores, one a seed


def spread(scores: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(scores), "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0}


def compare(scores: Scores) -> dict[str, Any]:
    """Each adapter's two arms, and all of them at once. Nothing is judged before there are two seeds."""
    alone, together = ({name: spread(values) for name, values in scores[arm].items()} for arm in ("alone", "together"))
    pooled = statistics.fmean(own["sd"] ** 2 for own in alone.values()) ** 0.5
    found = {}
    for name, own in alone.items():
        found[name] = {
            "alone": own, "together": together[name],
            **judge(together[name]["mean"] - own["mean"], max(own["sd"], pooled), "own" if own["sd"] >= pooled else "pooled"),
        }  # fmt: skip
    whole = {arm: spread([statistics.fmean(seed) for seed in zip(*scores[arm].values(), strict=True)]) for arm in ARMS}
    difference = whole["together"]["mean"] - whole["alone"]["mean"]
    return {
        "adapters": found,
        "pooled_sd": pooled,
        "all": {**whole, **judge(difference, whole["alone"]["sd"], "own")},
        "within": sum(own["within"] for own in found.values()),
        "of": len(found),
    }


def judge(difference: float, allowed: float, by: str) -> dict[str, Any]:
    in_sd = difference / allowed if allowed else None
    return {"difference": difference, "allowed": allowed, "by": by, "in_sd": in_sd, "within": abs(difference) <= allowed > 0}


def seeded(adapters: Sequence[AdapterConfig], seed: int) -> list[AdapterConfig]:
    return [dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, seed=seed)) for one in adapters]


async def run_seed(config: Config, pools: Pools, seed: int, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Both arms of one seed: by arm, experiments.measure of it."""
    found = {}
    for number, arm in enumerate(ARMS):
        policy = experiments.Policy(f"seed-{seed}-{arm}")
        adapters = seeded(config.adapters, seed)
        for adapter in adapters:
            before = Checkpoints(str(Path(config.run.dir) / policy.name), adapter.name, keep=1)
            for _ in range(len(ARMS) * seed + number):  # lineages that earlier arms have used
                before.next_lineage()
        rounds = [[adapter] for adapter in adapters] if arm == "alone" else [adapters]
        await experiments.run_policy(config, pools, policy, rounds, clock)
        experiments.check({policy.name: policy}, adapters)
        found[arm] = experiments.measure(policy)
    return found


async def run(config: Config, seeds: int, write: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Every seed on one cluster; what there is is written after each."""
    from weft.actors import wiring
    from weft.actors.cluster import Cluster

    result: dict[str, Any] = {}
    async with (
        Cluster(config.cluster, config.run.dir, dashboard=False) as cluster,
        wiring.open_pools(config, cluster, str(cluster.shared_folder)) as running,
    ):
        await running.wait_ready()
        print("ready", flush=True)
        pools = Pools(running.samplers, running.trainers, running.sync)
        warm = dataclasses.replace(config.adapters[0], name="warm-up", num_steps=2, eval_prompts=0)
        await experiments.run_policy(config, pools, experiments.Policy("warm-up"), [[warm]], time.monotonic)
        runs: list[dict[str, Any]] = []
        for seed in range(seeds):
            began = time.monotonic()
            runs.append({"seed": seed, "arms": await run_seed(config, pools, seed)})
            names = [adapter.name for adapter in config.adapters]
            scores = {arm: {name: [run["arms"][arm]["held_out"][name][1] for run in runs] for name in names} for arm in ARMS}
            result = {**compare(scores), "seeds": len(runs), "runs": [told(run) for run in runs]}
            write(result)
            print(f"seed {seed}: {time.monotonic() - began:.1f} s, {result['within']} of {result['of']} within", flush=True)
    return result


def told(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the result keeps of one seed."""
    kept = ("held_out", "final_experiment_time", "steps", "max_staleness_seen", "staleness_violations", "adapters_per_launch")
    return {"seed": run["seed"], **{arm: {name: measured[name] for name in kept} for arm, measured in run["arms"].items()}}


def prepare(given: Sequence[str], smoke: bool, folder: str, steps: int, adapters: int) -> Config:
    """The demo's first adapters, all with so many steps, as the command line changes them."""
    quick = SMOKE if smoke else ()
    config = experiments.prepare([f"every.num_steps={steps}", "run.checkpoint_every=1000", *quick, *given], False, folder)
    return dataclasses.replace(config, adapters=config.adapters[:adapters])


def main(argv: Sequence[str] | None = None) -> int:
    import uvloop

    from weft.configs.expand import to_mapping
    from weft.pipeline.folder import hold, is_run, move_aside

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small; the result goes to the output folder")
    parser.add_argument("--steps", type=int, help=f"of each adapter; {STEPS}")
    parser.add_argument("--seeds", type=int, help=f"{SEEDS}")
    parser.add_argument("--adapters", type=int, help=f"the first so many of the demo's; {ADAPTERS}")
    parser.add_argument("--dir", default="outputs/learning", help="output folder; an earlier run there is moved aside")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("overrides", nargs="*", help="settings as `weft` takes them")
    arguments = parser.parse_args(argv)
    few = (3, 2, 2) if arguments.smoke else (STEPS, SEEDS, ADAPTERS)
    steps, seeds, adapters = (
        given or own for given, own in zip((arguments.steps, arguments.seeds, arguments.adapters), few, strict=True)
    )
    config = prepare(arguments.overrides, arguments.smoke, arguments.dir, steps, adapters)
    folder = Path(arguments.dir)
    if is_run(folder):
        with hold(folder):  # not under one that runs
            move_aside(folder)
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(experiments.VERSIONS)}
    place = next((one.removeprefix("cluster=") for one in arguments.overrides if one.startswith("cluster=h")), "cpu")
    out = arguments.out or (folder if arguments.smoke else RESULTS) / f"learning-{place}.json"
    command = shlex.join(["python", "benchmarks/learning.py", *(sys.argv[1:] if argv is None else argv)])
    began = time.monotonic()

    def write(found: Mapping[str, Any]) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        form = "smoke" if arguments.smoke else "full"
        settings = {"steps": steps, "seeds": seeds, **to_mapping(config)}
        result = {"benchmark": "learning", "form": form, "date": date, "command": command, **facts, "settings": settings}
        write_result(out, {**result, "measured": found, "wall_seconds": time.monotonic() - began})

    with hold(folder, make=True):
        measured = uvloop.run(run(config, seeds, write))
    tell(measured)
    print(f"-> {out}")
    return 0


def tell(measured: Mapping[str, Any]) -> None:
    """The result as a short table."""
    print(f"{'':24}{'alone':>16}{'together':>16}{'difference':>12}{'in sd':>8}")
    for name, own in [*measured["adapters"].items(), ("all", measured["all"])]:
        arms = "".join(f"{own[arm]['mean']:9.3f} ±{own[arm]['sd']:.3f}" for arm in ("alone", "together"))
        in_sd = "-" if own["in_sd"] is None else f"{own['in_sd']:.2f}"
        print(f"{name:24}{arms}{own['difference']:12.3f}{in_sd:>8}  {'within' if own['within'] else 'NOT within'}")


if __name__ == "__main__":
    sys.exit(main())
