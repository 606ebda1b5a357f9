"""What a run folder tells of the run: every session of it, read back from what `metrics` wrote.

The report and the summary are drawn from here, so that they know the steps before a resume, and can be made of a run that died.
Sessions follow each other on one axis of time (seconds of running, pauses between sessions left out).
The files are open to everyone: a line that is not of the form below is passed over and counted, whoever wrote it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.pipeline.batch import count_late
from weft.pipeline.events import Interval, Phase
from weft.pipeline.metrics import EVENTS_FILE, METRICS_FILE

Line = Mapping[str, Any]
Check = Callable[[Any], bool]


# ---- the form of a line: what the fields that are read here and in the report must be; others may be anything ----


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _amount(value: Any) -> bool:
    return _number(value) and value >= 0


def _count(value: Any) -> bool:
    return _amount(value) and isinstance(value, int) and value < 2**63


def _measured(value: Any) -> bool:
    return value is None or _number(value)  # null: it was not finite


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _phase(value: Any) -> bool:
    return value in tuple(Phase)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _shares(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_amount, value.values()))


def _by_age(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_count, value.values())) and all(map(_is_whole, value))


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 20


def _of_member(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_measured, value.values())) and _number(value.get("deaths"))


STEP: Mapping[str, Check] = {
    "session": _count,
    "adapter": _text,
    "step": _count,
    "num_steps": _count,
    "time": _amount,
    "time/sync": _amount,
    "reward/mean": _measured,
    "staleness/bound": _count,
    "staleness/groups": _counts,
}
IN_STEP: Mapping[str, Check] = {  # where they are there
    "staleness/tokens": _by_age,
    **dict.fromkeys(("reward/std", "reward/no_signal", "staleness/max", "tokens/sampled", "tokens/trained"), _measured),
    **dict.fromkeys(("time/rollout", "time/queue", "time/train", "time/step"), _measured),
    **dict.fromkeys(("loss", "grad_norm", "kl", "entropy", "logprob_diff"), _measured),
}
EVENTS: Mapping[str, Mapping[str, Check]] = {
    "Session": {},
    "PhaseChanged": {"time": _amount, "adapter": _text, "phase": _phase},
    "GroupSampled": {
        "time": _amount,
        "adapter": _text,
        "start": _amount,
        "sampler": _count,
        "rollouts": lambda value: _count(value) and value > 0,
        "tokens": _count,
        "held_out": _flag,
    },
    "LaunchEnded": {"time": _amount, "seconds": _amount, "tokens": _shares},
    "Synced": {"time": _amount},
    "Evaluated": {"time": _amount, "adapter": _text, "final": _flag, "reward": _measured},
    "CheckpointWritten": {"time": _amount},
    "AdapterFailed": {"time": _amount, "adapter": _text, "reason": _text},
    "MemberCounted": {"time": _amount, "pool": _text, "member": _text, "numbers": _of_member},
    "Warned": {"time": _amount, "adapter": _text, "message": _text},
}
IN_EVENT: Mapping[str, Check] = {"time": _amount, "trainer": _count}


def _is_step(line: Any) -> bool:
    return isinstance(line, dict) and _has(line, STEP, IN_STEP)


def _is_event(line: Any) -> bool:
    if not (isinstance(line, dict) and isinstance(kind := line.get("event"), str) and kind in EVENTS):
        return False
    return _has(line, {"session": _count, **EVENTS[kind]}, IN_EVENT)


def _has(line: Line, fields: Mapping[str, Check], optional: Mapping[str, Check]) -> bool:
    own = all(name in line and check(line[name]) for name, check in fields.items())
    return own and all(check(line[name]) for name, check in optional.items() if name in line)


# ---- what the lines come to ----


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
        found = [(line["step"], line[name]) for line in self.steps if _number(line.get(name))]
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
    members: what each process of the newest session's pools counted last, by pool and name. passed_over: one line for each file
    that holds lines of another form."""

    adapters: dict[str, AdapterHistory] = field(default_factory=dict)
    groups: list[GroupSpan] = field(default_factory=list)
    launches: list[LaunchSpan] = field(default_factory=list)
    phases: list[Interval] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    members: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)
    sessions: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: str | Path) -> History:
        """Read a run folder. A line cut short by a crash is passed over."""
        history = cls()
        events = history._own(EVENTS_FILE, read_lines(Path(folder) / EVENTS_FILE), _is_event)
        steps = history._own(METRICS_FILE, read_lines(Path(folder) / METRICS_FILE), _is_step)
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

    def _own(self, name: str, lines: Iterable[Any], is_own: Check) -> list[Line]:
        """Those of weft's form; of the others it is told how many there are."""
        own, others = [], 0
        for line in lines:
            if is_own(line):
                own.append(line)
            else:
                others += 1
        if others:
            told = "1 line that is not of weft's form is" if others == 1 else f"{others} lines that are not of weft's form are"
            self.passed_over.append(f"{name}: {told} passed over")
        return own

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


def read_lines(path: Path) -> Iterator[Any]:
    """What each whole line of a JSONL file says, whoever wrote it (None: too deep to read); nothing if there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            except (ValueError, RecursionError):  # a number of thousands of digits, brackets within brackets
                line = None
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
