"""The picture of train_step's result: tokens a second of each contender, and how the shipped base learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {
    "weft": "#1f4e79",
    "weft, base in FP8": "#2e9e6b",
    "base without LoRA": "#9aa5b1",
    "weft, one adapter at a time": "#7fa7d0",
    "stack + torch._grouped_mm": "#d98e04",
    "peft": "#b5443c",
}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """One group of bars a case; beside it, where there is one, the learning run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if "fault" not in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    curves = result.get("learning", [])
    figure, axes = plt.subplots(
        1, 2 if curves else 1, figsize=(16 if curves else 10, 6), width_ratios=[2, 1] if curves else None
    )
    bars = axes[0] if curves else axes
    names = [name for name in COLOURS if any(row["contender"] == name for row in rows)]
    for index, name in enumerate(names):
        found = {row["case"]: row for row in rows if row["contender"] == name}
        places = [i + (index - (len(names) - 1) / 2) * 0.8 / len(names) for i, case in enumerate(cases) if case in found]
        own = [found[case] for case in cases if case in found]
        heights = [row["tokens_per_second"] for row in own]
        low = [max(0, h - row["tokens"] / row["p90_ms"] * 1e3) for h, row in zip(heights, own, strict=True)]
        high = [max(0, row["tokens"] / row["p10_ms"] * 1e3 - h) for h, row in zip(heights, own, strict=True)]
        bars.bar(places, heights, 0.8 / len(names), yerr=(low, high), label=name, color=COLOURS[name])
    bars.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    bars.set_ylabel("tokens a second (bars: median; lines: p10 to p90)")
    bars.set_title(f"Training step, Qwen3-4B shape, {result['hardware'].get('gpu', result['hardware']['cpu'])}")
    bars.legend()
    for curve in curves:
        style = "--" if curve["base"] == "fp8" else "-"
        colour = {"calculator": "#1f4e79", "larger": "#d98e04"}.get(curve["adapter"])
        axes[1].plot(curve["reward"], style, color=colour, label=f"{curve['adapter']}, base in {curve['base']}")
    if curves:
        axes[1].set(xlabel="step", ylabel="mean reward of 64 rollouts", title="The shipped base, trained over each precision")
        axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
