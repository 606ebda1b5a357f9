"""The report is one file that needs nothing else, says what happened, and draws only what is true."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from weft.configs.schema import AdapterConfig, ClusterConfig, LoraConfig
from weft.pipeline.events import LaunchEnded, SampleTold, StepTaken, Transcript
from weft.pipeline.history import History
from weft.pipeline.metrics import Metrics
from weft.pipeline.palette import adapter_colour
from weft.pipeline.plots import draw_rewards, running_mean, style, to_svg
from weft.pipeline.report import write_report
from weft.pipeline.samples import Samples
from weft.pipeline.summary import summarize
from weft.pipeline.timeline import close_up, draw_pools, occupancy


class Page(HTMLParser):
    """Tags, the text, and whatever points out of the page."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def record(folder, run, events=None):
    with Metrics(folder) as metrics:
        for event in events or run.events():
            metrics(event)
    return History.read(folder)


def settings():
    adapters = [AdapterConfig(name="letters", lora=LoraConfig(rank=4)), AdapterConfig(name="sorting", lora=LoraConfig(rank=32))]
    return {"adapters": [dataclasses.asdict(adapter) for adapter in adapters]}


@pytest.fixture(scope="module")
def written(tmp_path_factory, synthetic_run):
    """(run folder, parsed page, its text) of a run in which one adapter failed."""
    folder = tmp_path_factory.mktemp("run")
    run = synthetic_run(num_steps=6, fail="sorting")
    history = record(folder, run)
    path = write_report(folder, history, summarize(run.statistics(), history, 75.0), settings(), title="weft <demo>")
    text = path.read_text()
    page = Page()
    page.feed(text)
    return folder, page, text


def test_the_page_needs_nothing_from_outside(written):
    _, page, text = written
    assert page.outside == [] and page.open == []
    assert "<script" not in text and "@import" not in text and "url(http" not in text and "<link" not in text


def test_ids_of_the_plots_do_not_meet(written):
    _, page, _ = written
    assert len(page.ids) == len(set(page.ids))


def test_every_plot_is_in_the_page_and_beside_it(written):
    folder, _, text = written
    for name in ("rewards", "held_out", "staleness", "pools", "overlap"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count('class="plot"') == 5


def test_the_page_follows_the_readers_light_or_dark(written):
    _, _, text = written
    assert "prefers-color-scheme: dark" in text and "var(--ink)" in text
    assert "#1c2026" not in text.split("</style>")[1], "ink of a plot is a variable, not a colour"


def test_the_page_tells_who_failed_and_why(written):
    _, page, _ = written
    assert "7 of 8" in page.text and "ZeroDivisionError" in page.text and "1:15" in page.text


def test_the_page_tells_the_work_of_a_step_and_what_each_split_could_do(tmp_path, synthetic_run):
    run = synthetic_run(num_steps=4)
    history = record(tmp_path, run)
    summary = summarize(run.statistics(), history, 75.0, ClusterConfig(samplers=39))
    page, told = Page(), write_report(tmp_path, history, summary, {}).read_text()
    page.feed(told)
    assert "W_s" in page.text and "recommended split of 40 processes" in page.text
    table = told[told.index("<h2>Samplers and trainers") : told.index("<h2>Steps")]
    assert table.count("<tr><td>") == 16 and table.count("recommended</b>") == 1
    best = summary["work"]["recommended"]
    assert f"<td>{best['samplers']} + {best['trainers']}</td><td>{best['bound']:.3g}</td>" in table


def test_the_page_shows_what_each_adapter_wrote_last_escaped(tmp_path, synthetic_run):
    run = synthetic_run(num_steps=2)
    history = record(tmp_path, run)
    samples = Samples(tmp_path, 0, pytest.fail)
    for step, text in ((1, "an older one"), (2, "<b>9</b> & </pre>")):
        prompt, said = ({"role": "user", "content": "2 < 3?"},), ({"role": "assistant", "content": text},)
        samples(SampleTold(1.0, "letters", 0, step, False, Transcript(7, (step - 1,), 0.5, 3, 1, False, prompt, said)))
    page, text = Page(), write_report(tmp_path, history, summarize(run.statistics(), history, 75.0), {}).read_text()
    page.feed(text)
    assert "training, step 2, prompt 7, reward 0.5" in page.text and page.open == []
    assert "user\n2 < 3?\n\nassistant\n<b>9</b> & </pre>" in page.text and "an older one" not in text


def test_a_run_that_has_no_samples_has_no_section_of_them(written):
    _, page, _ = written
    assert "What they wrote" not in page.text


def test_names_are_escaped(written):
    _, page, text = written
    assert "<demo>" not in text and "weft <demo>" in page.text


def test_settings_that_differ_are_compared_and_equal_ones_are_not(written):
    _, _, text = written
    table = text[text.index("What differs") : text.index("<h2>Steps")]
    assert "<th>rank</th>" in table and "learning_rate" not in table


def test_every_step_has_its_row(written):
    _, _, text = written
    steps = text[text.index("<h2>Steps") :]
    assert steps.count("<tr><td>") == 7 * 6 + 3  # sorting failed at its third step


def test_a_run_that_never_began_has_a_page_too(tmp_path, synthetic_run):
    history = History.read(tmp_path)
    path = write_report(tmp_path, history, summarize(synthetic_run().statistics(), history, 1.0), {})
    assert "0 of 8" in path.read_text()


def test_a_long_run_keeps_the_page_small(tmp_path, synthetic_run):
    run = synthetic_run(names=("a", "b"), num_steps=900, capacity=4)
    history = record(tmp_path, run)
    path = write_report(tmp_path, history, summarize(run.statistics(), history, 1.0), {})
    assert path.stat().st_size < 1_500_000
    assert "400 steps are shown" in path.read_text()


def test_a_launch_of_steps_without_an_advantage_has_no_tokens_and_no_share(tmp_path, synthetic_run):
    events = list(synthetic_run(names=("a",), num_steps=4).events())
    last = max(event.time for event in events)
    history = record(tmp_path, None, [*events, LaunchEnded(last, 0.01, {"a": 0})])
    assert any(launch.tokens == {"a": 0} for launch in history.launches)
    assert draw_pools(history) is not None


def test_the_trainers_share_of_the_time_is_at_most_all_of_it_however_many_they_are(tmp_path, synthetic_run):
    run = synthetic_run(num_steps=4)
    launches = [
        LaunchEnded(event.time, event.seconds, event.tokens, 1) for event in run.events() if isinstance(event, LaunchEnded)
    ]
    history = record(tmp_path, None, [*synthetic_run(num_steps=4).events(), *launches])
    with style():
        _, trainers, _ = draw_pools(history).axes
    tops = [path.vertices[:, 1].max() for filled in trainers.collections for path in filled.get_paths()]
    assert 0.5 < max(tops) <= 1.0 + 1e-9


def test_an_adapter_whose_rewards_are_no_numbers_has_no_curve_and_spoils_no_other(tmp_path, synthetic_run):
    history = record(tmp_path, synthetic_run(num_steps=4))
    first, *others = history.adapters.values()
    for line in first.steps:
        line["reward/mean"] = None
    titles = [axes.get_title(loc="left") for axes in draw_rewards(history).axes]
    assert [title for title in titles if title] == [adapter.name for adapter in others]


def test_undone_steps_are_drawn_apart_from_the_curve(tmp_path, synthetic_run):
    run = synthetic_run(names=("a",), num_steps=6)
    steps = [event for event in run.events() if isinstance(event, StepTaken)]
    again = [dataclasses.replace(step, lineage=1, time=step.time + 100) for step in steps[3:]]
    history = record(tmp_path, run, [*steps, *again])
    assert len(history.adapters["a"].steps) == 6 and len(history.adapters["a"].redone) == 3
    with style():
        figure = draw_rewards(history)
    (axes,) = figure.axes
    assert len(axes.lines[0].get_xdata()) == 6
    assert len(axes.collections[0].get_offsets()) == 3


def test_an_adapter_has_one_colour_everywhere(written):
    _, _, text = written
    colours = [adapter_colour(index) for index in range(64)]
    assert len(set(colours)) == 64 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    for colour in colours[:8]:
        assert text.count(colour) > 8


@pytest.mark.parametrize("paper", ["#ffffff", "#16191e"])
def test_every_colour_can_be_told_from_the_paper(paper):
    def light(colour: str) -> float:
        """Relative luminance, WCAG 2."""
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for index in range(10):
        bright, dim = sorted((light(adapter_colour(index)), light(paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3.0, adapter_colour(index)


def test_occupancy_keeps_the_integral_over_time():
    edges = np.linspace(0.0, 10.0, 8)
    spans = [("a", 0.3, 4.7, 8.0), ("b", 2.0, 2.01, 1.0), ("a", 9.0, 12.0, 2.0), ("c", 1.0, 2.0, 5.0)]
    rows = occupancy(spans, ["a", "b"], edges)
    assert rows.sum(axis=1) * (edges[1] - edges[0]) == pytest.approx([8.0 * 4.4 + 2.0 * 1.0, 0.01])
    assert (rows >= -1e-12).all()


def test_the_close_up_lies_within_the_run(tmp_path, synthetic_run):
    for steps in (1, 30):
        history = record(tmp_path / str(steps), synthetic_run(num_steps=steps))
        start, end = close_up(history)
        assert 0 <= start < end <= history.seconds


def test_a_running_mean_starts_with_what_there_is():
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]


def test_svg_scales_to_the_page(tmp_path, synthetic_run):
    history = record(tmp_path, synthetic_run(names=("a",), num_steps=2))
    with style():
        figure = draw_rewards(history)
    svg = to_svg(figure)
    opening = svg[: svg.index(">")]
    assert "viewBox" in opening and "width=" not in opening and "height=" not in opening
