"""Ray, in one file: one process an actor, its readiness under a deadline, its death as an event, and a clean end.

    Cluster ──start(name, target, arguments)──> _Host in a process of its own: makes the actor, serves it over the channel
            <──── Process: endpoint, pid, wait_death(), stop()
                        wait_death waits for the host's one long call, `run`, which only the process's end or `stop` ends

Control does not go through Ray but over transport.channel; Ray places, watches and shows. A local cluster binds loopback alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from weft.actors import heap, process_tree, signals
from weft.actors.preflight import gpu_message
from weft.configs.build import SettingError
from weft.configs.schema import ClusterConfig
from weft.transport.channel import Server
from weft.transport.errors import PeerDiedError, StartError
from weft.transport.variables import variables

HOST = "127.0.0.1"
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # nothing but loopback reaches it
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux: every port binds 127.0.0.1
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
ACTOR_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
STOP_DEADLINE_S = 20.0
RAY_SERVERS = ("raylet", "gcs_server")  # without either of them Ray starts, ends and watches nothing, and says so minutes later
WATCH_S = 0.25
STARTS = 4  # of Ray that may fail, and the last one counts
PROCESSES_FILE = "processes.jsonl"
COUNTERS = ("weft_tokens_sampled", "weft_tokens_trained")
HISTOGRAMS = "weft_time_"
AGAIN = 50  # gauges set again with each that is set, at most: 3.4 us each
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
_log = logging.getLogger(__name__)


class _Host:
    """In the actor's process. `run` returns when `close` is called; until then its ObjectRef is the process's life.

    An actor may have a future `fatal`: its exception (of a sampler whose engine has died) ends `run`, and so the process.
    """

    def __init__(
        self, target: str, arguments: Mapping[str, Any], environment: Mapping[str, str], folder: str, path: list[str]
    ) -> None:
        os.environ.update(environment)  # before the target's imports: torch and vLLM read it once
        os.chdir(folder)  # where the command was given: a user's paths may be relative to it
        sys.path.extend(entry for entry in path if entry not in sys.path)
        module, name = target.rsplit(".", 1)
        self._actor = getattr(importlib.import_module(module), name)(**arguments)
        self._server = Server(self._actor.handle)

    async def start(self) -> tuple[str, int]:
        await self._actor.start()
        heap.freeze()
        return await self._server.start(f"tcp://{HOST}:0"), os.getpid()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch())
            await self._server.serve()
            watching.cancel()

    async def _watch(self) -> None:
        if hasattr(self._actor, "fatal"):
            await asyncio.shield(self._actor.fatal)

    async def close(self) -> None:
        await self._server.aclose()
        await self._actor.aclose()


class Process:
    """One actor's process, as long as it lives."""

    def __init__(self, name: str, handle: Any, endpoint: str, pid: int) -> None:
        self.name = name
        self.endpoint = endpoint
        self.pid = pid
        self._handle = handle
        self._lost = False
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.wrap_future(handle.run.remote().future()).add_done_callback(self._note_end)

    async def wait_death(self) -> str:
        """Wait for the end of the process; returns why, in one line."""
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        """End the actor in order, and the process in any case."""
        import ray
        from ray.exceptions import RayError

        if not self._death.done():
            closing = asyncio.wrap_future(self._handle.close.remote().future())
            closing.add_done_callback(_heard)
            await asyncio.wait((closing, self._death), timeout=STOP_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if not self._lost:
            with contextlib.suppress(RayError):
                ray.kill(self._handle)
        await self.wait_death()
        # The next process needs the GPU memory that this one holds until the kernel has taken it away.
        await asyncio.to_thread(process_tree.wait_gone, self.pid, STOP_DEADLINE_S)

    def lose(self, why: str) -> None:
        """End it without Ray, which is no more."""
        if not self._death.done():
            self._lost = True
            process_tree.kill(self.pid)
            self._end(f"{self.name} (pid {self.pid}) ended: {why}")

    def _note_end(self, run: asyncio.Future[None]) -> None:
        from ray.exceptions import RayActorError

        error = None if run.cancelled() else run.exception()
        if isinstance(error, RayActorError):  # what Ray says here fits every death
            self._end(f"{self.name} (pid {self.pid}) was killed or crashed")
        elif error is not None:
            self._end(f"{self.name} (pid {self.pid}) ended: {_cause(error).splitlines()[-1].lstrip(' +-|')}")
        else:
            self._end(f"{self.name} (pid {self.pid}) closed")

    def _end(self, why: str) -> None:
        if not self._death.done():
            self._death.set_result(why)


class Cluster:
    """Ray for one run, as an async context manager; at its exit nothing of the run is left: no process, no shared memory
    (but of each vLLM engine two kilobytes under the temporary folder and a semaphore of 32 bytes, with names of its own).

    `folder` is the output folder: its path names the run, so that a run started again finds and removes what a killed one left.
    Raises SettingError when the cluster has fewer GPUs than the pools ask for, StartError when Ray itself does not start; ends
    the block with PeerDiedError, in an ExceptionGroup, as soon as a process of Ray's own has died.
    """

    def __init__(self, config: ClusterConfig, folder: str, dashboard: bool = True) -> None:
        self._config = config
        self._with_dashboard = dashboard
        self.run_id = hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:8]
        shared = Path("/dev/shm")
        self.shared_folder = (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"weft-{self.run_id}"
        self._folder = Path(folder)
        self.log_folder = self._folder / "logs"
        self.dashboard = ""
        self._names: dict[str, str] = {}  # of the processes that were started, by pid
        self._processes: list[Process] = []
        self._families = process_tree.Families()  # all that has to be gone at the end
        self._watching = asyncio.TaskGroup()
        # Unix sockets have paths of at most 107 bytes, and Ray puts 60 of its own behind this one.
        self._ray_folder = Path(tempfile.gettempdir()) / f"weft-ray-{self.run_id}"

    async def __aenter__(self) -> Cluster:
        self._remove_leftovers()
        try:
            # On this thread, though it blocks: Ray's own processes end with the thread that started them.
            self._start_ray()
            self._check_gpus()
            self.shared_folder.mkdir(mode=0o700, parents=True)
        except BaseException:
            self._stop_ray()
            raise
        await self._watching.__aenter__()
        self._watch_task = self._watching.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch_task.cancel()
        try:
            await self._watching.__aexit__(kind, error, trace)
        finally:
            self._stop_ray()

    async def start(
        self,
        name: str,
        target: str,
        arguments: Mapping[str, Any],
        gpus: float = 0,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Start the class `target` (dotted path) in a process of its own, and wait until it is ready.

        environment: variables set in that process before anything of the target is imported.
        Raises StartError, which carries the traceback, when it does not start, or not within `start_deadline_s`.
        """
        import ray
        from ray.exceptions import RayError

        there = int(ray.cluster_resources().get("GPU", 0))
        if gpus > there:  # Ray would wait for one for ever
            raise StartError(f"{name} needs {gpus:g} GPUs, and Ray has {there}")
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 16}
        variables = {**ACTOR_ENVIRONMENT, **(environment or {})}
        where = (os.getcwd(), list(sys.path))
        handle: Any = ray.remote(_Host).options(**options).remote(target, dict(arguments), variables, *where)
        try:
            async with asyncio.timeout(self._config.start_deadline_s):
                endpoint, pid = await asyncio.wrap_future(handle.start.remote().future())
        except RayError as error:
            raise StartError(f"{name} did not start: {_cause(error)}\nwhat it wrote is in {self.log_folder}") from None
        except TimeoutError:
            ray.kill(handle)
            limit = f"cluster.start_deadline_s={self._config.start_deadline_s:g}"
            raise StartError(f"{name} was not ready within {limit}; free in Ray: {ray.available_resources()}") from None
        except asyncio.CancelledError:
            ray.kill(handle)
            raise
        self._note(name, endpoint, pid)
        process = Process(name, handle, endpoint, pid)
        self._processes.append(process)
        return process

    async def _watch(self) -> None:
        servers = process_tree.named(process_tree.children_of_this(self._ray_folder), RAY_SERVERS)
        while not (dead := [server for server in servers if not process_tree.runs(server)]):  # noqa: ASYNC110  it wakes nobody
            await asyncio.sleep(WATCH_S)
        why = f"Ray's {' or '.join(RAY_SERVERS)} (pid {dead[0].pid}) was killed or crashed"
        for process in self._processes:
            process.lose(why)
        raise PeerDiedError(why)

    def _note(self, name: str, endpoint: str, pid: int) -> None:
        """One line a started process: which pid is which, and how often it had to be started."""
        self._names[str(pid)] = name
        self._families.note(pid)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / PROCESSES_FILE).open("a") as file:
            file.write(json.dumps({"time": time.time(), "name": name, "pid": pid, "endpoint": endpoint}) + "\n")

    def _start_ray(self) -> None:
        """Again if it fails: a busy machine can be too slow for the 30 s in which Ray wants its raylet to answer."""
        for attempt in range(1, STARTS + 1):
            try:
                return self._init_ray()
            except Exception as error:  # Ray raises a bare Exception for that
                if attempt == STARTS:
                    raise StartError(f"Ray did not start: {error}") from error
                _log.warning("Ray did not start, and is started again: %s", error)
                self._stop_ray()
        return None

    def _init_ray(self) -> None:
        # A terminal that closes tells this process's group, which Ray's servers are in: they live until this one ends them.
        # Ray's handlers of SIGTERM, in Python and then in C++, would end this one there and then.
        with variables(RAY_ENVIRONMENT), signals.blocked(signal.SIGHUP), signals.kept(signal.SIGTERM):
            import ray

            context = ray.init(
                address="local",
                num_cpus=1,  # actors take none, so placement never waits for one
                include_dashboard=self._with_dashboard,
                dashboard_host=HOST,
                dashboard_port=self._config.dashboard_port or _free_port(),
                object_store_memory=80 * 2**20,  # about the least that Ray takes; no tensor goes through it
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._ray_folder),
                # An engine is a child of its sampler: killed with it, and never left behind.
                _system_config={"process_group_cleanup_enabled": True},
            )
        self.dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""

    def _check_gpus(self) -> None:
        import ray

        there = int(ray.cluster_resources().get("GPU", 0))
        if self._config.gpus > there:
            raise SettingError(gpu_message(self._config, there))

    def _stop_ray(self) -> None:
        import ray

        for server in process_tree.children_of_this(self._ray_folder):
            self._families.note(server.pid)
        self._families.note_all()
        ray.shutdown()
        self._families.end()
        self._keep_logs()
        self._remove_leftovers()

    def _keep_logs(self) -> None:
        """What each process wrote, as logs/<name>.<pid>.err and .out beside the run's other output; Ray's own folder goes."""
        for file in (self._ray_folder / "session_latest" / "logs").glob("worker-*-*.*"):
            pid = file.stem.rsplit("-", 1)[-1]
            if file.suffix in (".out", ".err") and file.stat().st_size:
                self.log_folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.log_folder / f"{self._names.get(pid, 'not-started')}.{pid}{file.suffix}")

    def _remove_leftovers(self) -> None:
        for folder in (self.shared_folder, self._ray_folder):
            shutil.rmtree(folder, ignore_errors=True)


class RayMetrics:
    """The numbers of a run as Ray metrics: `weft_reward_mean` appears as `ray_weft_reward_mean` in Ray's Prometheus text.

    Tokens of each step add up in a counter, seconds fill a histogram, and of everything else a gauge shows the newest value:
    Ray forgets a gauge that nobody has set for two of its reports, so what is older than half of one is set again.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._shown: dict[Any, tuple[float, float]] = {}  # by name and tags: the value and when it was set, oldest first

    def record(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """One value; a name has the same tag names for ever."""
        import ray
        from ray.util import metrics

        if (metric := self._metrics.get(name)) is None:
            keys = tuple(sorted(tags))
            if name in COUNTERS:
                metric = metrics.Counter(name, tag_keys=keys)
            elif name.startswith(HISTOGRAMS):
                metric = metrics.Histogram(name, boundaries=SECONDS, tag_keys=keys)
            else:
                metric = metrics.Gauge(name, tag_keys=keys)
            self._metrics[name] = metric
        if isinstance(metric, metrics.Counter):
            if value > 0:
                metric.inc(value, tags=dict(tags))
        elif isinstance(metric, metrics.Histogram):
            metric.observe(value, tags=dict(tags))
        else:
            self._show(name, tuple(tags.items()), value)
            kept = time.monotonic() - ray._config.metrics_report_interval_ms() / 2000
            for gauge, (old, at) in list(itertools.islice(self._shown.items(), AGAIN)):
                if at < kept:
                    self._show(*gauge, old)

    def _show(self, name: str, tags: tuple[tuple[str, str], ...], value: float) -> None:
        self._shown.pop((name, tags), None)
        self._shown[name, tags] = value, time.monotonic()
        self._metrics[name].set(value, tags=dict(tags))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _heard(reply: asyncio.Future[Any]) -> None:
    """Take note of what was raised, which is no news: asyncio would report it as forgotten."""
    if not reply.cancelled():
        reply.exception()


def _cause(error: BaseException) -> str:
    """What happened, the remote traceback with it."""
    return re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
