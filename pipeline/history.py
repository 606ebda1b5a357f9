"""What a run folder tells of the run: every session of it, read back from what `metrics` wrote.

The report and the summary are drawn from here, so that they know the steps before a resume, and can be made of a run that died.
Sessions follow each other on one axis of time (seconds of running, pauses between sessions left out).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.pipeline.batch import count_late
from weft.pipeline.events import Interval, Phase
from weft.pipeline.metrics import EVENTS_FILE, METRICS_FILE

Line = Mapping[str, Any]


@dataclass(frozen=True)
class GroupSpan:
    """The rollouts of one prompt, from dispatch to completion."""

    adapter: str
    start: float
    end: float
    rollouts: int
    tokens: int
    held_out: bool
    sampler: int


@dataclass(frozen=True)
class LaunchSpan:
    """One trainer launch, and the packed tokens of each adapter that shared it."""

    start: float
    end: float
    tokens: Mapping[str, int]
    trainer: int = 0


@dataclass
class AdapterHistory:
    """steps: the lines that count, by step; redone: those that a rollback or a resume undid. failure: one line, or none."""

    name: str
    steps: list[Line] = field(default_factory=list)
    redone: list[Line] = field(default_factory=list)
    eval_base: float | None = None
    eval_final: float | None = None
    failure: str = ""

    def add(self, line: Line) -> None:
        """Take the next line of metrics.jsonl: it undoes every earlier line of its step or a later one."""
        while self.steps and self.steps[-1]["step"] >= line["step"]:
            self.redone.append(self.steps.pop())
        self.steps.append(line)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, where it has a finite value."""
        found = [(line["step"], line[name]) for line in self.steps if isinstance(line.get(name), (int, float))]
        return [step for step, _ in found], [float(value) for _, value in found]

    @property
    def staleness(self) -> list[int]:
        """Of every group that was trained, those of undone steps too: they were spent under the bound as well."""
        return [value for line in (*self.redone, *self.steps) for value in line["staleness/groups"]]

    @property
    def late_tokens(self) -> int:
        """Tokens trained beyond the bound of their step, counted again from what each step recorded of its batch."""
        return sum(
            count_late({int(age): count for age, count in line.get("staleness/tokens", {}).items()}, line["staleness/bound"])
            for line in (*self.redone, *self.steps)
        )


@dataclass
class History:
    """adapters: in the order in which they came. sessions: when each began. seconds: when the last one ended.
    members: what each process of the newest session's pools counted last, by pool and name."""

    adapters: dict[str, AdapterHistory] = field(default_factory=dict)
    groups: list[GroupSpan] = field(default_factory=list)
    launches: list[LaunchSpan] = field(default_factory=list)
    phases: list[Interval] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    members: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)
    sessions: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: str | Path) -> History:
        """Read a run folder. A line cut short by a crash is passed over."""
        history = cls()
        events = list(read_lines(Path(folder) / EVENTS_FILE))
        steps = list(read_lines(Path(folder) / METRICS_FILE))
        starts = history._lay_out([*events, *steps])
        for line in events:
            history._add_event(line, starts[line["session"]])
        for line in steps:
            history.adapter(line["adapter"]).add(line)
        history.phases = _intervals(events, starts, [*history.sessions[1:], history.seconds])
        return history

    def adapter(self, name: str) -> AdapterHistory:
        """The adapter's history, begun if it is new."""
        return self.adapters.setdefault(name, AdapterHistory(name))

    def _lay_out(self, lines: list[Line]) -> dict[int, float]:
        """Place the sessions one after the other; returns where each starts."""
        lengths: dict[int, float] = {}
        for line in lines:
            lengths[line["session"]] = max(lengths.get(line["session"], 0.0), line.get("time", 0.0))
        starts: dict[int, float] = {}
        for session in sorted(lengths):
            starts[session] = self.seconds
            self.seconds += lengths[session]
        self.sessions = list(starts.values())
        return starts

    def _add_event(self, line: Line, shift: float) -> None:
        kind = line["event"]
        if kind == "GroupSampled":
            start, end = line["start"] + shift, line["time"] + shift
            told = (line["rollouts"], line["tokens"], line["held_out"], line["sampler"])
            self.groups.append(GroupSpan(line["adapter"], start, end, *told))
        elif kind == "LaunchEnded":
            end = line["time"] + shift
            self.launches.append(LaunchSpan(end - line["seconds"], end, line["tokens"], line.get("trainer", 0)))
        elif kind == "PhaseChanged":
            self.adapter(line["adapter"])
        elif kind == "Session":
            self.members = {}
        elif kind == "MemberCounted":
            before = self.members.setdefault(line["pool"], {})
            before[line["member"]] = {**before.get(line["member"], {}), **line["numbers"]}
        elif kind == "Evaluated" and line["final"]:
            self.adapter(line["adapter"]).eval_final = line["reward"]
        elif kind == "Evaluated":
            self.adapter(line["adapter"]).eval_base = line["reward"]
        elif kind == "AdapterFailed":
            self.adapter(line["adapter"]).failure = line["reason"]
        elif kind == "Warned":
            self.warnings.append(f"{line['adapter']}: {line['message']}" if line["adapter"] else line["message"])


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a JSONL file; nothing if there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and "session" in line:
                yield line


def _intervals(events: list[Line], starts: Mapping[int, float], ends: list[float]) -> list[Interval]:
    """Each adapter's phases in order. A session's end ends them; the three last phases take no time."""
    intervals: list[Interval] = []
    running: dict[tuple[int, str], tuple[Phase, float]] = {}
    for line in events:
        if line["event"] != "PhaseChanged":
            continue
        key, now = (line["session"], line["adapter"]), line["time"] + starts[line["session"]]
        if key in running:
            phase, begun = running.pop(key)
            intervals.append(Interval(line["adapter"], phase, begun, now))
        if not Phase(line["phase"]).ended:
            running[key] = (Phase(line["phase"]), now)
    end_of = dict(zip(starts, ends, strict=False))  # no session has one end too many
    intervals.extend(Interval(name, phase, begun, end_of[session]) for (session, name), (phase, begun) in running.items())
    return sorted(intervals, key=lambda interval: interval.start)
