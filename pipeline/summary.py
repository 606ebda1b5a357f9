"""summary.json: what a run came to, in one file that a script can read; and the same in a short table for the eye."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.configs.schema import ClusterConfig
from weft.pipeline.events import AdapterStatistics, PipelineStatistics, PoolStatistics
from weft.pipeline.history import AdapterHistory, History
from weft.pipeline.metrics import finite
from weft.pipeline.split import account

POOLS = ("sampler", "trainer")
TOLD = 5  # warnings below the table
WIDE, OTHERS = 100, 60  # columns of a terminal that has room for all; of a row but for the adapter's name and what it trained
Summary = dict[str, Any]


def summarize(
    statistics: PipelineStatistics, history: History, wall_seconds: float, cluster: ClusterConfig | None = None
) -> Summary:
    """The summary of a run. cluster: what it ran on; None: as many samplers as have sampled, each process alike.

    wall_seconds: of the command, from start to end, set-up of the cluster included; the seconds of earlier sessions that a
    resume continues are in `session_seconds`. staleness_violations: tokens trained beyond their adapter's bound, by what each
    step recorded of its batch. logprob_diff: |trainer - sampler| in nats, mean and max over the steps' means. members: what
    each process of the pools counted last. work: what an adapter-step needs of each pool, and the split of processes that would
    do most (split.py); null without a step.
    """
    adapters = {
        name: _adapter(adapter, history.adapters.get(name) or AdapterHistory(name))
        for name, adapter in statistics.adapters.items()
    }
    ends = [*history.sessions[1:], history.seconds]
    return {
        "wall_seconds": wall_seconds,
        "pipeline_seconds": statistics.time,
        "session_seconds": [end - start for start, end in zip(history.sessions, ends, strict=False)],
        "staleness_violations": sum(adapter["staleness_violations"] for adapter in adapters.values()),
        "pools": {"samplers": _pool(statistics.samplers), "trainers": _pool(statistics.trainers)},
        "members": history.members,
        "work": _work(statistics, history, cluster),
        "warnings": [*statistics.warnings, *history.passed_over],
        "adapters": adapters,
    }


def _work(statistics: PipelineStatistics, history: History, cluster: ClusterConfig | None) -> Summary | None:
    sizes = (statistics.trainers.capacity, statistics.samplers.capacity)
    if cluster is None:
        return account(history, 0, *sizes)
    of_each = (max(int(cluster.gpus_per_sampler), 1), max(int(cluster.gpus_per_trainer), 1))
    return account(history, cluster.samplers, *sizes, of_each)


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write it whole or not at all: a reader never sees half a summary. NaN and infinities become null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(finite(summary), indent=2) + "\n"
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _adapter(now: AdapterStatistics, history: AdapterHistory) -> Summary:
    _, rewards = history.series("reward/mean")
    steps, differences = history.series("logprob_diff")
    seconds = {name: _mean(history.series(f"time/{name}")[1]) for name in ("rollout", "queue", "train", "sync", "step")}
    entry: Summary = {
        "state": str(now.phase),
        "version": now.version,
        "lineage": now.lineage,
        "num_steps": now.num_steps,
        "eval_base": now.eval_base,
        "eval_final": now.eval_final,
        "reward_first": rewards[0] if rewards else None,
        "reward_last": rewards[-1] if rewards else now.reward,
        "max_staleness": now.max_staleness,
        "max_staleness_seen": now.max_staleness_seen,
        "staleness_violations": history.late_tokens,
        "tokens_sampled": now.tokens_sampled,
        "tokens_trained": now.tokens_trained,
        "logprob_diff": {
            "mean": _mean(differences),
            "max": max(differences, default=None),
            "max_at_step": steps[differences.index(max(differences))] if differences else None,
            "first": differences[0] if differences else None,
        },
        "mean_seconds": seconds,
        "rollbacks": now.rollbacks,
        "peft_path": now.peft_path,
    }
    if now.traceback:
        entry["traceback"] = now.traceback
    return entry


def _pool(pool: PoolStatistics) -> Summary:
    return {"capacity": pool.capacity, "busy": pool.busy, "load": pool.load, "busy_seconds": pool.busy_seconds}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---- the closing table ----


def closing_table(summary: Mapping[str, Any], width: int = 100) -> Table:
    """One row an adapter: what it could before, what it can now, and whether its promises were kept. width: of the terminal."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    wide = width >= WIDE
    table.add_column("adapter", no_wrap=True, max_width=None if wide else max(width - OTHERS, 8))
    for heading in ("state", "steps", "held-out", "stale", "logprob_diff", "trained")[: 6 if wide else 5]:
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for name, adapter in summary["adapters"].items():
        failed = adapter["state"] == "failed"
        late = adapter["max_staleness_seen"] > adapter["max_staleness"]
        row: list[Text | str] = [
            name,
            Text(adapter["state"], style="red" if failed else "green" if adapter["state"] == "finished" else "yellow"),
            f"{adapter['version']}/{adapter['num_steps']}",
            _change(adapter["eval_base"], adapter["eval_final"]),
            Text(f"{adapter['max_staleness_seen']}/{adapter['max_staleness']}", style="red" if late else ""),
            _small(adapter["logprob_diff"]["mean"]),
            count(adapter["tokens_trained"]),
        ]
        table.add_row(*row[: len(table.columns)])
    return table


def print_closing(summary: Mapping[str, Any], console: Console) -> None:
    """The closing table, one line of totals, and the last line of each failed adapter's traceback."""
    console.print()
    console.print(closing_table(summary, console.width))
    violations = summary["staleness_violations"]
    samplers, trainers = busy_shares(summary)
    console.print(
        f"{told_time(summary)} · samplers busy {samplers:.0%}, trainers {trainers:.0%} · staleness violations {violations}",
        style="bold red" if violations else "dim",
        highlight=False,
    )
    for line in told_work(summary["work"]):
        console.print(line, style="dim", highlight=False)
    died = [(name, numbers["deaths"]) for pool in summary["members"].values() for name, numbers in pool.items()]
    if told := ", ".join(f"{name} {deaths:.0f}x" for name, deaths in died if deaths):
        console.print(f"processes that died and were started again: {told}", style="yellow", highlight=False)
    for warning in summary["warnings"][:TOLD]:
        console.print(warning, style="yellow", markup=False, highlight=False)
    if more := len(summary["warnings"][TOLD:]):
        console.print(f"{more} more warnings are in summary.json", style="yellow", highlight=False)
    for name, adapter in summary["adapters"].items():
        if "traceback" in adapter:
            last = adapter["traceback"].strip().splitlines()[-1]
            console.print(
                f"{name} failed: {last} (whole traceback in summary.json)", style="red", markup=False, highlight=False
            )


def told_time(summary: Mapping[str, Any]) -> str:
    """Of the command. Of the earlier sessions of a run that was resumed the journal knows how long their pools ran."""
    now, earlier = duration(summary["wall_seconds"]), summary["session_seconds"][:-1]
    return f"{now} this time, {duration(sum(earlier))} of running before" if earlier else f"{now} in all"


def busy_shares(summary: Mapping[str, Any]) -> tuple[float, float]:
    """Of the samplers and the trainers, a mean over the processes of each pool; of the whole pool where no step was taken."""
    if work := summary["work"]:
        return work["samplers_busy"], work["trainers_busy"]
    return summary["pools"]["samplers"]["busy"], summary["pools"]["trainers"]["busy"]


def told_work(work: Mapping[str, Any] | None) -> Iterator[str]:
    """W_s, W_t, what was done of what can be done, and the split that would do most."""
    if work is None:
        return
    samplers, trainers, best = work["samplers"], work["trainers"], work["recommended"]
    yield (
        f"an adapter-step takes {work['sampler_seconds']:.3g} s of a full sampler (W_s) "
        f"and {work['trainer_seconds']:.3g} s of a trainer (W_t)"
    )
    yield (
        f"{samplers} + {trainers} of them can do {work['bound']:.3g} steps/s at most, "
        f"and did {work['steps_per_second']:.3g} ({work['steps_per_second'] / work['bound']:.0%})"
    )
    if len(work["splits"]) > 1:
        pair = (best["samplers"], best["trainers"])
        told = "as here" if pair == (samplers, trainers) else f"{best['bound']:.3g} steps/s at most"
        split = " + ".join(f"{number} {noun}{'s' * (number > 1)}" for noun, number in zip(POOLS, pair, strict=True))
        whole = f"{work['cards']} {'processes' if work['cards'] == samplers + trainers else 'GPUs'}"
        yield f"recommended split of {whole}: {split} ({told})"


def _change(base: float | None, final: float | None) -> Text:
    if base is None and final is None:
        return Text("-", style="dim")
    text = Text(f"{base:.2f}" if base is not None else "-", style="dim")
    text.append(" → ")
    if final is None:
        return text.append("-")
    better = base is None or final > base
    return text.append(f"{final:.2f}", style="bold green" if better else "" if final == base else "bold red")


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def count(number: float) -> str:
    """1234567 -> '1.2M': three significant digits at most."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number / size < 999.5 else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """75.2 -> '1:15'; 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
