"""The picture of decode's result: tokens a second of vLLM without LoRA, with its own kernels and with ours, at r = 32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"without LoRA": "#9aa5b1", "vLLM's own kernels": "#b5443c", "ours": "#1f4e79"}


def cases(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """What a group of bars is of -> its rows, by the names above. The base alone is that of the same part."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    rows = [row for row in rows if "fault" not in row and row["generated"] > 1]

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("part", "batch", "prompt", "generated"))

    for ours in [row for row in rows if row["contender"].startswith("weft") and "ratio_to_vllm" in row]:
        beside = {"ours": ours}
        for row in rows:
            if key(row) == key(ours) and not row["adapters"]:
                beside["without LoRA"] = row
            same = all(row[name] == ours[name] for name in ("adapters", "mix", "ranks"))
            if key(row) == key(ours) and same and row["contender"].startswith("vllm"):
                beside["vLLM's own kernels"] = row
        if len(beside) == len(COLOURS):
            slots = beside["vLLM's own kernels"]["slots"]
            notes = ["Zipf"] * (ours["mix"] == "zipf") + [f"{slots} slots"] * (slots > max(8, ours["adapters"]))
            lines = [f"{ours['adapters']} of {ours['batch']}", f"{ours['generated']} tokens", *notes]
            found.setdefault("\n".join(lines), beside)
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """One group of bars a case: median, and p10 to p90."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = cases(list(result["rows"]))
    figure, bars = plt.subplots(figsize=(16, 6))
    for index, (name, colour) in enumerate(COLOURS.items()):
        own = [beside[name] for beside in groups.values()]
        heights = [row["tokens_per_second"] for row in own]
        tokens = [row["batch"] * row["generated"] for row in own]
        low = [max(0, h - n / row["p90_s"]) for h, n, row in zip(heights, tokens, own, strict=True)]
        high = [max(0, n / row["p10_s"] - h) for h, n, row in zip(heights, tokens, own, strict=True)]
        places = [at + (index - 1) * 0.27 for at in range(len(own))]
        bars.bar(places, heights, 0.27, yerr=(low, high), label=name, color=colour)
    for at, beside in enumerate(groups.values()):
        bars.annotate(
            f"{beside['ours']['ratio_to_vllm']}x",
            (at + 0.27, beside["ours"]["tokens_per_second"]),
            ha="center",
            va="bottom",
            fontsize=9,
        )
    bars.set_xticks(range(len(groups)), list(groups))
    bars.set_ylabel("tokens a second (bars: median; lines: p10 to p90)")
    gpu = result["hardware"].get("gpu", result["hardware"]["cpu"])
    bars.set_title(f"vLLM decoding, Qwen3-4B shape, r = 32, {gpu}; 8 of 256: adapters, batch; x: of vLLM's own kernels")
    bars.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
