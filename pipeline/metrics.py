"""Everything that is measured, on its way out: files, TensorBoard, gauges. An observer of `events`.

`record(name, value, tags)` is a gauge of the outside (Ray gives it to Prometheus): name is a Prometheus name such as
`weft_reward_mean`, tags are {"adapter": ...}, {"pool": ...} or {"pool": ..., "member": ...}, always the same keys for one name.

In `folder`:
    metrics.jsonl         one line a step, appended; a step redone after a rollback or a resume has the same adapter and step,
                          and a later line (and, after a rollback or restore, a higher lineage): the last one counts
    events.jsonl          one line for each other event: phases, groups, launches, syncs, evaluations, failures, warnings, what
                          the pools' processes count; each session (the run, started again) opens with {"event": "Session", ...}
    tensorboard/<adapter>/events.out.tfevents.*
Names are those of the field: reward/mean, staleness/max, tokens/trained, loss, grad_norm, kl, entropy, logprob_diff,
eval/reward; env/<name> is the environment's own. reward/no_signal is the share of a step's groups that taught nothing: all
their advantages are 0. Numbers that are not finite are null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from weft.pipeline.events import (
    Evaluated,
    Event,
    LaunchEnded,
    MemberCounted,
    PipelineStatistics,
    RolloutsChanged,
    SampleTold,
    StepTaken,
)

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"

Record = Callable[[str, float, Mapping[str, str]], None]
Values = dict[str, float]


def step_values(event: StepTaken) -> Values:
    """The named numbers of one step, as they appear in every sink."""
    waited = event.rollout_seconds + event.queue_seconds
    seconds = waited + event.train_seconds + event.sync_seconds
    values: Values = {
        "reward/mean": event.reward,
        "reward/std": event.reward_std,
        "reward/no_signal": event.no_signal,
        "staleness/max": max(event.staleness, default=0),
        "staleness/mean": sum(event.staleness) / max(len(event.staleness), 1),
        "staleness/bound": event.max_staleness,
        "rollout/count": event.rollouts,
        "rollout/turns": event.turns,
        "rollout/truncated": event.truncated,
        "tokens/sampled": event.tokens_sampled,
        "tokens/trained": event.tokens_trained,
        "tokens/per_second": event.tokens_sampled / seconds if seconds > 0 else 0.0,
        "time/rollout": event.rollout_seconds,
        "time/queue": event.queue_seconds,
        "time/train": event.train_seconds,
        "time/sync": event.sync_seconds,
        "time/step": seconds,
    }
    values.update(event.metrics)
    values.update({f"env/{name}": value for name, value in event.environment.items()})
    return values


def step_line(event: StepTaken, session: int, at: float) -> dict[str, Any]:
    """One line of metrics.jsonl. time: seconds since this session began; at: Unix seconds."""
    line: dict[str, Any] = {
        "adapter": event.adapter,
        "lineage": event.lineage,
        "step": event.version,
        "num_steps": event.num_steps,
        "session": session,
        "time": event.time,
        "at": at,
    }
    line.update(step_values(event))
    line["staleness/groups"] = list(event.staleness)
    line["staleness/tokens"] = {str(age): count for age, count in event.token_ages.items()}
    return line


def event_line(event: Event, session: int, at: float) -> dict[str, Any]:
    """One line of events.jsonl: the event's own fields after its name."""
    return {"event": type(event).__name__, "session": session, "at": at, **dataclasses.asdict(event)}


def pool_values(statistics: PipelineStatistics) -> dict[str, Values]:
    """The numbers of each pool, by its name."""
    pools = {"samplers": statistics.samplers, "trainers": statistics.trainers}
    return {
        name: {"pool/busy": pool.busy, "pool/load": pool.load, "pool/in_flight": pool.in_flight, "pool/waiting": pool.waiting}
        for name, pool in pools.items()
    }


class Metrics:
    """An observer that writes every event to the files above, and the numbers of each step to TensorBoard and gauges.

    Lines are flushed one by one: `kill -9` loses none. clock: Unix seconds.
    """

    def __init__(
        self,
        folder: str | Path,
        record: Record | None = None,
        statistics: Callable[[], PipelineStatistics] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = Path(folder)
        self._record = record
        self._statistics = statistics
        self._clock = clock
        self._folder.mkdir(parents=True, exist_ok=True)
        self.session = count_sessions(self._folder)
        self._steps = open_lines(self._folder / METRICS_FILE)
        self._events = open_lines(self._folder / EVENTS_FILE)
        self._boards: dict[str, TensorBoard] = {}
        self._write(self._events, {"event": "Session", "session": self.session, "at": clock(), "pid": os.getpid()})

    def __call__(self, event: Event) -> None:
        if isinstance(event, RolloutsChanged | SampleTold):  # of the trace, and of samples.jsonl
            return
        at = self._clock()
        if isinstance(event, StepTaken):
            self._write(self._steps, step_line(event, self.session, at))
            values = step_values(event)
            self._board(event.adapter).add(event.lineage, event.version, values, at)
            self._gauge(values, {"adapter": event.adapter})
            self._gauge({"step": event.version}, {"adapter": event.adapter})
            return
        self._write(self._events, event_line(event, self.session, at))
        if isinstance(event, Evaluated):
            values = {f"eval/{name}": value for name, value in event.metrics.items()} | {"eval/reward": event.reward}
            self._board(event.adapter).add(None, event.version, values, at)
            self._gauge(values, {"adapter": event.adapter})
        elif isinstance(event, MemberCounted):
            numbers = {f"member/{name}": value for name, value in event.numbers.items()}
            self._gauge(numbers, {"pool": event.pool, "member": event.member})
        elif isinstance(event, LaunchEnded) and self._statistics is not None:
            for name, numbers in pool_values(self._statistics()).items():
                self._gauge(numbers, {"pool": name})

    def close(self) -> None:
        """Every line is on disk already; this lets go of the files."""
        self._steps.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _board(self, adapter: str) -> TensorBoard:
        if adapter not in self._boards:
            self._boards[adapter] = TensorBoard(self._folder / "tensorboard" / adapter)
        return self._boards[adapter]

    def _gauge(self, values: Mapping[str, float], tags: Mapping[str, str]) -> None:
        if self._record is None:
            return
        for name, value in values.items():
            if math.isfinite(value):
                self._record(gauge_name(name), float(value), tags)

    @staticmethod
    def _write(file: Any, line: Mapping[str, Any]) -> None:
        file.write(json.dumps(finite(line), separators=(",", ":")) + "\n")
        file.flush()


class TensorBoard:
    """The event file of one adapter, opened only while it is written to: a thousand adapters hold no thousand files.

    Where a step comes again (a rollback, a resume), TensorBoard is told to forget what it had from that step on.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time_ns() / 1e9:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"events.out.tfevents.{stamp}.weft"
        self._lineage: int | None = None

    def add(self, lineage: int | None, step: int, values: Mapping[str, float], at: float) -> None:
        """Write `values` at `step`. lineage: of a training step; None for numbers that start no history."""
        events = []
        if not self._path.exists():
            events.append(TensorBoardEvent(wall_time=at, file_version="brain.Event:2"))
        if lineage is not None and lineage != self._lineage:
            self._lineage = lineage
            events.append(TensorBoardEvent(wall_time=at, step=step, session_log=SessionLog(status=SessionLog.START)))
        numbers = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        events.append(TensorBoardEvent(wall_time=at, step=step, summary=Summary(value=numbers)))
        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())


def gauge_name(name: str) -> str:
    """`reward/mean` -> `weft_reward_mean`: a name that Prometheus takes."""
    return "weft_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in name).lower()


def count_sessions(folder: Path) -> int:
    """How many times a run has been started in this folder."""
    path = folder / EVENTS_FILE
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(line.startswith(b'{"event":"Session"') for line in file)


def open_lines(path: Path) -> Any:
    """Open for appending; a line that a crash cut short is ended, so that the next one is whole."""
    file = path.open("a+", encoding="utf-8")
    if file.tell() > 0:
        with path.open("rb") as tail:
            tail.seek(-1, os.SEEK_END)
            if tail.read(1) != b"\n":
                file.write("\n")
    return file


def finite(value: Any) -> Any:
    """`value` as plain JSON can hold it: NaN and infinities become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
