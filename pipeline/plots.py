"""The plots of a run, from its history: PNG files, and SVG for the report that follows the page's light or dark colours.

One colour an adapter everywhere (palette.py), values labelled where they are read, no frame that says nothing.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from weft.pipeline.history import AdapterHistory, History
from weft.pipeline.palette import adapter_colour

INK, MUTED, GRID, FAINT, PAPER = "#1c2026", "#6b7280", "#e4e7eb", "#c7ccd4", "#ffffff"
RED = "#d8483f"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", FAINT: "var(--faint)", PAPER: "var(--paper)"}
STYLE: Mapping[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "weft",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelsize": 7.5,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.labelsize": 7.5,
    "ytick.major.size": 0,
}
WIDTH = 10.6  # inches of every figure
MAX_SHOWN = 24  # adapters with a panel or row of their own
SMOOTH = 5  # steps of the bold line's running mean


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for these plots, put back afterwards."""
    settings: Any = dict(STYLE)  # matplotlib types its keys as literals
    with matplotlib.rc_context(settings):
        yield


def colours(history: History) -> dict[str, str]:
    """The colour of each adapter."""
    return {name: adapter_colour(index) for index, name in enumerate(history.adapters)}


def save_png(figure: Figure, path: Path, title: str) -> None:
    """Write the figure on white, with its title."""
    with style():
        width, height = figure.get_size_inches()
        text = figure.text(0.003, 1.0 + 0.12 / height, title, fontsize=11, fontweight="bold", va="bottom", ha="left")
        figure.savefig(path, dpi=160, facecolor=PAPER, bbox_inches=Bbox([[-0.15, -0.15], [width + 0.15, height + 0.45]]))
        text.remove()


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element without background, its ink the page's own CSS variables."""
    with style():
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" ', r"<svg \1", text, count=1)


# ---- one panel an adapter ----


def draw_rewards(history: History) -> Figure | None:
    """Reward of each step (thin), its running mean (bold), held-out before (ring) and after (disc); the others in grey."""
    shown = [adapter for adapter in history.adapters.values() if adapter.series("reward/mean")[0]][:MAX_SHOWN]
    if not shown:
        return None
    figure, panels = _panels(len(shown), height=1.75)
    colour = colours(history)
    curves = {adapter.name: adapter.series("reward/mean") for adapter in shown}
    rewards = [value for _, values in curves.values() for value in values]
    low, high = min(0.0, *rewards, 0.0), max(1.0, *rewards)
    last = max(line["num_steps"] for adapter in shown for line in adapter.steps[-1:])
    for axes, adapter in zip(panels, shown, strict=True):
        for name, (steps, values) in curves.items():
            if name != adapter.name:
                axes.plot(steps, running_mean(values), color=GRID, linewidth=1.0, zorder=1)
        _draw_curve(axes, adapter, curves[adapter.name], colour[adapter.name])
        axes.set_xlim(-0.03 * last, last * 1.14)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        axes.set_title(adapter.name, loc="left", color=colour[adapter.name], fontweight="bold")
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
    _label_edges(figure, panels, "step")
    return figure


def _draw_curve(axes: Axes, adapter: AdapterHistory, curve: tuple[list[int], list[float]], colour: str) -> None:
    steps, values = curve
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.45, zorder=2)
    axes.plot(steps, running_mean(values), color=colour, linewidth=2.0, zorder=3, solid_capstyle="round")
    redone = [(line["step"], line["reward/mean"]) for line in adapter.redone if line["reward/mean"] is not None]
    if redone:
        axes.scatter([step for step, _ in redone], [value for _, value in redone], s=6, color=MUTED, linewidths=0, zorder=2)
    marks: dict[str, Any] = {"s": 30, "edgecolors": colour, "linewidths": 1.5, "zorder": 4, "clip_on": False}
    if adapter.eval_base is not None:
        axes.scatter([0], [adapter.eval_base], facecolors=PAPER, **marks)
    if adapter.eval_final is not None:
        axes.scatter([steps[-1]], [adapter.eval_final], facecolors=colour, **marks)
    end = adapter.eval_final if adapter.eval_final is not None else running_mean(values)[-1]
    axes.annotate(
        f"{end:.2f}", (steps[-1], end), xytext=(6, 0), textcoords="offset points", va="center", color=colour, fontweight="bold"
    )


def draw_staleness(history: History) -> Figure | None:
    """Share of the trained groups at each staleness, and where the adapter's own bound is."""
    shown = [adapter for adapter in history.adapters.values() if adapter.steps][:MAX_SHOWN]
    if not shown:
        return None
    colour = colours(history)
    bounds = {adapter.name: int(adapter.steps[-1]["staleness/bound"]) for adapter in shown}
    last = max(*bounds.values(), *(max(adapter.staleness, default=0) for adapter in shown)) + 1
    figure, panels = _panels(len(shown), height=1.35)
    for axes, adapter in zip(panels, shown, strict=True):
        ages = np.bincount(np.array(adapter.staleness, dtype=np.int64), minlength=last + 1)
        shares = ages / max(ages.sum(), 1)
        bound = bounds[adapter.name]
        beyond = [RED if age > bound else colour[adapter.name] for age in range(last + 1)]
        axes.axvspan(bound + 0.5, last + 0.5, color=GRID, alpha=0.6, linewidth=0, zorder=0)
        axes.bar(range(last + 1), shares, width=0.72, color=beyond, zorder=2)
        for age, share in enumerate(shares):
            if share > 0:
                axes.annotate(
                    f"{share:.0%}" if share >= 0.01 else "<1%",
                    (age, share),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    color=INK,
                    fontsize=7.5,
                )
        axes.annotate("beyond\nits bound", ((bound + last + 1) / 2, 0.98), ha="center", va="top", color=MUTED, fontsize=6.5)
        axes.set_xlim(-0.5, last + 0.5)
        axes.set_ylim(0, 1.18)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(min(last + 1, 6), integer=True))
        axes.set_title(adapter.name, loc="left", color=colour[adapter.name], fontweight="bold")
    _label_edges(figure, panels, "staleness (steps)")
    return figure


def draw_held_out(history: History) -> Figure | None:
    """Held-out reward before training (ring) and after it (disc), one row an adapter."""
    shown = [
        adapter for adapter in history.adapters.values() if adapter.eval_base is not None or adapter.eval_final is not None
    ]
    shown = shown[:MAX_SHOWN]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 0.5 + 0.32 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    colour = colours(history)
    ends = [value for a in shown for value in (a.eval_base, a.eval_final) if value is not None]
    for row, adapter in enumerate(shown):
        base, final, ink = adapter.eval_base, adapter.eval_final, colour[adapter.name]
        if base is not None and final is not None:
            axes.plot([base, final], [row, row], color=ink, linewidth=2.2, alpha=0.45, zorder=2)
        side = 1 if final is None or base is None or final >= base else -1
        if base is not None:
            axes.scatter([base], [row], s=42, facecolors=PAPER, edgecolors=ink, linewidths=1.6, zorder=3)
            _value(axes, base, row, -side, MUTED)
        if final is not None:
            axes.scatter([final], [row], s=42, color=ink, linewidths=1.6, zorder=3)
            _value(axes, final, row, side, ink, bold=True)
    axes.set_yticks(range(len(shown)), [adapter.name for adapter in shown])
    for label, adapter in zip(axes.get_yticklabels(), shown, strict=True):
        label.set(color=colour[adapter.name], fontweight="bold", fontsize=8.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(min(0.0, *ends) - 0.02, max(1.0, *ends) + 0.06)
    axes.grid(axis="x")
    for side_name in ("left", "bottom"):
        axes.spines[side_name].set_visible(False)
    axes.set_xlabel("mean reward over held-out prompts:  ○ before  ● after")
    return figure


def _value(axes: Axes, value: float, row: int, side: int, colour: str, bold: bool = False) -> None:
    axes.annotate(
        f"{value:.2f}",
        (value, row),
        xytext=(8 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        color=colour,
        fontweight="bold" if bold else "normal",
    )


def running_mean(values: Sequence[float], window: int = SMOOTH) -> list[float]:
    """Mean of each value and the `window` - 1 before it."""
    return [math.fsum(values[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(number, 4)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for unused in grid[number:]:
        unused.set_visible(False)
    return figure, list(grid[:number])


def _label_edges(figure: Figure, panels: Sequence[Axes], label: str) -> None:
    """Name the x axis below the last panel of each column, and show its ticks there."""
    columns = min(len(panels), 4)
    for axes in panels[-columns:]:
        axes.set_xlabel(label)
        axes.tick_params(labelbottom=True)
