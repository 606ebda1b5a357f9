"""What the user sees while the run goes on: a live table in a terminal, plain lines elsewhere. Both are observers of `events`.

    weft · tiny · 8 adapters · 1:32 · staleness violations 0           dashboard http://127.0.0.1:8265
      adapter            step   reward                   stale      tok/s  phase       ETA
    ● calculator-grpo    12/30    0.61  ▂▂▃▃▄▄▅▅▆▆▆▇     0/1 max 1    412  sampling   0:48
    samplers ━━━━━━━━━━── 83%  53/64 rollouts, 3 groups wait    trainer ━━━━━━────── 51%

reward: of the newest step, then of every step, oldest at the left. stale: of the newest step / the adapter's own bound, then
the most that was ever seen. tok/s: sampled tokens of the last seconds. Shares of the pools are of the last seconds too.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weft.pipeline.events import (
    AdapterFailed,
    AdapterStatistics,
    Evaluated,
    Event,
    GroupSampled,
    Phase,
    PipelineStatistics,
    PoolStatistics,
    StepTaken,
    Warned,
)
from weft.pipeline.palette import adapter_colour
from weft.pipeline.summary import count, duration

WINDOW_S = 20.0  # what "now" means for rates and shares
REDRAW_S = 0.5  # one drawing of eight rows takes 6 ms of a 2-core laptop
PLAIN_POOLS_S = 30.0  # between two plain lines about the pools
NARROW = 100  # columns: below it the header needs what the dashboard's address would take
LENGTHS = ((160, 36), (130, 24), (NARROW, 14), (0, 4))  # of the sparkline, by the columns: names come first
NOTES = 3  # newest warnings and failures kept below the table
BARS = "▁▂▃▄▅▆▇█"
PHASE_STYLES = {
    Phase.SAMPLING: "cyan",
    Phase.QUEUED: "dim",
    Phase.TRAINING: "magenta",
    Phase.SYNCING: "yellow",
    Phase.EVALUATING: "blue",
    Phase.ROLLING_BACK: "bold yellow",
    Phase.FINISHED: "green",
    Phase.FAILED: "bold red",
}

Statistics = Callable[[], PipelineStatistics]


def make_table(
    kind: str, statistics: Statistics, title: str = "", dashboard: str = "", console: Console | None = None
) -> LiveTable | PlainLines:
    """kind: live, plain, or auto (live where there is a terminal)."""
    console = console or Console()
    if kind == "live" or (kind == "auto" and console.is_terminal):
        return LiveTable(statistics, title, dashboard, console)
    return PlainLines(statistics, console)


class Pace:
    """How fast each adapter goes now, from the events of the last seconds."""

    def __init__(self) -> None:
        self._tokens: dict[str, deque[tuple[float, int]]] = {}
        self._steps: dict[str, deque[float]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, GroupSampled):
            recent = self._tokens.setdefault(event.adapter, deque())
            recent.append((event.time, event.tokens))
            while recent[0][0] < event.time - WINDOW_S:
                recent.popleft()
        elif isinstance(event, StepTaken):
            self._steps.setdefault(event.adapter, deque(maxlen=9)).append(event.time)

    def tokens_per_second(self, adapter: str, now: float) -> float:
        """Of the last WINDOW_S seconds, or of the whole run while it is younger."""
        recent = [tokens for time, tokens in self._tokens.get(adapter, ()) if time >= now - WINDOW_S]
        return sum(recent) / max(min(now, WINDOW_S), 1e-9)

    def seconds_left(self, adapter: str, steps_left: int) -> float | None:
        """At the pace of the last eight steps; None before the second step."""
        times = self._steps.get(adapter)
        if times is None or len(times) < 2:
            return None
        return steps_left * (times[-1] - times[0]) / (len(times) - 1)


class Share:
    """Busy share of one pool over the last seconds, from its busy seconds as they grow."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque([(0.0, 0.0)])

    def update(self, time: float, busy_seconds: float) -> float:
        """Take the newest reading; returns the share since the oldest one within the window."""
        self._seen.append((time, busy_seconds))
        while len(self._seen) > 2 and self._seen[1][0] <= time - WINDOW_S:
            self._seen.popleft()
        begun, busy_then = self._seen[0]
        return min(max((busy_seconds - busy_then) / max(time - begun, 1e-9), 0.0), 1.0)


class LiveTable:
    """A table that redraws itself while `run` is awaited. Enter it before the run and leave it after: the last state stays."""

    def __init__(self, statistics: Statistics, title: str, dashboard: str, console: Console) -> None:
        self._statistics = statistics
        self._title = title
        self._dashboard = dashboard
        self._console = console
        self._pace = Pace()
        self._shares = {"samplers": Share(), "trainer": Share()}
        self._differences: dict[str, float] = {}
        self._notes: deque[Text] = deque(maxlen=NOTES)
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __call__(self, event: Event) -> None:
        self._pace(event)
        if isinstance(event, StepTaken) and "logprob_diff" in event.metrics:
            self._differences[event.adapter] = event.metrics["logprob_diff"]
        elif isinstance(event, AdapterFailed):
            self._notes.append(Text(f"{event.adapter} failed: {event.reason}", style="red"))
        elif isinstance(event, Warned):
            about = f"{event.adapter}: " if event.adapter else ""
            self._notes.append(Text(f"{about}{event.message}", style="yellow"))

    async def run(self) -> None:
        """Redraw until cancelled."""
        while True:
            self._live.update(self.render(), refresh=True)
            await asyncio.sleep(REDRAW_S)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._live.update(self.render(), refresh=True)
        self._live.stop()

    def render(self) -> RenderableType:
        """The whole picture as it is now, for the console's width and height."""
        now = self._statistics()
        return Group(self._header(now), Text(), self._rows(now), Text(), self._footer(now), *self._notes)

    def _header(self, now: PipelineStatistics) -> Table:
        line = Table.grid(expand=True)
        line.add_column(no_wrap=True)
        line.add_column(justify="right", no_wrap=True, style="dim")
        named = Text("weft", style="bold")
        facts = [self._title, f"{len(now.adapters)} adapters", duration(now.time)]
        named.append("".join(f" · {fact}" for fact in facts if fact), style="not bold")
        violations = now.staleness_violations
        named.append(f" · staleness violations {violations}", style="bold red" if violations else "dim not bold")
        shown = self._dashboard and self._console.width >= NARROW
        line.add_row(named, f"dashboard {self._dashboard}" if shown else "")
        return line

    def _rows(self, now: PipelineStatistics) -> Table:
        wide = self._console.width >= 130
        table = Table(box=None, expand=True, header_style="dim", padding=(0, 1), pad_edge=False)
        table.add_column("  adapter", no_wrap=True, overflow="ellipsis", ratio=3)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("reward", justify="right", no_wrap=True)
        bars = next(bars for least, bars in LENGTHS if self._console.width >= least)
        table.add_column("", no_wrap=True, min_width=bars)
        if wide:
            table.add_column("held-out", justify="right", no_wrap=True)
        table.add_column("stale", justify="left", no_wrap=True)
        if wide:
            table.add_column("logprob_diff", justify="right", no_wrap=True)
        table.add_column("tok/s", justify="right", no_wrap=True)
        table.add_column("phase", no_wrap=True, min_width=max(len(phase) for phase in Phase))
        table.add_column("ETA", justify="right", no_wrap=True, min_width=5)
        shown, hidden = self._choose(now)
        for index, adapter in shown:
            table.add_row(*self._row(index, adapter, now.time, bars, wide))
        if hidden:
            phases = Counter(str(adapter.phase) for adapter in hidden)
            told = ", ".join(f"{number} {phase}" for phase, number in phases.most_common())
            table.add_row(Text(f"  and {len(hidden)} more: {told}", style="dim"))
        return table

    def _choose(self, now: PipelineStatistics) -> tuple[list[tuple[int, AdapterStatistics]], list[AdapterStatistics]]:
        """The adapters that fit the terminal's height, those that still run first; and the others."""
        room = max(self._console.height - 7 - NOTES, 4)
        rows = list(enumerate(now.adapters.values()))
        if len(rows) <= room:
            return rows, []
        rows.sort(key=lambda row: row[1].phase.ended)
        return sorted(rows[: room - 1], key=lambda row: row[0]), [adapter for _, adapter in rows[room - 1 :]]

    def _row(self, index: int, adapter: AdapterStatistics, now: float, bars: int, wide: bool) -> list[Text | str]:
        left = None if adapter.phase.ended else self._pace.seconds_left(adapter.name, adapter.num_steps - adapter.version)
        speed = self._pace.tokens_per_second(adapter.name, now)
        row: list[Text | str] = [
            Text("● ", style=adapter_colour(index)).append(adapter.name, style="default"),
            f"{adapter.version}/{adapter.num_steps}",
            "" if adapter.reward is None else f"{adapter.reward:.2f}",
            Text(sparkline(adapter.rewards, bars), style=adapter_colour(index)),
        ]
        if wide:
            row.append(_held_out(adapter))
        row.append(_staleness(adapter))
        if wide:
            difference = self._differences.get(adapter.name)
            row.append("" if difference is None else f"{difference:.1e}")
        row.append(count(speed) if speed and not adapter.phase.ended else Text("-", style="dim"))
        row.append(Text(adapter.phase, style=PHASE_STYLES.get(adapter.phase, "")))
        row.append("" if left is None else duration(left))
        return row

    def _footer(self, now: PipelineStatistics) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis")
        for name, pool, unit, queued in (
            ("samplers", now.samplers, "rollouts", "groups wait"),
            ("trainer", now.trainers, "", "batches wait"),
        ):
            share = self._shares[name].update(now.time, pool.busy_seconds)
            line.append(f"{name} ", style="bold").append_text(_meter(share, 12)).append(f" {share:4.0%}")
            line.append(f"  {_load(pool, unit, queued)}", style="dim").append("    ")
        return line


class PlainLines:
    """One line a step, evaluation, failure and warning, for logs and pipes; now and then one about the pools."""

    def __init__(self, statistics: Statistics, console: Console) -> None:
        self._statistics = statistics
        self._console = console
        self._pace = Pace()
        self._shares = {"samplers": Share(), "trainer": Share()}
        self._width = 0

    def __call__(self, event: Event) -> None:
        self._pace(event)
        if isinstance(event, StepTaken):
            self._say(event.time, event.adapter, self._step(event))
        elif isinstance(event, Evaluated):
            when = "after training" if event.final else "before training"
            self._say(event.time, event.adapter, f"held-out {event.reward:.3f} over {event.prompts} prompts, {when}")
        elif isinstance(event, AdapterFailed):
            self._say(event.time, event.adapter, f"FAILED: {event.reason}")
        elif isinstance(event, Warned):
            self._say(event.time, event.adapter or "weft", event.message)

    async def run(self) -> None:
        """Tell of the pools now and then, until cancelled."""
        while True:
            await asyncio.sleep(PLAIN_POOLS_S)
            self.tell_pools()

    def tell_pools(self) -> None:
        """One line: how busy the pools have been of late."""
        now = self._statistics()
        samplers = self._shares["samplers"].update(now.time, now.samplers.busy_seconds)
        trainer = self._shares["trainer"].update(now.time, now.trainers.busy_seconds)
        rollouts = _load(now.samplers, "rollouts", "groups wait")
        self._say(now.time, "pools", f"samplers busy {samplers:.0%} ({rollouts})  trainer busy {trainer:.0%}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def _step(self, event: StepTaken) -> str:
        parts = [
            f"step {event.version:>{len(str(event.num_steps))}}/{event.num_steps}",
            f"reward {event.reward:.3f}",
            f"stale {max(event.staleness, default=0)}/{event.max_staleness}",
            f"{count(self._pace.tokens_per_second(event.adapter, event.time)):>5} tok/s",
        ]
        forms = (("loss", "+.4f"), ("logprob_diff", ".1e"))
        parts += [f"{name} {event.metrics[name]:{form}}" for name, form in forms if name in event.metrics]
        return "  ".join(parts)

    def _say(self, time: float, who: str, what: str) -> None:
        if len(who) > self._width:
            self._width = max(len(name) for name in (who, "weft", "pools", *self._statistics().adapters))
        line = f"{time:7.1f}s  {who:<{self._width}}  {what}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as bars, oldest first, at most `width` of them (means of neighbours where there are more).

    Heights are of 0 to 1 where all values are within, so that adapters can be compared; else of the smallest to the largest.
    """
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    if len(finite) > width:
        edges = [round(i * len(finite) / width) for i in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(0.0, *finite), max(1.0, *finite)
    if low < 0.0 or high > 1.0:
        low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in finite)


def _held_out(adapter: AdapterStatistics) -> Text:
    text = Text("" if adapter.eval_base is None else f"{adapter.eval_base:.2f}", style="dim")
    if adapter.eval_final is not None:
        text.append(" → ").append(f"{adapter.eval_final:.2f}", style="not dim bold")
    return text


def _staleness(adapter: AdapterStatistics) -> Text:
    late = adapter.max_staleness_seen > adapter.max_staleness
    text = Text(f"{adapter.staleness}/{adapter.max_staleness}", style="bold red" if late else "")
    return text.append(f" max {adapter.max_staleness_seen}", style="dim")


def _meter(share: float, width: int) -> Text:
    full = round(share * width)
    return Text("━" * full, style="green").append("━" * (width - full), style="grey37")


def _load(pool: PoolStatistics, unit: str, queued: str) -> str:
    load = f"{pool.in_flight}/{pool.capacity} {unit}" if unit else ""
    waits = f"{pool.waiting} {queued}" if pool.waiting else ""
    return ", ".join(part for part in (load, waits) if part)
