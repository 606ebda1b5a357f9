"""Plots of time: what each pool did for whom over the whole run, and a close-up of how sampling, training and sync overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from weft.pipeline.events import Interval, Phase
from weft.pipeline.history import History
from weft.pipeline.plots import INK, MAX_SHOWN, WIDTH, colours

BINS = 180  # of the whole run: narrower ones flicker
ZOOM_LAUNCHES = 14  # trainer launches in the close-up

Values = NDArray[np.float64]


def draw_pools(history: History) -> Figure | None:
    """What each pool did for whom: rollouts in flight, share of the trainer, adapters whose version was on its way."""
    if not history.groups or history.seconds <= 0:
        return None
    names = list(history.adapters)
    rollouts = [(span.adapter, span.start, span.end, float(span.rollouts)) for span in history.groups]
    trainers = len({launch.trainer for launch in history.launches})
    training = [
        (name, launch.start, launch.end, tokens / total / trainers)
        for launch in history.launches
        if (total := sum(launch.tokens.values()))  # none where every rollout of the steps had the same reward
        for name, tokens in launch.tokens.items()
    ]
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1.3])
    edges = np.linspace(0.0, history.seconds, BINS + 1)
    _stack(panels[0], edges, occupancy(rollouts, names, edges), list(colours(history).values()))
    _stack(panels[1], edges, occupancy(training, names, edges), list(colours(history).values()))
    _raster(panels[2], history)
    titles = (
        "samplers: rollouts in flight",
        "trainer: share of the time in a launch" if trainers < 2 else "trainers: share of the time in launches",
        "parameter sync: each new version, installed",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", color=INK)
        axes.spines["left"].set_visible(False)
        for start in history.sessions[1:]:
            axes.axvline(start, color=INK, linewidth=1.0, linestyle=(0, (2, 2)))
    panels[1].set_ylim(0, 1.02)
    panels[1].set_yticks([0.0, 0.5, 1.0])
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for start in history.sessions[1:]:
        panels[0].annotate("resumed", (start, panels[0].get_ylim()[1]), xytext=(3, -2), textcoords="offset points", va="top")
    panels[2].set_xlim(0, history.seconds)
    panels[2].set_xlabel("seconds since the start")
    _legend(figure, colours(history))
    return figure


def draw_overlap(history: History) -> Figure | None:
    """A close-up: while some adapters sample (pale), others train (solid) and sync (ink), each on its own row."""
    if not history.launches:
        return None
    start, end = close_up(history)
    busy = {interval.adapter for interval in history.phases if interval.start < end and interval.end > start}
    names = [name for name in history.adapters if name in busy][:MAX_SHOWN]
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 0.7 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(start, end, 2 * BINS + 1)
    rollouts = occupancy([(span.adapter, span.start, span.end, float(span.rollouts)) for span in history.groups], names, edges)
    most = max(float(rollouts.max()), 1.0)
    colour = colours(history)
    for row, name in enumerate(names):
        floor = row + 0.12
        level = np.append(rollouts[row], rollouts[row][-1]) / most * 0.72
        axes.fill_between(edges, floor, floor - level, step="post", color=colour[name], alpha=0.35, linewidth=0, zorder=2)
        _bars(axes, history.phases, name, Phase.TRAINING, floor, colour[name])
        _bars(axes, history.phases, name, Phase.SYNCING, floor, INK)
    axes.set_yticks(list(range(len(names))), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=colour[name], fontweight="bold", fontsize=8.5)
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.set_xlim(start, end)
    axes.grid(axis="x")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("seconds since the start  (pale: rollouts in flight, solid: training, black or white: sync)")
    return figure


def close_up(history: History) -> tuple[float, float]:
    """A stretch in the middle of the run with about ZOOM_LAUNCHES trainer launches."""
    launches = sorted(history.launches, key=lambda launch: launch.start)
    first = max(len(launches) // 2 - ZOOM_LAUNCHES // 2, 0)
    chosen = launches[first : first + ZOOM_LAUNCHES]
    return chosen[0].start, max(chosen[-1].end, chosen[0].start + 1e-3)


def occupancy(spans: Sequence[tuple[str, float, float, float]], names: Sequence[str], edges: Values) -> Values:
    """Mean weight in flight per adapter and bin, [len(names), len(edges) - 1].

    A span (name, start, end, weight) counts in a bin for the part of the bin that it covers: the integral over time is kept.
    """
    rows = {name: row for row, name in enumerate(names)}
    width = edges[1] - edges[0]
    covered = np.zeros((len(names), len(edges)))
    for name, start, end, weight in spans:
        if name in rows and end > start:
            # the integral of the span up to each edge; its differences are what each bin holds
            covered[rows[name]] += weight * (np.clip(edges, start, end) - start)
    return np.asarray(np.diff(covered, axis=1) / width)


def _stack(axes: Axes, edges: Values, rows: Values, ink: Sequence[str]) -> None:
    """Rows on top of each other, as steps."""
    floor = np.zeros(rows.shape[1] + 1)
    for row, colour in zip(rows, ink, strict=True):
        if row.any():
            top = floor + np.append(row, row[-1])
            axes.fill_between(edges, floor, top, step="post", color=colour, linewidth=0, zorder=2)
            floor = top
    axes.set_ylim(0, max(float(floor.max()) * 1.08, 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.grid(axis="y")


def _raster(axes: Axes, history: History) -> None:
    """One mark for each version that was brought to the samplers, on its adapter's line."""
    rows = {name: row for row, name in enumerate(history.adapters)}
    for name, colour in colours(history).items():
        times = [span.end for span in history.phases if span.adapter == name and span.phase is Phase.SYNCING]
        axes.vlines(times, rows[name] + 0.1, rows[name] + 0.9, color=colour, linewidth=1.3)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([])


def _bars(axes: Axes, phases: Sequence[Interval], name: str, phase: Phase, floor: float, colour: str) -> None:
    spans = [(i.start, i.end - i.start) for i in phases if i.adapter == name and i.phase is phase]
    axes.broken_barh(spans, (floor, 0.24), facecolors=colour, linewidth=0, zorder=3)


def _legend(figure: Figure, colour: Mapping[str, str]) -> None:
    shown = list(colour.items())[:MAX_SHOWN]
    marks: list[Any] = [Line2D([], [], marker="o", linestyle="", markersize=6, color=ink) for _, ink in shown]
    labels = [name for name, _ in shown]
    columns = max(min(len(shown), 140 // (max(map(len, labels)) + 5)), 1)  # 140 letters fit the figure's width
    figure.legend(marks, labels, loc="outside lower center", ncols=columns, handletextpad=0.1, columnspacing=1.4)
