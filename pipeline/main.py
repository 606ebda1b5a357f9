"""`weft`: from the command line to a finished run. The one file of the pipeline that knows the actors.

    arguments ──compose, expand──> Config ──preflight──> lock the output folder ──> cluster ──> pools ──> pipeline ──> summary

Exit status: 0 every adapter finished; 1 one failed, or the run could not go on; 2 a mistake of the user's, said before anything
is started or written; 130 interrupted (the same command goes on from the last checkpoints, where there are any).
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
import yaml
from rich.console import Console

from weft.actors.preflight import check_output, preflight, writing
from weft.configs.build import SettingError
from weft.configs.compose import compose
from weft.configs.expand import expand, to_mapping
from weft.configs.schema import Config
from weft.pipeline.checkpoint import Checkpoints, check_resume
from weft.pipeline.events import Phase, PipelineStatistics
from weft.pipeline.folder import hold, is_run, move_aside
from weft.pipeline.help import help_text
from weft.pipeline.history import History
from weft.pipeline.interfaces import Pools
from weft.pipeline.members import Counting, Members
from weft.pipeline.metrics import Metrics
from weft.pipeline.recovery import KEEP, goes_on
from weft.pipeline.run import Pipeline, leaves
from weft.pipeline.samples import Samples
from weft.pipeline.summary import print_closing, summarize, write_summary
from weft.pipeline.table import make_table
from weft.pipeline.trace import TRACE_FILE, Trace
from weft.transport.errors import CheckpointError, RemoteError, WeftError

if TYPE_CHECKING:  # what takes seconds to import waits until the settings have been read
    from weft.actors.cluster import RayMetrics
    from weft.actors.wiring import RunningPools

FINISHED, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # which weft cannot help
WIDTH = 120
SUMMARY_FILE, CONFIG_FILE = "summary.json", "config.yaml"


class _Output(Console):
    """Standard output. A reader that goes away (weft ... | head) ends the run in order, and stderr says so."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()  # which writes no more
        except SystemExit:
            raise WeftError("whoever read the output has closed it") from None


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM interrupts as SIGINT does, from the first moment on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_terminable()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console: Console = _Output()
    if not console.is_terminal:
        console = _Output(width=WIDTH)  # a pipe or a file has none of its own
    config: Config | None = None
    try:
        options, overrides = _parse(arguments)
        if "help" in options:
            print(help_text(options.get("config-dir")))
            return FINISHED
        config = expand(compose(overrides, options.get("config-dir")))
        if "cfg" in options:
            print(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True), end="")
            return FINISHED
        return _run(config, console)
    except SettingError as error:
        print(f"weft: {error}", file=sys.stderr)
        return MISTAKE
    except WeftError as error:
        print(f"weft: {_told(error)}\n{_what_next(config)}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"weft: {error}\n{_what_next(config)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"weft: interrupted; {_what_next(config)}", file=sys.stderr)
        return INTERRUPTED


def _told(error: WeftError) -> str:
    """A disk that a process of the pools finds full is one line, as one that is found full here; what else it met has its
    traceback."""
    of_disk = isinstance(error, RemoteError) and error.kind in ("OSError", "PermissionError")
    if of_disk and any(f"[Errno {number}]" in str(error.args[0]) for number in DISK):
        return str(error.args[0])
    return str(error)


def _what_next(config: Config | None) -> str:
    """What the same command does, by what is on the disk now. config: None if this one ended before it had read its own."""
    if config is None:
        return "nothing has been started"
    try:
        checkpointed = any(Checkpoints(config.run.dir, adapter.name, KEEP).exist() for adapter in config.adapters)
    except OSError:  # the disk is what ended the run, and cannot be asked
        checkpointed = True
    if not checkpointed:
        return "no checkpoint has been written yet; the same command starts anew"
    return f"the same command{' without run.fresh=true' if config.run.fresh else ''} goes on from the last checkpoints"


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options by name, and what is left: overrides."""
    options: dict[str, str] = {}
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif argument in ("--help", "-h"):
            options["help"] = ""
        elif argument == "--cfg":
            options["cfg"] = ""
        elif name == "config-dir":
            value = value or next(rest, "")
            if not value:
                raise SettingError("--config-dir: must be followed by a folder")
            options[name] = value
        else:
            raise SettingError(f"{argument}: there is no such option (there are: --help, --cfg, --config-dir DIR)")
    return options, overrides


def _run(config: Config, console: Console) -> int:
    """Check everything, then take the output folder, then run."""
    began = time.monotonic()
    folder = Path(config.run.dir)
    with ExitStack() as held:
        check_output(config.run.dir)
        is_held = is_run(folder)
        if is_held:
            held.enter_context(hold(folder))
        found: dict[str, int] = {}
        mistakes: list[SettingError] = []
        if not config.run.fresh:
            try:
                found = _check_resume(config)
            except SettingError as error:
                mistakes.append(error)
            if not mistakes and _is_finished(config):
                _say_finished(folder, console)
                return FINISHED
        notices: Sequence[str] = ()
        try:
            notices = preflight(config)
        except SettingError as error:
            mistakes.insert(0, error)
        if mistakes:  # one line each: the configuration's own does not hide behind that it is not the earlier run's
            raise SettingError("\n".join(map(str, mistakes)))
        with writing(config.run.dir):
            _take_folder(config, held, is_held, console)
        if found:
            console.print(goes_on(config.adapters, found, console.width), highlight=False)
        statistics = _train(config, notices, console)
        return _close(config, statistics, time.monotonic() - began, console)


def _take_folder(config: Config, held: ExitStack, is_held: bool, console: Console) -> None:
    """Make run.dir this run's. What is made here and cannot be written whole is taken away again.

    is_held: it was held before the checks, which take their time: another run may have begun there meanwhile.
    """
    folder = Path(config.run.dir)
    if not is_held and is_run(folder):
        held.enter_context(hold(folder))
        is_held = True
    if config.run.fresh:
        moved = move_aside(folder)
        held.close()
        is_held = False
        if moved is not None:
            console.print(f"the earlier run is now in {moved}", highlight=False)
    is_new = not folder.exists()
    try:
        if not is_held:
            held.enter_context(hold(folder, make=True))
        (folder / CONFIG_FILE).write_text(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True))
        (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of fewer steps
    except OSError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_resume(config: Config) -> dict[str, int]:
    """The version that each adapter with a checkpoint goes on from. Raises SettingError where one cannot."""
    found: dict[str, int] = {}
    before = _model_before(Path(config.run.dir) / CONFIG_FILE)
    for name, now in to_mapping(config.model).items():
        if before is not None and before.get(name) != now:
            raise SettingError(
                f"model.{name}={now!r}: must be {before.get(name)!r}, which the run in {config.run.dir} was begun on; "
                "run.fresh=true starts anew, run.dir=... elsewhere"
            )
    for adapter in config.adapters:
        try:
            check_resume(config.run.dir, adapter)
            version = Checkpoints(config.run.dir, adapter.name, KEEP).check()
        except ValueError as error:
            raise SettingError(str(error)) from None
        except CheckpointError as error:
            anew = "run.fresh=true starts anew (and moves what is there aside)"
            raise SettingError(f"run.dir={config.run.dir!r}: of adapter {adapter.name!r} {error}; {anew}") from None
        if version is not None:
            found[adapter.name] = version
    return found


def _model_before(file: Path) -> dict[str, object] | None:
    """The model section of the configuration that an earlier command left; None: there was none, or it was cut short."""
    try:
        saved = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    model = saved.get("model") if isinstance(saved, dict) else None
    return model if isinstance(model, dict) else None


def _is_finished(config: Config) -> bool:
    folder = config.run.dir
    done = (Checkpoints(folder, adapter.name, KEEP).finished(adapter) for adapter in config.adapters)
    return (Path(folder) / SUMMARY_FILE).is_file() and all(progress is not None for progress in done)


def _say_finished(folder: Path, console: Console) -> None:
    console.print(f"this run has finished: {folder / SUMMARY_FILE}", highlight=False, soft_wrap=True)
    console.print("run.fresh=true starts it anew (and moves what is there aside); a larger num_steps goes on", highlight=False)


def _train(config: Config, notices: Sequence[str], console: Console) -> PipelineStatistics:
    """The run itself. notices: what to warn of as it begins.

    Raises KeyboardInterrupt when it is interrupted, a single exception for whatever else ended it.
    """
    try:
        return uvloop.run(_session(config, notices, console))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except BaseExceptionGroup as group:
        first = next(leaves(group))
        if isinstance(first, WeftError | SettingError | OSError | KeyboardInterrupt):
            raise first from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the loop has left the default


async def _session(config: Config, notices: Sequence[str], console: Console) -> PipelineStatistics:
    """Start the cluster and its pools, run the pipeline on them, end them. However often it is told to end, it ends in order:
    a signal is heeded between two steps of the event loop, so none cuts short what cleans up."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for told in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(told) != signal.SIG_IGN:  # as of a job in the background
            loop.add_signal_handler(told, task.cancel)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
        loop.add_signal_handler(signal.SIGHUP, _end_without_terminal, task, [stream for stream in (1, 2) if os.isatty(stream)])
    from weft.actors.cluster import Cluster, RayMetrics
    from weft.actors.wiring import open_pools

    sizes = config.cluster
    named = f"{sizes.samplers} sampler(s), {sizes.trainers} trainer(s), 1 parameter sync ({sizes.sync.backend})"
    console.print(f"starting {named}: a minute or two", highlight=False)
    began = time.monotonic()

    def tell(process: str) -> None:
        console.print(f"{process} is ready after {time.monotonic() - began:.0f} s", highlight=False)

    async with Cluster(sizes, config.run.dir) as cluster:
        if cluster.dashboard:
            console.print(f"Ray dashboard: {cluster.dashboard}", highlight=False)
        async with open_pools(config, cluster, str(cluster.shared_folder)) as running:
            await running.wait_ready(tell)
            return await _watch(config, notices, running, cluster.dashboard, RayMetrics(), console)


def _end_without_terminal(task: asyncio.Task[PipelineStatistics], streams: Sequence[int]) -> None:
    """The terminal is closed: end in order. What would still be said to it would fail, half-way through that."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)
    task.cancel()


async def _watch(
    config: Config, notices: Sequence[str], running: RunningPools, dashboard: str, gauges: RayMetrics, console: Console
) -> PipelineStatistics:
    """Run the pipeline under the eyes of the table and the metrics."""
    pipeline: Pipeline

    def statistics() -> PipelineStatistics:
        return pipeline.statistics()

    with (
        Metrics(config.run.dir, record=gauges.record, statistics=statistics) as metrics,
        Trace(Path(config.run.dir) / TRACE_FILE) as trace,
        ExitStack() as shown,
    ):
        table = make_table(config.run.table, statistics, title=config.model.path, dashboard=dashboard, console=console)
        pools = Pools(running.samplers, running.trainers, running.sync)
        asked: dict[str, Counting] = {"samplers": running.samplers, "trainers": running.trainers, "sync": running.sync}
        members = Members(asked, lambda: statistics().time, metrics, lambda message: pipeline.warn(message))
        samples = Samples(config.run.dir, metrics.session, lambda message: pipeline.warn(message))
        observers = (metrics, trace, table, samples)
        pipeline = Pipeline(config.run, config.cluster.trainer, pools, observers, time.monotonic)
        shown.enter_context(table)
        for notice in notices:
            pipeline.warn(notice)
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(table.run()), tasks.create_task(members.run())]
            done = await pipeline.run(config.adapters)
            for task in beside:
                task.cancel()
        await members.ask()
        return done


def _close(config: Config, statistics: PipelineStatistics, wall_seconds: float, console: Console) -> int:
    """Write the summary and the report; the exit status says whether every adapter finished."""
    from weft.pipeline.report import write_report

    folder = Path(config.run.dir)
    history = History.read(folder)
    summary = summarize(statistics, history, wall_seconds, config.cluster)
    write_report(folder, history, summary, to_mapping(config))
    write_summary(folder / SUMMARY_FILE, summary)  # last: with it the run counts as finished
    print_closing(summary, console)
    console.print(f"summary: {folder / SUMMARY_FILE}   report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return FINISHED if all(adapter.phase == Phase.FINISHED for adapter in statistics.adapters.values()) else FAILED


if __name__ == "__main__":
    sys.exit(main())
