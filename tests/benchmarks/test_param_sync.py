"""What benchmarks/param_sync.py makes of the notes, when a version is refused, and what its trainers do not write."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from weft.configs.schema import AdapterConfig
from weft.transport.errors import InstallError
from weft.transport.messages import AdapterRef


@pytest.fixture(scope="module")
def sync_bench(load):
    """benchmarks/sync_bench.py."""
    return load("sync_bench")


def passed(optimized: float, **later: float) -> dict[str, float]:
    hops = {"optimized": optimized, "ended": optimized + 0.001, "live": optimized + 0.002, "published": optimized + 0.030}
    return {**hops, **later, "canary_trainer": -300.0, "canary_sampler": -300.5}


def test_live_counts_from_the_optimizers_end_and_no_canary_is_in_it(sync_bench):
    told = sync_bench.times_of([passed(float(n), scored=n + 0.5, offered=n + 0.6) for n in range(5)])
    assert told["live_ms"]["p50"] == pytest.approx(2.0) and told["since_answer_ms"]["p50"] == pytest.approx(1.0)
    assert told["offered_ms"]["p50"] == pytest.approx(30.0)
    assert told["hops_ms"] == {
        "optimized": 0.0,
        "ended": 1.0,
        "live": 2.0,
        "scored": 500.0,
        "offered": 600.0,
        "published": 30.0,
    }
    assert told["audited"]["canary_difference"] == {"median": 0.5, "max": 0.5, "count": 5}


def test_a_sync_that_was_not_audited_counts_among_all_and_not_among_the_audits(sync_bench):
    quick = {name: value for name, value in passed(1.0, published=1.004).items() if not name.startswith("canary")}
    told = sync_bench.times_of([quick, quick, passed(2.0)])
    assert told["offered_ms"]["p50"] == pytest.approx(4.0) and told["offered_ms"]["count"] == 3
    assert told["audited"]["offered_ms"]["p50"] == pytest.approx(30.0) and told["audited"]["canary_difference"]["count"] == 1
    assert "audited" not in sync_bench.times_of([quick])


class Pools:
    """Adapters come and go."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.audit_every = 8
        self.samplers = self.trainers = self.sync = self

    async def add(self, config: AdapterConfig, lineage: int) -> None:
        self.present.add(config.name)

    async def drop(self, name: str) -> None:
        self.present.discard(name)


def bench_that_refuses(sync_bench, version: int):
    """The engine's canary of `version` is not the trainer's."""

    class Bench(sync_bench.Bench):
        async def step(self, adapters):
            self.versions[adapters[0].name] += 1
            return 0.0

        async def publish(self, adapter):
            ref = self.ref(adapter)
            apart = 7.0 if ref.version == version else 0.25
            assert self.running.sync.audit_every == (1 if ref.version else 8)
            self.hops[str(ref)] = {"canary_trainer": -300.0, "canary_sampler": -300.0 - apart, "canary_base": -290.0}
            if ref.version == version:
                raise InstallError(f"{ref} is refused\nsecond line")
            return 0.0, None

        async def notes(self):
            hops, self.hops = self.hops, {}
            return None, hops

    config = SimpleNamespace(adapters=[AdapterConfig(name="a-0"), AdapterConfig(name="a-1")])
    return Bench(config, Pools(), Path(), {"a-0": 0, "a-1": 0})


def test_a_version_is_live_when_the_last_sampler_has_it(sync_bench, tmp_path):
    class Noted:
        """A process with these notes."""

        def __init__(self, notes, gaps=None):
            self.notes, self.gaps = notes, gaps

        async def request(self, message):
            (Path(message.folder) / sync_bench.NOTES_FILE).write_text(json.dumps(self.notes))
            if self.gaps is not None:
                np.save(Path(message.folder) / sync_bench.GAPS_FILE, np.array(self.gaps))

    first = Noted({"a/0/1": {"heard": 3.0, "live": 4.0}}, [[1.0, 0.1, 0]])
    second = Noted({"a/0/1": {"heard": 2.0, "live": 6.0}}, [])
    trainers = [Noted({"a/0/1": {"optimized": 1.0}}), Noted({"b/0/1": {"optimized": 1.5}})]
    pools = SimpleNamespace(
        samplers=SimpleNamespace(_members=[first, second]),
        trainers=SimpleNamespace(_members=trainers),
        sync=SimpleNamespace(_member=Noted({"a/0/1": {"asked": 1.2}})),
    )
    bench = sync_bench.Bench(None, pools, tmp_path, {}, hops={"a/0/1": {"published": 7.0}})
    gaps, hops = asyncio.run(bench.notes())
    assert gaps.tolist() == [[1.0, 0.1, 0]]
    assert hops["a/0/1"] == {"optimized": 1.0, "asked": 1.2, "heard": 3.0, "live": 6.0, "published": 7.0}
    assert hops["b/0/1"] == {"optimized": 1.5}


def test_a_version_that_is_refused_is_published_once_more_and_then_the_drift_ends(sync_bench):
    bench = bench_that_refuses(sync_bench, 3)
    told = asyncio.run(sync_bench.drift(bench, 10))
    assert [row[0] for row in told["series"]] == [1, 2, 3, 3]
    assert [row[2] for row in told["series"]] == [-300.25, -300.25, -307.0, -307.0]
    assert told["refused"] == [f"{AdapterRef('drift', 0, 3)} is refused"] * 2
    assert bench.running.present == set(), "the adapter that made way, and the one that drifted"
    assert bench.running.sync.audit_every == 8, "what follows is measured as it runs"


def test_a_drift_that_nothing_refuses_has_a_row_a_step(sync_bench):
    told = asyncio.run(sync_bench.drift(bench_that_refuses(sync_bench, 99), 6))
    assert [row[0] for row in told["series"]] == [1, 2, 3, 4, 5, 6] and not told["refused"]


def test_trainers_of_the_policies_write_nothing_and_do_all_else(sync_bench, tmp_path):
    policies = importlib.import_module("policies")
    pools = Pools()
    unsaved = policies.Unsaved(pools)
    asyncio.run(unsaved.add(AdapterConfig(name="a"), 0))
    assert asyncio.run(unsaved.save(AdapterRef("a", 0, 0), str(tmp_path))).checksums == {}
    asyncio.run(unsaved.export(AdapterRef("a", 0, 0), str(tmp_path)))
    assert pools.present == {"a"} and not list(tmp_path.iterdir())
