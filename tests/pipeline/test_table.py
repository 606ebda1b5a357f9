"""The live table and the plain lines tell where each adapter is, at any width, and cost nothing that grows."""

import asyncio
import io

import pytest
from rich.console import Console

from weft.pipeline.events import Phase, StepTaken
from weft.pipeline.table import BARS, LiveTable, Pace, PlainLines, Share, make_table, sparkline


def terminal(width: int, height: int = 40) -> Console:
    return Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)


def drawn(table: LiveTable, console: Console) -> str:
    with console.capture() as captured:
        console.print(table.render())
    return captured.get()


def half_way(run, *observers):
    """Feed the first half of the run's steps."""
    for event in run.events():
        for observer in observers:
            observer(event)
        if isinstance(event, StepTaken) and sum(len(a.rewards) for a in run.adapters.values()) >= 40:
            return


@pytest.mark.parametrize("width", [80, 100, 130, 160])
def test_one_line_an_adapter_at_every_width(width, synthetic_run):
    run, console = synthetic_run(num_steps=10), terminal(width)
    table = LiveTable(run.statistics, "tiny", "http://127.0.0.1:8265", console)
    half_way(run, table)
    told = drawn(table, console).splitlines()
    assert all(len(line.rstrip()) <= width for line in told)
    rows = [line for line in told if line.startswith("●")]
    assert len(rows) == 8, "a row that wraps would be two lines"
    assert len({row.split()[1] for row in rows}) == 8, "names that are cut are told from one another"
    for row, adapter in zip(rows, run.statistics().adapters.values(), strict=True):
        assert f"{adapter.version}/10" in row and f"{adapter.staleness}/{adapter.max_staleness} max" in row
        assert f"{adapter.reward:.2f}" in row and str(adapter.phase) in row


def test_the_table_names_its_run_the_dashboard_and_the_pools(synthetic_run):
    run, console = synthetic_run(num_steps=10), terminal(100)
    table = LiveTable(run.statistics, "tiny", "http://127.0.0.1:8265", console)
    half_way(run, table)
    told = drawn(table, console)
    assert "weft · tiny · 8 adapters" in told and "http://127.0.0.1:8265" in told and "staleness violations 0" in told
    assert "samplers ━" in told and "trainer ━" in told and "/96 rollouts" in told


@pytest.mark.parametrize("width", [80, 99, 100])
def test_the_dashboards_address_takes_no_room_that_the_run_needs(width, synthetic_run):
    run, console = synthetic_run(num_steps=10), terminal(width)
    table = LiveTable(run.statistics, "tiny", "http://127.0.0.1:8265", console)
    half_way(run, table)
    header = drawn(table, console).splitlines()[0]
    assert "staleness violations 0" in header, "whole"
    assert ("http://127.0.0.1:8265" in header) == (width >= 100)


def test_what_failed_is_said_below_the_table(synthetic_run):
    run, console = synthetic_run(num_steps=4, fail="sorting"), terminal(100)
    table = LiveTable(run.statistics, "tiny", "", console)
    for event in run.events():
        table(event)
    assert "sorting failed: ZeroDivisionError: division by zero" in drawn(table, console)


def test_more_adapters_than_lines_are_counted_by_phase(synthetic_run):
    run, console = synthetic_run(names=tuple(f"a{i}" for i in range(200)), num_steps=2), terminal(100, height=24)
    table = LiveTable(run.statistics, "tiny", "", console)
    half_way(run, table)
    told = drawn(table, console)
    assert len(told.splitlines()) <= 24
    rows = sum(line.startswith("●") for line in told.splitlines())
    assert f"and {200 - rows} more" in told


def test_the_table_redraws_until_it_is_cancelled_and_leaves_its_last_state(synthetic_run):
    run = synthetic_run(num_steps=2)
    console = terminal(100)

    async def main():
        with make_table("live", run.statistics, "tiny", "", console) as table:
            async with asyncio.TaskGroup() as tasks:
                drawing = tasks.create_task(table.run())
                for event in run.events():
                    table(event)
                    await asyncio.sleep(0)
                drawing.cancel()

    asyncio.run(main())
    assert "finished" in console.file.getvalue()
    assert all(adapter.phase is Phase.FINISHED for adapter in run.adapters.values())


def test_without_a_terminal_there_are_plain_lines(synthetic_run):
    statistics = synthetic_run().statistics
    assert isinstance(make_table("auto", statistics, console=Console(file=io.StringIO())), PlainLines)
    assert isinstance(make_table("plain", statistics, console=terminal(100)), PlainLines)
    assert isinstance(make_table("auto", statistics, console=terminal(100)), LiveTable)


def test_plain_lines_are_one_a_step_with_the_log_probability_difference(synthetic_run):
    run, file = synthetic_run(num_steps=5, fail="sorting"), io.StringIO()
    plain = PlainLines(run.statistics, Console(file=file, width=80))
    events = list(run.events())
    for event in events:
        plain(event)
    plain.tell_pools()
    told = file.getvalue().splitlines()
    steps = [line for line in told if "step " in line]
    assert len(steps) == sum(isinstance(event, StepTaken) for event in events)
    assert all("logprob_diff" in line and "stale" in line and len(line) < 120 for line in steps)
    assert sum("held-out" in line for line in told) == 15 and sum("FAILED" in line for line in told) == 1
    assert told[-1].split()[1] == "pools"


def test_a_name_with_markup_is_printed_as_it_is():
    file = io.StringIO()
    from weft.pipeline.events import PipelineStatistics, PoolStatistics, Warned

    pool = PoolStatistics(1, 0, 0, 0.0, 0.0, 0.0)
    plain = PlainLines(lambda: PipelineStatistics(0.0, {}, pool, pool), Console(file=file, width=80))
    plain(Warned(1.0, "", "[bold]see[/bold] :smile:"))
    assert "[bold]see[/bold] :smile:" in file.getvalue()


def test_a_sparkline_is_on_one_scale_while_values_are_shares():
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([0.5, 0.5], 10) == "▅▅"
    assert sparkline([], 10) == "" and sparkline([float("nan")], 10) == ""


def test_a_sparkline_of_other_values_spans_their_range():
    assert sparkline([-5.0, 0.0, 5.0], 10) == "▁▅█"
    assert sparkline([7.0, 7.0], 10) == "▁▁"


def test_a_sparkline_never_is_wider_than_its_place():
    for number in range(1, 200):
        bars = sparkline([i / 200 for i in range(number)], 14)
        assert len(bars) == min(number, 14) and set(bars) <= set(BARS)
        assert list(bars) == sorted(bars), "means of rising values rise"


def test_pace_forgets_what_is_older_than_its_window(synthetic_run):
    run, pace = synthetic_run(num_steps=30), Pace()
    for event in run.events():
        pace(event)
    held = [len(recent) for recent in pace._tokens.values()]
    assert max(held) < 100 and pace.tokens_per_second("letters", run.now + 1000) == 0.0
    assert pace.seconds_left("letters", 0) == 0.0 and pace.seconds_left("unknown", 3) is None


def test_the_share_of_a_pool_is_of_the_last_seconds():
    share = Share()
    for second in range(100):
        busy = share.update(float(second), min(second, 50.0))
    assert busy == 0.0
    assert Share().update(10.0, 5.0) == 0.5
