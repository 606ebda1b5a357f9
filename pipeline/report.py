"""report.html: a run in one file, with nothing to fetch, in the light or dark of the reader's screen; its plots as PNG too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from weft.pipeline.history import AdapterHistory, History
from weft.pipeline.metrics import finite
from weft.pipeline.palette import adapter_colour
from weft.pipeline.plots import draw_held_out, draw_rewards, draw_staleness, save_png, style, to_svg
from weft.pipeline.samples import newest_samples
from weft.pipeline.summary import busy_shares, count, duration, told_work
from weft.pipeline.timeline import draw_overlap, draw_pools

Draw = Callable[[History], Figure | None]
# file name, heading, what the reader sees, who draws it
PLOTS: tuple[tuple[str, str, str, Draw], ...] = (
    (
        "rewards",
        "Reward",
        "Mean reward of each optimizer step (thin) and of the last five (bold); the other adapters in grey. "
        "Ring and disc: held-out prompts before and after training.",
        draw_rewards,
    ),
    (
        "held_out",
        "Held-out prompts, before and after",
        "Sampled by the samplers under the base model (ring) and under the last version of the adapter (disc).",
        draw_held_out,
    ),
    (
        "staleness",
        "Staleness",
        "Share of the trained groups by the number of optimizer steps between the oldest version that sampled them and the "
        "version that they trained. Nothing may lie in the shaded part.",
        draw_staleness,
    ),
    (
        "pools",
        "Pools over time",
        "What each pool did for which adapter. A launch of the trainer is shared by adapters that were ready.",
        draw_pools,
    ),
    (
        "overlap",
        "A close-up of the middle",
        "While some adapters sample, others train: height of the pale part is rollouts in flight, below it trainer launches "
        "(solid) and the sync of the new version (black on light, white on dark).",
        draw_overlap,
    ),
)
STEP_COLUMNS = (
    ("step", "step"),
    ("reward/mean", "reward"),
    ("reward/std", "std"),
    ("reward/no_signal", "no signal"),
    ("staleness/max", "stale"),
    ("loss", "loss"),
    ("grad_norm", "grad_norm"),
    ("kl", "kl"),
    ("entropy", "entropy"),
    ("logprob_diff", "logprob_diff"),
    ("tokens/sampled", "sampled"),
    ("tokens/trained", "trained"),
    ("time/rollout", "rollout s"),
    ("time/queue", "queue s"),
    ("time/train", "train s"),
    ("time/sync", "sync s"),
)
MAX_STEPS = 400  # rows of one adapter's table: of more, evenly chosen ones, which is said
MAX_SPLITS = 16  # rows of the table of splits
MAX_TABLES = 64  # adapters with a table of steps, and with a rollout to read
SAMPLES_CAPTION = "One rollout of each adapter's last evaluation or step; samples.jsonl holds some of every one."
CSS = """
:root { color-scheme: light dark; --ink: #1c2026; --muted: #667080; --grid: #e4e7eb; --faint: #c7ccd4; --paper: #ffffff;
  --page: #f6f7f9; --good: #217a48; --bad: #c8362d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #98a2b0; --grid: #2b3038; --faint: #464d58;
  --paper: #16191e; --page: #0f1115; --good: #58c088; --bad: #f0776e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; letter-spacing: -0.02em; line-height: 1.2; margin: 0; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 0 0 2px; }
p { margin: 0; }
.muted { color: var(--muted); } .good { color: var(--good); } .bad { color: var(--bad); }
section { background: var(--paper); border: 1px solid var(--grid); border-radius: 12px; padding: 22px 24px; margin-top: 20px; }
section > p { color: var(--muted); font-size: 13.5px; max-width: 90ch; margin-bottom: 14px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; margin-top: 24px; }
.fact { background: var(--paper); border: 1px solid var(--grid); border-radius: 12px; padding: 12px 14px; }
.fact b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em; }
.fact small { color: var(--muted); font-size: 12.5px; display: block; line-height: 1.35; }
.plot { overflow-x: auto; } .plot svg { display: block; width: 100%; min-width: 680px; height: auto; }
svg text { font-family: inherit !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; text-align: right; padding: 5px 6px; border-bottom: 1px solid var(--faint); }
td { text-align: right; padding: 5px 6px; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
details { border-top: 1px solid var(--grid); padding: 8px 0; }
summary { cursor: pointer; font-weight: 550; }
pre.said { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 480px; background: var(--page); border-radius: 8px; padding: 12px 14px; font-size: 12.5px; }
""".strip()


def write_report(
    folder: str | Path, history: History, summary: Mapping[str, Any], settings: Mapping[str, Any], title: str = "weft"
) -> Path:
    """Write report.html and plots/*.png into the run folder; returns the page's path.

    settings: the configuration as plain values; its `adapters` (a list of mappings with a name) are compared.
    """
    folder = Path(folder)
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    body = [_head(history, summary, title), _section("Adapters", "", _adapters(history, summary))]
    for name, heading, caption, draw in PLOTS:
        with style():
            figure = draw(history)
            if figure is None:
                continue
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once for all that is made of it
        save_png(figure, plots / f"{name}.png", heading)
        svg = _own_ids(to_svg(figure), name)
        body.append(_section(heading, caption, f'<div class="plot" role="img" aria-label="{escape(heading)}">{svg}</div>'))
    body.append(_section("Samplers and trainers", _work_caption(summary["work"]), _splits(summary["work"])))
    body.append(_failures(summary))
    body.append(_section("What differs between the adapters", "", _differences(settings)))
    body.append(_section("What they wrote last", SAMPLES_CAPTION, "".join(_samples(history, newest_samples(folder)))))
    body.append(_section("Steps", _steps_caption(history), "".join(_steps(history))))
    text = escape(json.dumps(finite(settings), indent=2, default=str))
    body.append(_section("Configuration", "", f"<details><summary>all settings</summary><pre>{text}</pre></details>"))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>{''.join(body)}</main></body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _head(history: History, summary: Mapping[str, Any], title: str) -> str:
    adapters = summary["adapters"].values()
    finished = sum(adapter["state"] == "finished" for adapter in adapters)
    steps = sum(adapter["version"] for adapter in adapters)
    violations = summary["staleness_violations"]
    samplers, trainers = busy_shares(summary)
    facts = [
        (duration(summary["wall_seconds"]), "wall time"),
        (f"{finished} of {len(summary['adapters'])}", "adapters finished"),
        (count(steps), "optimizer steps"),
        (count(sum(adapter["tokens_trained"] for adapter in adapters)), "tokens trained"),
        (f"{samplers:.0%}", "samplers busy"),
        (f"{trainers:.0%}", "trainers busy"),
        (
            f'<span class="{"bad" if violations else "good"}">{violations}</span>',
            "staleness violations",
        ),
    ]
    cards = "".join(f'<div class="fact"><b>{value}</b><small>{escape(label)}</small></div>' for value, label in facts)
    resumed = f", in {len(history.sessions)} sessions" if len(history.sessions) > 1 else ""
    told = f"{len(summary['adapters'])} LoRA adapters trained at once on one frozen base{resumed}."
    return f'<header><h1>{escape(title)}</h1><p class="muted">{told}</p><div class="facts">{cards}</div></header>'


def _section(heading: str, caption: str, content: str) -> str:
    if not content:
        return ""
    told = f"<p>{escape(caption)}</p>" if caption else ""
    return f"<section><h2>{escape(heading)}</h2>{told}{content}</section>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _adapters(history: History, summary: Mapping[str, Any]) -> str:
    rows = []
    order = {name: index for index, name in enumerate(history.adapters)}
    for name, adapter in summary["adapters"].items():
        colour = adapter_colour(order.get(name, 0))
        base, final = adapter["eval_base"], adapter["eval_final"]
        better = base is not None and final is not None and final > base
        change = f'{number(base)} → <b class="{"good" if better else ""}">{number(final)}</b>'
        late = adapter["max_staleness_seen"] > adapter["max_staleness"]
        state = {"finished": "good", "failed": "bad"}.get(adapter["state"], "muted")
        seconds = adapter["mean_seconds"]
        rows.append(
            [
                _named(name, colour),
                f'<span class="{state}">{escape(adapter["state"])}</span>',
                f"{adapter['version']}/{adapter['num_steps']}",
                _spark(history.adapters[name].series("reward/mean")[1], colour) if name in history.adapters else "",
                change,
                f'<span class="{"bad" if late else ""}">{adapter["max_staleness_seen"]} of {adapter["max_staleness"]}</span>',
                number(adapter["logprob_diff"]["mean"]),
                number(adapter["logprob_diff"]["max"]),
                count(adapter["tokens_trained"]),
                *(number(seconds[part] and round(seconds[part], 2)) for part in ("rollout", "queue", "train", "sync")),
            ]
        )
    headings = ["adapter", "state", "steps", "reward", "held-out", "staleness", "logprob_diff", "max", "tokens trained"]
    return _table([*headings, "rollout s", "queue s", "train s", "sync s"], rows)


def _work_caption(work: Mapping[str, Any] | None) -> str:
    """Also says what the bound leaves out, for a reader who finds that less was done."""
    left_out = "Waiting for a launch that runs, evaluations and checkpoints are not in what is possible."
    return f"{'. '.join(told_work(work))}. {left_out}" if work else ""


def _splits(work: Mapping[str, Any] | None) -> str:
    """A table of the splits around the recommended one: what each could do."""
    if work is None:
        return ""
    best, here = work["recommended"]["samplers"], work["samplers"]
    first = max(min(best - MAX_SPLITS // 2, len(work["splits"]) - MAX_SPLITS), 0)
    rows = []
    for split in work["splits"][first : first + MAX_SPLITS]:
        notes = [note for number, note in ((here, "here"), (best, "recommended")) if split["samplers"] == number]
        told = f'<b class="good">{", ".join(notes)}</b>' if notes else ""
        rows.append([f"{split['samplers']} + {split['trainers']}", f"{split['bound']:.3g}", told])
    return _table(["samplers + trainers", "steps/s possible", ""], rows)


def _failures(summary: Mapping[str, Any]) -> str:
    failed = {name: adapter["traceback"] for name, adapter in summary["adapters"].items() if "traceback" in adapter}
    parts = [
        f"<details open><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in failed.items()
    ]
    parts += [f"<p>{escape(text)}</p>" for text in summary.get("warnings", ())]
    return _section("Faults and warnings", "", "".join(parts))


def _differences(settings: Mapping[str, Any]) -> str:
    """A table of the settings in which the adapters are not all alike."""
    adapters = {str(adapter["name"]): dict(flatten(adapter)) for adapter in settings.get("adapters", ())}
    names = dict.fromkeys(key for values in adapters.values() for key in values if key != "name")
    differing = [key for key in names if len({json.dumps(values.get(key), default=str) for values in adapters.values()}) > 1]
    if not differing:
        return ""
    rows = [
        [_named(name, adapter_colour(index)), *(escape(str(values.get(key, ""))) for key in differing)]
        for index, (name, values) in enumerate(adapters.items())
    ]
    leaves = [key.removesuffix(".name").rpartition(".")[2] for key in differing]  # loss.name is the loss
    return _table(["adapter", *leaves], rows)


def _steps_caption(history: History) -> str:
    cut = [name for name, adapter in history.adapters.items() if len(adapter.steps) > MAX_STEPS]
    told = "Every optimizer step; metrics.jsonl holds them all with more numbers."
    more = f" Of {len(cut)} adapters {MAX_STEPS} steps are shown, evenly chosen." if cut else ""
    return told + more + (f" The first {MAX_TABLES} adapters are shown." if len(history.adapters) > MAX_TABLES else "")


def _steps(history: History) -> Iterator[str]:
    for index, adapter in enumerate(list(history.adapters.values())[:MAX_TABLES]):
        if adapter.steps:
            name = _named(adapter.name, adapter_colour(index))
            yield f"<details><summary>{name}</summary>{_steps_of(adapter)}</details>"


def _samples(history: History, newest: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for index, name in enumerate(list(history.adapters)[:MAX_TABLES]):
        if name not in newest:
            continue
        line = newest[name]
        kind = "held out" if line["held_out"] else "training"
        told = f"{kind}, step {line['step']}, prompt {line['prompt_index']}, reward {number(line['reward'])}"
        messages = (*line["prompt"], *line["completion"])
        text = "\n\n".join(f"<b>{escape(said['role'])}</b>\n{escape(said['content'])}" for said in messages)
        heading = f'{_named(name, adapter_colour(index))} <span class="muted">{told}</span>'
        yield f'<details><summary>{heading}</summary><pre class="said">{text}</pre></details>'


def _steps_of(adapter: AdapterHistory) -> str:
    lines = adapter.steps
    if len(lines) > MAX_STEPS:
        lines = [lines[round(i * (len(lines) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
    columns = [(key, heading) for key, heading in STEP_COLUMNS if any(line.get(key) is not None for line in lines)]
    return _table([heading for _, heading in columns], [[number(line.get(key)) for key, _ in columns] for line in lines])


def _named(name: str, colour: str) -> str:
    return f'<span class="dot" style="background:{colour}"></span>{escape(name)}'


def _spark(values: Sequence[float], colour: str, width: int = 96, height: int = 20) -> str:
    """A small curve, on one scale of 0 to 1 where all values lie within."""
    if len(values) < 2:
        return ""
    low, high = min(0.0, *values), max(1.0, *values)
    step = (width - 4) / (len(values) - 1)
    points = " ".join(
        f"{2 + i * step:.1f},{height - 2 - (value - low) / (high - low) * (height - 4):.1f}" for i, value in enumerate(values)
    )
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}"><polyline points="{points}" fill="none" '
        f'stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/></svg>'
    )


def number(value: Any) -> str:
    """A number short enough for a table: whole as it is, else three significant digits."""
    if value is None:
        return '<span class="muted">-</span>'
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value)}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _own_ids(svg: str, name: str) -> str:
    """Ids of one plot must not meet those of another on the page."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return re.sub(r'href="#', f'href="#{name}-', svg)
