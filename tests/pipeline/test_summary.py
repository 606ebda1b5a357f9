"""summary.json holds what a script looks for, whole or not at all."""

import json
import math

import pytest
from rich.console import Console

from weft.configs.schema import ClusterConfig
from weft.pipeline.history import History
from weft.pipeline.metrics import Metrics
from weft.pipeline.summary import closing_table, count, duration, print_closing, summarize, told_work, write_summary

PER_ADAPTER = {
    "state", "version", "eval_base", "eval_final", "max_staleness", "max_staleness_seen", "tokens_trained", "tokens_sampled",
    "peft_path", "logprob_diff", "reward_first", "reward_last",
}  # fmt: skip


@pytest.fixture
def finished(tmp_path, synthetic_run):
    """(summary, history, run) of a synthetic run in which one adapter failed."""
    run = synthetic_run(num_steps=6, fail="sorting")
    with Metrics(tmp_path) as metrics:
        for event in run.events():
            metrics(event)
    history = History.read(tmp_path)
    return summarize(run.statistics(), history, wall_seconds=99.5), history, run


def test_the_summary_holds_every_promised_field(finished):
    summary, _, run = finished
    assert summary["wall_seconds"] == 99.5 and summary["staleness_violations"] == 0
    assert list(summary["adapters"]) == list(run.adapters)
    assert all(entry.keys() >= PER_ADAPTER for entry in summary["adapters"].values())
    assert all(entry["max_staleness_seen"] <= entry["max_staleness"] for entry in summary["adapters"].values())


def test_violations_are_counted_again_from_what_the_steps_recorded(tmp_path, finished):
    _, _, run = finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    planted = next(line for line in lines if line["adapter"] == "letters")
    planted["staleness/tokens"] = {"0": 50, str(planted["staleness/bound"]): 7, str(planted["staleness/bound"] + 1): 3, "-1": 1}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarize(run.statistics(), History.read(tmp_path), wall_seconds=99.5)
    assert summary["adapters"]["letters"]["staleness_violations"] == summary["staleness_violations"] == 4
    with (console := Console(width=120)).capture() as captured:
        print_closing(summary, console)
    assert "staleness violations 4" in captured.get()


def test_only_a_failed_adapter_has_a_traceback(finished):
    summary, _, _ = finished
    assert {name for name, entry in summary["adapters"].items() if "traceback" in entry} == {"sorting"}
    assert "ZeroDivisionError" in summary["adapters"]["sorting"]["traceback"]
    assert summary["adapters"]["sorting"]["state"] == "failed"


def test_logprob_diff_is_the_mean_and_the_largest_over_the_steps(finished):
    summary, history, _ = finished
    seen = [line["logprob_diff"] for line in history.adapters["letters"].steps]
    told = summary["adapters"]["letters"]["logprob_diff"]
    assert told["mean"] == pytest.approx(sum(seen) / len(seen)) and told["max"] == max(seen) and told["first"] == seen[0]
    assert seen[told["max_at_step"] - 1] == max(seen)


def test_a_summary_is_replaced_whole_and_is_plain_json(tmp_path, finished):
    path = tmp_path / "summary.json"
    path.write_text("{")
    write_summary(path, finished[0] | {"odd": math.nan})
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["odd"] is None and read["adapters"].keys() == finished[0]["adapters"].keys()
    assert [file.name for file in tmp_path.iterdir() if "summary" in file.name] == ["summary.json"]


@pytest.mark.parametrize("width", [80, 100])
def test_the_closing_table_fits_a_terminal_and_names_what_failed(finished, width):
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        print_closing(finished[0], console)
    told = captured.get()
    assert max(map(len, told.splitlines())) <= width
    assert all(name in told for name in finished[0]["adapters"])
    assert "\u2026" not in told, "nothing is cut"
    assert "sorting failed: ZeroDivisionError: division by zero" in told and "staleness violations 0" in told
    assert closing_table(finished[0]).row_count == 8


def test_warnings_stand_below_the_table_five_at_most_and_the_others_are_counted(finished):
    for number, shown in ((0, 0), (5, 5), (8, 5)):
        summary = finished[0] | {"warnings": [f"warning {index}: [of] its own" for index in range(number)]}
        with (console := Console(width=100)).capture() as captured:
            print_closing(summary, console)
        told = captured.get()
        assert [f"warning {index}: [of] its own\n" in told for index in range(number)] == [index < 5 for index in range(number)]
        assert (f"{number - shown} more warnings are in summary.json" in told) == (number > shown)


def test_the_last_lines_say_the_work_of_a_step_and_the_split_for_it(tmp_path, synthetic_run):
    with Metrics(tmp_path) as metrics:
        run = synthetic_run(num_steps=6)
        for event in run.events():
            metrics(event)
    history = History.read(tmp_path)
    launches = [launch.end - launch.start for launch in history.launches]
    for samplers in (1, 5):
        work = summarize(run.statistics(), history, 99.5, ClusterConfig(samplers=samplers))["work"]
        assert work["trainer_seconds"] == pytest.approx(sum(launches) / (8 * 6)) and work["adapters"] == 8
        assert work["steps_per_second"] == pytest.approx(8 * 6 / run.now, rel=0.3)
        with (console := Console(width=100)).capture() as captured:
            print_closing(summarize(run.statistics(), history, 99.5, ClusterConfig(samplers=samplers)), console)
        told = " ".join(captured.get().split())
        assert f"takes {work['sampler_seconds']:.3g} s of a full sampler (W_s) and {work['trainer_seconds']:.3g} s of a" in told
        assert f"{samplers} + 1 of them can do {work['bound']:.3g} steps/s at most" in told
        assert ("recommended split of 6 processes" in told) == (samplers == 5), "two processes can be split in one way"
    wide = summarize(run.statistics(), history, 99.5, ClusterConfig(samplers=3, gpus_per_sampler=2, gpus_per_trainer=1))["work"]
    assert wide["cards"] == 7 and [(one["samplers"], one["trainers"]) for one in wide["splits"]] == [(1, 5), (2, 3), (3, 1)]
    assert any(line.startswith("recommended split of 7 GPUs") for line in told_work(wide))


def test_the_closing_time_is_said_to_be_of_this_session_where_there_were_others_and_what_those_ran(tmp_path, synthetic_run):
    earlier = 0.0
    for session in range(3):
        run = synthetic_run(seed=session, num_steps=6)
        with Metrics(tmp_path) as metrics:
            for event in run.events():
                metrics(event)
        with (console := Console(width=120)).capture() as captured:
            print_closing(summarize(run.statistics(), History.read(tmp_path), run.now + 9.0), console)
        this = duration(run.now + 9.0)
        told = f"{this} this time, {duration(earlier)} of running before · " if session else f"{this} in all · "
        assert any(line.startswith(told) for line in captured.get().splitlines())
        earlier += run.now


def test_a_run_without_one_step_has_a_summary_too(tmp_path, synthetic_run):
    summary = summarize(synthetic_run().statistics(), History.read(tmp_path), 1.0)
    assert summary["adapters"]["letters"]["logprob_diff"]["mean"] is None and summary["work"] is None
    with Console(width=100).capture():
        print_closing(summary, Console(width=100))


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0"), (999, "999"), (1500, "1.5k"), (123456, "123k"), (999_800, "1000k"), (2e9, "2G")]
)
def test_counts_are_short(number, told):
    assert count(number) == told


@pytest.mark.parametrize(("seconds", "told"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3700, "1:01:40")])
def test_durations_are_minutes_and_seconds(seconds, told):
    assert duration(seconds) == told
