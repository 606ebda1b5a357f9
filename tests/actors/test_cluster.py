"""One real Ray cluster: a trivial actor is started, killed and started again, and at the end nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from weft.actors import process_tree
from weft.actors.cluster import STARTS, Cluster, RayMetrics
from weft.actors.member import Member
from weft.configs.schema import ClusterConfig
from weft.pipeline.run import leaves
from weft.transport.channel import Client
from weft.transport.errors import PeerDiedError, StartError
from weft.transport.messages import Done, DropAdapter, GetStatistics, SamplerStatistics

LONG_S = 120.0  # a deadline that nothing here may reach
ACTOR = '''
import asyncio, gc, os, subprocess, sys
from weft.transport.messages import Done, SamplerStatistics

class Trivial:
    """Has a child, as a sampler has its engine."""

    def __init__(self, refuses=False):
        self.refuses = refuses

    async def start(self):
        if self.refuses:
            raise ValueError("it does not want to")
        self.fatal = asyncio.get_running_loop().create_future()
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])

    async def aclose(self):
        self.child.kill()
        self.child.wait()

    async def handle(self, message):
        if type(message).__name__ == "DropAdapter":
            self.fatal.set_exception(RuntimeError("the engine has died"))
            return Done()
        if type(message).__name__ == "AddAdapter":
            await asyncio.Event().wait()
        collected = "collected" if any(one is Trivial for one in gc.get_objects()) else "frozen"
        seen = os.environ["OMP_NUM_THREADS"], os.getcwd(), collected
        return SamplerStatistics(os.getpid(), self.child.pid, seen, 0, 0, 0, 0.0)
'''


def ended(pid: int) -> bool:
    """Whether it has, heeded by its parent or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until_gone(pid: int) -> None:
    await asyncio.to_thread(process_tree.wait_gone, pid, LONG_S)
    assert ended(pid)


async def restarts_after_kill(cluster: Cluster) -> None:
    async def spawn() -> Any:
        return await cluster.start("trivial", "trivial_actor.Trivial", {}, environment={"OMP_NUM_THREADS": "3"})

    async def nothing() -> None:
        return None

    member = Member("trivial", spawn, Client)
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(member.keep(nothing, nothing))
        await member.wait_ready()
        first: SamplerStatistics = await member.request(GetStatistics())
        assert first.pid == member.pid
        assert first.live_versions == ("3", os.getcwd(), "frozen"), "no collection goes through what was there at the start"
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(PeerDiedError):
            while True:
                await member.request(GetStatistics())
        await member.wait_ready()
        second: SamplerStatistics = await member.request(GetStatistics())
        assert second.pid != first.pid
        await until_gone(first.engine_pid)  # killed with its parent, though nobody told it to end
        with pytest.raises(PeerDiedError):
            assert await member.request(DropAdapter("x")) == Done()  # its engine dies: so does it, now or before
            while True:
                await member.request(GetStatistics())
        await member.wait_ready()
        assert member.deaths == 2
        third: SamplerStatistics = await member.request(GetStatistics())
        keeping.cancel()
    await until_gone(third.pid)
    await until_gone(third.engine_pid)


async def says_why_it_did_not_start(cluster: Cluster) -> None:
    with pytest.raises(StartError, match="it does not want to"):
        await cluster.start("trivial", "trivial_actor.Trivial", {"refuses": True})
    with pytest.raises(StartError, match="Absent"):
        await cluster.start("trivial", "trivial_actor.Absent", {})
    with pytest.raises(StartError, match="needs 100 GPUs, and Ray has"):
        await cluster.start("trivial", "trivial_actor.Trivial", {}, gpus=100)


async def shows_metrics(cluster: Cluster) -> None:
    import ray

    metrics = RayMetrics()
    for value in (0.25, 0.5):
        metrics.record("weft_reward_mean", value, {"adapter": "calc"})
        metrics.record("weft_tokens_trained", 100.0, {"adapter": "calc"})
        metrics.record("weft_time_step", 2.0, {"adapter": "calc"})
    wanted = {"reward_mean": 0.5, "tokens_trained_total": 200.0, "time_step_count": 2.0}
    shown: dict[str, float] = {}

    def read() -> str:
        with contextlib.suppress(OSError):  # Ray's agent may not listen yet
            return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S).read().decode())
        return ""

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LONG_S):
            while shown != wanted:  # Ray reports what it has every few seconds
                port = ray.nodes()[0]["MetricsExportPort"]
                lines = [line.removeprefix("ray_weft_") for line in (await asyncio.to_thread(read)).splitlines()]
                of_calc = [line for line in lines if 'adapter="calc"' in line]
                shown = {name: float(line.split()[-1]) for line in of_calc if (name := line.split("{")[0]) in wanted}
                metrics.record("weft_reward_mean", 0.5, {"adapter": "calc"})  # or Ray forgets it while the others come
                await asyncio.sleep(0.2)
    assert shown == wanted


def test_a_killed_actor_is_replaced_a_refusing_one_says_why_and_nothing_is_left_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trivial_actor.py").write_text(ACTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(psutil.Process().children(recursive=True))

    async def law() -> Cluster:
        whole = Cluster(ClusterConfig(dashboard_port=0, start_deadline_s=500), str(tmp_path / "out"), dashboard=False)
        async with asyncio.timeout(600), whole as cluster:
            assert cluster.shared_folder.is_dir()
            await restarts_after_kill(cluster)
            await says_why_it_did_not_start(cluster)
            await shows_metrics(cluster)
            left_running = await cluster.start("trivial", "trivial_actor.Trivial", {})
            client = Client(left_running.endpoint)
            pids.extend([left_running.pid, (await client.request(GetStatistics(), LONG_S)).engine_pid])
            await client.aclose()
            return cluster

    pids: list[int] = []
    cluster = asyncio.run(law())
    for pid in pids:
        process_tree.wait_gone(pid, LONG_S)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not cluster.shared_folder.exists()
    assert any((tmp_path / "out" / "logs").iterdir())


def test_rays_own_death_ends_the_run_at_once_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trivial_actor.py").write_text(ACTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    left: list[psutil.Process] = []
    killed = 0.0

    async def nothing() -> None:
        return None

    async def law() -> None:
        nonlocal killed
        whole = Cluster(ClusterConfig(dashboard_port=0, start_deadline_s=500), str(tmp_path / "out"), dashboard=False)
        async with asyncio.timeout(600), whole as cluster, asyncio.TaskGroup() as tasks:
            member = Member("trivial", lambda: cluster.start("trivial", "trivial_actor.Trivial", {}), Client)
            tasks.create_task(member.keep(nothing, nothing))
            await member.wait_ready()
            statistics: SamplerStatistics = await member.request(GetStatistics())
            left.extend(map(psutil.Process, (statistics.pid, statistics.engine_pid)))
            (raylet,) = process_tree.named(process_tree.children_of_this(cluster._ray_folder), ["raylet"])
            os.kill(raylet.pid, signal.SIGKILL)
            killed = time.monotonic()
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as ended:
        asyncio.run(law())
    assert time.monotonic() - killed < LONG_S
    said = [str(error) for error in leaves(ended.value) if isinstance(error, PeerDiedError)]
    assert said and "raylet" in said[0], said
    assert not any(process_tree.runs(process) for process in left)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not list(Path("/dev/shm").glob(f"weft-{Cluster(ClusterConfig(), str(tmp_path / 'out')).run_id}"))


def test_a_ray_that_does_not_answer_in_time_is_started_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[int]()

    def times_out(self: Cluster) -> None:
        tried.append(len(tried))
        raise Exception(f"the current node timed out during startup {len(tried)}")

    async def law() -> None:
        async with Cluster(ClusterConfig(), str(tmp_path / "out"), dashboard=False):
            raise AssertionError("there is no Ray")

    monkeypatch.setattr(Cluster, "_init_ray", times_out)
    with pytest.raises(StartError, match=f"Ray did not start: .* {STARTS}"):
        asyncio.run(law())
    assert len(tried) == STARTS > 2
