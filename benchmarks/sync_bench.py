"""The running pools as param_sync.py uses them, and what their notes (measured.py) say of a sync."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measured import CANARIES, GAPS_FILE, NOTES_FILE

from weft.actors import wiring
from weft.actors.sync_pool import ParamSyncPool
from weft.configs.schema import AdapterConfig, Config
from weft.transport.errors import InstallError
from weft.transport.messages import UNSAMPLED, AdapterRef, Save, TrainBatch

ROW = 64  # tokens of a row that is trained
DRIFT = "drift"  # the adapter whose steps are large
DRIFT_RATE = 1e-3  # its learning rate
HOPS = ("optimized", "stepped", "ended", "publish_began", "handed", "asked", "heard", "taken", "told", "came", "live")
HOPS += ("applied", "scored", "offered", "distributed", "published")  # in about this order: measured.py says what each is


@dataclass
class Bench:
    """The running pools and where notes are written."""

    config: Config
    running: wiring.RunningPools
    folder: Path
    versions: dict[str, int]
    offered: dict[str, AdapterRef] = field(default_factory=dict)
    hops: dict[str, dict[str, float]] = field(default_factory=dict)  # those that this process sees

    def ref(self, adapter: AdapterConfig) -> AdapterRef:
        return AdapterRef(adapter.name, 0, self.versions[adapter.name])

    async def add(self, adapter: AdapterConfig) -> None:
        """On all pools, and published."""
        self.versions.setdefault(adapter.name, 0)
        await self.running.trainers.add(adapter, 0)
        await self.running.samplers.add(adapter, 0)
        await self.publish(adapter)

    async def drop(self, name: str) -> None:
        await self.running.samplers.drop(name)
        await self.running.trainers.drop(name)

    async def step(self, adapters: Sequence[AdapterConfig]) -> float:
        """One small optimizer step of each; returns when it had ended."""
        trainers, batches = self.running.trainers, defaultdict[Any, list[TrainBatch]](list)
        for adapter in adapters:
            batches[trainers.home(adapter.name)].append(batch_of(self.ref(adapter)))
        launches = await asyncio.gather(*map(trainers.step, batches.values()))
        ended = time.monotonic()
        faults = [result.fault for launch in launches for result in launch.results if result.fault]
        assert not faults, faults
        for adapter in adapters:
            self.versions[adapter.name] += 1
            self.hops[str(self.ref(adapter))] = {"ended": ended}
        return ended

    async def publish(self, adapter: AdapterConfig) -> tuple[float, Any]:
        """Returns when it was offered, and what the relay says of it."""
        ref = self.ref(adapter)
        before = dataclasses.replace(ref, version=ref.version - 1) if ref.version else None
        done = await self.running.sync.publish(ref, before)
        self.offered[adapter.name] = ref
        published = time.monotonic()
        self.hops.setdefault(str(ref), {})["published"] = published
        return published, done

    async def notes(self) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
        """Gaps (when, seconds, adapter), and when each version passed each hop, since the last call."""
        pools, arrays = self.running, []
        hops, self.hops = self.hops, {}
        for number, member in enumerate((*pools.samplers._members, *pools.trainers._members, pools.sync._member)):
            folder = self.folder / f"notes-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            await member.request(Save(AdapterRef("", 0, 0), str(folder)))
            if (gaps := folder / GAPS_FILE).exists():
                arrays.append(np.load(gaps).reshape(-1, 3))
            for version, passed in json.loads((folder / NOTES_FILE).read_text()).items():
                there = hops.setdefault(version, {})
                there |= {hop: max(time, there.get(hop, time)) for hop, time in passed.items()}  # the last sampler counts
        return np.concatenate(arrays), hops


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


def times_of(syncs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the hops of some syncs say."""
    audited = [passed for passed in syncs if "canary_trainer" in passed]
    apart = [abs(passed["canary_sampler"] - passed["canary_trainer"]) for passed in audited]
    here = [hop for hop in HOPS if all(hop in passed for passed in syncs)]
    return {
        "live_ms": spread_ms([passed["live"] - passed["optimized"] for passed in syncs]),
        "since_answer_ms": spread_ms([passed["live"] - passed["ended"] for passed in syncs]),
        "offered_ms": spread_ms([passed["published"] - passed["optimized"] for passed in syncs]),
        "hops_ms": {hop: round(statistics.median(one[hop] - one["optimized"] for one in syncs) * 1e3, 3) for hop in here},
        **({"audited": _audits(audited, apart)} if audited else {}),
    }


def _audits(syncs: Sequence[Mapping[str, float]], apart: Sequence[float]) -> dict[str, Any]:
    """apart: nats between each one's two canaries."""
    return {
        "offered_ms": spread_ms([passed["published"] - passed["optimized"] for passed in syncs]),
        "canary_difference": {"median": round(statistics.median(apart), 5), "max": round(max(apart), 5), "count": len(apart)},
    }


@contextmanager
def _every_version_audited(sync: ParamSyncPool) -> Iterator[None]:
    usual, sync.audit_every = sync.audit_every, 1
    try:
        yield
    finally:
        sync.audit_every = usual


async def drift(bench: Bench, steps: int) -> dict[str, Any]:
    """Syncs of one adapter whose steps are large, and the canary of each. In place of the last adapter. Ends at the first that
    is refused, which is published once more: the same difference again is no fault of the way. That it comes at once says
    nothing: on a deep random base bfloat16 alone is nats away from float32 under one version, and right under the next."""
    last = bench.config.adapters[-1]
    adapter = dataclasses.replace(
        last, name=DRIFT, optimizer=dataclasses.replace(last.optimizer, learning_rate=DRIFT_RATE, schedule="constant")
    )
    await bench.drop(last.name)
    await bench.add(adapter)
    await bench.notes()
    series, refused = list[list[float | None]](), list[str]()
    with _every_version_audited(bench.running.sync):
        while len(series) < steps and not refused:
            await bench.step([adapter])
            for _ in range(2):
                try:
                    await bench.publish(adapter)
                except InstallError as error:
                    refused.append(str(error).split("\n")[0])
                passed = (await bench.notes())[1][str(bench.ref(adapter))]
                found = [round(passed[name], 5) if name in passed else None for name in CANARIES]
                series.append([bench.versions[DRIFT], *found])
                if not refused:
                    break
    await bench.drop(DRIFT)
    return {"learning_rate": DRIFT_RATE, "columns": ["version", *CANARIES], "series": series, "refused": refused}
