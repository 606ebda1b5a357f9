"""trace.json: who did what when, for ui.perfetto.dev, in Chrome's trace event format. An observer of `events`.

    adapters         two rows an adapter: its phases, and below them "rollouts" while any of its own are on the samplers, cut
                     where a new version is installed. Counter: staleness of each step
    samplers         rows of each sampler, as many as it had groups at once; a slice is a group, under its adapter's name.
                     Counter: rollouts in flight
    trainers         a row a trainer: its launches, under the names of the adapters that shared them
    parameter sync   rows of versions on their way to the samplers, as many as there were at once

Every record is written at the moment at which it ends and flushed, so memory does not grow with the run, the file's ends never
fall, and `kill -9` loses what was under way and no more. The format lets the closing bracket be missing. A run that is resumed
goes on in the same file and rows, where its earlier session ended: pauses between sessions are left out. Slices of one row
never overlap. Times are whole microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from weft.pipeline.events import (
    AdapterFailed,
    Event,
    GroupSampled,
    LaunchEnded,
    Phase,
    PhaseChanged,
    RolloutsChanged,
    StepTaken,
    Synced,
    Warned,
)

TRACE_FILE = "trace.json"
ADAPTERS, SAMPLERS, TRAINERS, SYNC = "adapters", "samplers", "trainers", "parameter sync"
PROCESSES = {name: number for number, name in enumerate((ADAPTERS, SAMPLERS, TRAINERS, SYNC), start=1)}
FIRST_ROW = 100  # a row's number must not be a process's: the viewer would take it for the main thread
LANES = 10_000  # rows that one sampler may have, in the order of rows
MAX_NAMED = 8  # adapters in the name of a launch
MAX_TOLD = 200  # letters of a warning
_STEPPING = (Phase.SAMPLING, Phase.QUEUED, Phase.TRAINING)  # towards the next version


@dataclass(frozen=True)
class Row:
    """One row of the viewer. order: among those of its process."""

    process: str
    name: str
    order: int = 0


@dataclass(frozen=True)
class Mark:
    """One thing on a row: kind X (a slice), C (a counter's value from `end` on) or i (an instant). Microseconds."""

    kind: str
    row: Row
    name: str
    start: int
    end: int
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Adapter:
    """What of one adapter is under way."""

    order: int
    phase: PhaseChanged | None = None
    sampling: int | None = None  # since when it has had rollouts on the samplers
    installed: int = 0


class Marks:
    """From events to marks. It holds what is under way, and the end of each row.

    shift: microseconds added to every time.
    """

    def __init__(self, shift: int = 0) -> None:
        self._shift = shift
        self._adapters: dict[str, _Adapter] = {}
        self._lanes: dict[tuple[str, int], list[int]] = {}  # the end of each row of one member
        self._now = shift

    def take(self, event: Event) -> Iterator[Mark]:
        """The marks that end with this event."""
        self._now = now = self._at(event.time)
        if isinstance(event, PhaseChanged):
            yield from self._change_phase(event)
        elif isinstance(event, RolloutsChanged):
            yield from self._change_rollouts(event, now)
        elif isinstance(event, GroupSampled):
            yield self._group(event, now)
        elif isinstance(event, LaunchEnded):
            yield self._launch(event, now)
        elif isinstance(event, Synced):
            yield from self._sync(event, now)
        elif isinstance(event, StepTaken):
            stale = {"steps": max(event.staleness, default=0)}
            yield Mark("C", Row(ADAPTERS, ""), f"staleness {event.adapter}", now, now, stale)
        elif isinstance(event, AdapterFailed):
            yield Mark("i", self._row(event.adapter), f"failed: {event.reason}"[:MAX_TOLD], now, now)
        elif isinstance(event, Warned):
            row = self._row(event.adapter) if event.adapter else Row(ADAPTERS, "the run", -1)
            yield Mark("i", row, event.message[:MAX_TOLD], now, now)

    def finish(self) -> Iterator[Mark]:
        """What is under way, as if it ended with the newest event."""
        for name, adapter in self._adapters.items():
            yield from self._end_phase(name, self._now)
            if adapter.sampling is not None:
                yield self._rollouts(name, self._now)

    def _at(self, seconds: float) -> int:
        return round(seconds * 1e6) + self._shift

    def _adapter(self, name: str) -> _Adapter:
        return self._adapters.setdefault(name, _Adapter(len(self._adapters)))

    def _row(self, name: str) -> Row:
        return Row(ADAPTERS, name, 2 * self._adapter(name).order)

    def _change_phase(self, event: PhaseChanged) -> Iterator[Mark]:
        adapter = self._adapter(event.adapter)
        yield from self._end_phase(event.adapter, self._now)
        if not event.phase.ended:
            adapter.phase = event

    def _end_phase(self, name: str, now: int) -> Iterator[Mark]:
        adapter = self._adapter(name)
        if begun := adapter.phase:
            adapter.phase = None
            at = {"step": begun.version + 1} if begun.phase in _STEPPING else {"version": begun.version}
            start = self._at(begun.time)
            yield Mark("X", self._row(name), str(begun.phase), start, now, {"lineage": begun.lineage, **at})

    def _change_rollouts(self, event: RolloutsChanged, now: int) -> Iterator[Mark]:
        adapter = self._adapter(event.adapter)
        if event.in_flight and adapter.sampling is None:
            adapter.sampling = now
        elif not event.in_flight and adapter.sampling is not None:
            yield self._rollouts(event.adapter, now)
            adapter.sampling = None
        yield Mark("C", Row(SAMPLERS, ""), "rollouts in flight", now, now, {"rollouts": event.total})

    def _rollouts(self, name: str, now: int) -> Mark:
        adapter = self._adapter(name)
        row = Row(ADAPTERS, f"{name} · rollouts", 2 * adapter.order + 1)
        return Mark("X", row, "rollouts", adapter.sampling or 0, now, {"installed version": adapter.installed})

    def _sync(self, event: Synced, now: int) -> Iterator[Mark]:
        adapter = self._adapter(event.adapter)
        if adapter.sampling is not None:
            yield self._rollouts(event.adapter, now)
            adapter.sampling = now
        adapter.installed = event.version
        lane, start = self._lane(SYNC, 0, self._at(event.time - event.seconds), now)
        told = {
            "lineage": event.lineage,
            "version": event.version,
            "broadcast ms": 1e3 * event.broadcast_seconds,
            "install ms": 1e3 * event.install_seconds,
        }
        yield Mark("X", Row(SYNC, f"sync {lane}", lane), event.adapter, start, now, told)

    def _group(self, event: GroupSampled, now: int) -> Mark:
        lane, start = self._lane(SAMPLERS, event.sampler, self._at(event.start), now)
        row = Row(SAMPLERS, f"sampler {event.sampler} · {lane}", event.sampler * LANES + lane)
        told = {"version": event.version, "rollouts": event.rollouts, "tokens": event.tokens, "held out": event.held_out}
        return Mark("X", row, event.adapter, start, now, told)

    def _launch(self, event: LaunchEnded, now: int) -> Mark:
        lane, start = self._lane(TRAINERS, event.trainer, self._at(event.time - event.seconds), now)
        row = Row(TRAINERS, f"trainer {event.trainer}" + (f" · {lane}" if lane else ""), event.trainer * LANES + lane)
        names = list(event.tokens)
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        told = {"adapters": len(names), "tokens": sum(event.tokens.values())}
        return Mark("X", row, " + ".join(names[:MAX_NAMED]) + more, start, now, told)

    def _lane(self, process: str, member: int, start: int, end: int) -> tuple[int, int]:
        """The row that was free for the shortest time before `start`: so there are no more rows than there were slices at
        once, though slices come in the order of their ends. And the start, which rounding may have put before the row's end."""
        ends = self._lanes.setdefault((process, member), [])
        free = [lane for lane, last in enumerate(ends) if last <= start + 1]
        lane = max(free, key=ends.__getitem__, default=len(ends))
        start = max(start, *ends[lane : lane + 1], self._shift)
        ends[lane : lane + 1] = [max(start, end)]
        return lane, start


class Trace:
    """The observer that writes `path`, or goes on with it."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _Found.read(path) if path.exists() else _Found()
        self._rows = found.rows
        self._named = {process for process, _ in found.rows}
        self._empty = not found.length
        self._file: BinaryIO = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(found.length)
        self._file.seek(found.length)
        self._marks = Marks(found.end)
        if self._empty:
            self._file.write(b"[\n")
            self._file.flush()
        else:
            self.write([Mark("i", Row(ADAPTERS, "the run", -1), "resumed", found.end, found.end)])

    def __call__(self, event: Event) -> None:
        self.write(self._marks.take(event))

    def close(self) -> None:
        """End what is under way, and the file."""
        self.write(self._marks.finish())
        self._file.write(b"\n]\n")
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def write(self, marks: Iterable[Mark]) -> None:
        """Append these marks, which end no earlier than those before them."""
        records = [record for mark in marks for record in self._records(mark)]
        lines = [json.dumps(record, separators=(",", ":")) for record in records]
        if lines:
            self._file.write(("" if self._empty else ",\n").encode() + ",\n".join(lines).encode())
            self._file.flush()
            self._empty = False

    def _records(self, mark: Mark) -> Iterator[dict[str, Any]]:
        """The mark, after the names of its row and process where these are new."""
        process, row = PROCESSES[mark.row.process], 0
        if mark.row.process not in self._named:
            self._named.add(mark.row.process)
            yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": mark.row.process}}
            yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
        if mark.kind != "C":
            key = (mark.row.process, mark.row.name)
            if key not in self._rows:
                row = self._rows[key] = FIRST_ROW + len(self._rows)
                yield {"ph": "M", "pid": process, "tid": row, "name": "thread_name", "args": {"name": mark.row.name}}
                order = {"sort_index": mark.row.order}
                yield {"ph": "M", "pid": process, "tid": row, "name": "thread_sort_index", "args": order}
            row = self._rows[key]
        record = {"ph": mark.kind, "pid": process, "tid": row, "ts": mark.start, "name": mark.name}
        if mark.kind == "X":
            record["dur"] = max(mark.end - mark.start, 0)
        elif mark.kind == "i":
            record["s"] = "t"
        yield record | {"args": mark.args}


def write_trace(path: str | Path, events: Iterable[Event], start: float = 0.0, end: float = float("inf")) -> None:
    """Write a trace of `events`, in the order in which they were told, anew: whatever of it lies between `start` and `end`
    seconds of their time."""
    path, marks = Path(path), Marks()
    path.unlink(missing_ok=True)
    with Trace(path) as trace:
        for event in events:
            trace.write(_within(marks.take(event), start, end))
        trace.write(_within(marks.finish(), start, end))


def _within(marks: Iterable[Mark], start: float, end: float) -> Iterator[Mark]:
    return (mark for mark in marks if mark.end >= start * 1e6 and mark.start <= end * 1e6)


@dataclass
class _Found:
    """What an earlier session left: bytes that are whole, when its last record ended, and the numbers of its rows."""

    length: int = 0
    end: int = 0
    rows: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file line by line. Only names, and the end, are looked into: a record that was cut short is left out."""
        found, processes = cls(), {number: name for name, number in PROCESSES.items()}
        timed: list[bytes] = []  # the newest two records that have a time
        last: list[tuple[int, bytes]] = []  # the newest two of any kind, with the place where each ends
        place = 0
        with path.open("rb") as file:
            for line in file:
                text = line.strip().removesuffix(b",")
                if text.startswith(b"{"):
                    last = [*last[-1:], (place + len(text), text)]
                    if not text.startswith(b'{"ph":"M"'):
                        timed = [*timed[-1:], text]
                    elif b'"name":"thread_name"' in text and (record := _parse(text)):
                        found.rows[processes[record["pid"]], record["args"]["name"]] = record["tid"]
                place += len(line)
        found.length = next((end for end, text in reversed(last) if _parse(text)), 0)
        newest = next((record for text in reversed(timed) if (record := _parse(text))), {"ts": 0})
        found.end = newest["ts"] + newest.get("dur", 0)
        return found


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return record
