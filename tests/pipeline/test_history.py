"""A run folder is read back whatever else has been written into its files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from weft.configs.schema import ClusterConfig
from weft.pipeline.events import MemberCounted
from weft.pipeline.history import History
from weft.pipeline.metrics import Metrics
from weft.pipeline.report import write_report
from weft.pipeline.summary import print_closing, summarize

FILES = ("events.jsonl", "metrics.jsonl")
OTHERS = (
    '{"session":0,"step":1,"note":"mine"}',
    '{"session":0,"event":"Lunch","time":3}',
    '{"session":"0","event":"Session"}',
    '{"session":[0],"event":["Session"]}',
    "3",
    "null",
    "[1,2]",
    '{"session":' + "9" * 5000 + "}",
    "[" * 100_000 + "]" * 100_000,
)
WRONG: tuple[Any, ...] = (None, "text", True, -1, 1e400, 10**400, [], [None], {"x": None}, {"1": "x"})


@pytest.fixture
def run(tmp_path, synthetic_run):
    made = synthetic_run(num_steps=3, names=("letters", "sorting"), fail="sorting")
    with Metrics(tmp_path) as metrics:
        for event in made.events():
            metrics(event)
        metrics(MemberCounted(made.now, "samplers", "sampler-0", {"deaths": 1.0}))
    return made


def closing(folder: Path, run: Any) -> dict[str, Any]:
    """The summary, once it and the report have been shown."""
    history = History.read(folder)
    summary = summarize(run.statistics(), history, 1.0, ClusterConfig(samplers=3))
    write_report(folder, history, summary, {})
    with (console := Console(width=200)).capture() as captured:
        print_closing(summary, console)
    assert all(warning in captured.get() for warning in summary["warnings"])
    return summary


def without_warnings(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "warnings"}


def test_lines_that_no_run_wrote_change_nothing_and_are_counted_in_one_warning_a_file(tmp_path, run):
    whole = closing(tmp_path, run)
    assert whole["warnings"] == list(run.statistics().warnings)
    for name in FILES:
        with (tmp_path / name).open("a") as file:
            file.write("\n".join(OTHERS) + '\n\n{"session":0,"cut sh')
    told = closing(tmp_path, run)
    assert without_warnings(told) == without_warnings(whole)
    assert [text for text in told["warnings"] if text not in whole["warnings"]] == [
        f"{name}: {len(OTHERS)} lines that are not of weft's form are passed over" for name in FILES
    ]


def altered(line: dict[str, Any]) -> Iterator[str]:
    """The line without each of its fields, and with each of another type."""
    for name in line:
        yield json.dumps({key: value for key, value in line.items() if key != name})
        for value in WRONG:
            yield json.dumps(line | {name: value})


@pytest.mark.parametrize("name", FILES)
def test_no_field_that_is_gone_or_of_another_type_hinders_the_closing(tmp_path, run, name):
    kinds = {line.get("event"): line for line in map(json.loads, (tmp_path / name).read_text().splitlines())}
    with (tmp_path / name).open("a") as file:
        file.writelines(f"{text}\n" for line in kinds.values() for text in altered(line))
    assert any("not of weft's form" in warning for warning in closing(tmp_path, run)["warnings"])
