"""kill -9 of every kind of process in the middle of a run: nothing checkpointed is lost, and the run ends as it should."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from weft.actors.cluster import Cluster
from weft.configs.schema import ClusterConfig

STEPS = 9
GONE_S = 600  # in which whatever is to end has ended
SHORT = ("adapters=three", f"every.num_steps={STEPS}", "every.batch_size=32", "every.eval_prompts=8", "run.checkpoint_every=2")
OVERRIDES = (*SHORT, "cluster.dashboard_port=0")


def _steps_of(run: Any, name: str = "") -> int:
    return sum(not name or step["adapter"] == name for step in run.steps())


def test_a_run_outlives_the_death_of_its_sampler_relay_and_trainer(weft: Any, adapters: str, tmp_path: Path) -> None:
    run = weft(tmp_path / "run", adapters, *OVERRIDES)
    run.wait_until(lambda: _steps_of(run) >= 3, "the first steps")
    run.kill("sampler-0")
    run.wait_until(lambda: run.starts("sampler-0") == 2, "a new sampler")
    after = _steps_of(run)
    run.wait_until(lambda: _steps_of(run) >= after + 3, "steps with the new sampler")
    run.kill("param-sync")
    run.wait_until(lambda: run.starts("param-sync") == 2, "a new relay")
    after = _steps_of(run)
    run.wait_until(lambda: _steps_of(run) >= after + 3, "steps with the new relay")
    run.kill("trainer-0")
    assert run.wait() == 0, run.output()[-4000:]
    summary = run.summary()
    assert run.starts("trainer-0") == 2
    assert {adapter["version"] for adapter in summary["adapters"].values()} == {STEPS}
    assert {adapter["state"] for adapter in summary["adapters"].values()} == {"finished"}
    assert summary["staleness_violations"] == 0
    lineages = {step["lineage"] for step in run.steps()}
    assert len(lineages) == 2, "the trainer's death began a new lineage, the others' deaths did not"
    assert max(step["logprob_diff"] for step in run.steps() if "logprob_diff" in step) < 1e-3
    deaths = {name: own["deaths"] for pool in summary["members"].values() for name, own in pool.items()}
    assert deaths == {"sampler-0": 1, "param-sync": 1, "trainer-0": 1}


def test_a_killed_driver_goes_on_from_its_checkpoints_and_leaves_no_process(weft: Any, adapters: str, tmp_path: Path) -> None:
    run = weft(tmp_path / "run", adapters, *OVERRIDES)
    run.wait_until(lambda: all(_steps_of(run, name) >= 3 for name in NAMES), "three steps of each")
    family = psutil.Process(run.process.pid).children(recursive=True)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    before = {name: max(step["step"] for step in run.steps() if step["adapter"] == name) for name in NAMES}
    steps_before = len(run.steps())
    assert json.loads((run.folder / "trace.json").read_text() + "]"), "the kill leaves a trace that loads"
    again = weft(tmp_path / "run", adapters, *OVERRIDES)
    assert again.wait() == 0, again.output()[-4000:]
    _, alive = psutil.wait_procs(family, timeout=GONE_S)  # two agents of Ray look for their cluster for 60 s before they end
    assert not alive, [process.cmdline() for process in alive]
    adapters_ = again.summary()["adapters"]
    assert {name: adapter["version"] for name, adapter in adapters_.items()} == dict.fromkeys(NAMES, STEPS)
    assert len(again.steps()) > steps_before, "it was killed in the middle"
    assert " this time, " in again.output() and " of running before" in again.output()
    told = {name: int(step) for name, step in re.findall(r"(\S+) from step (\d+)", again.output())}
    trace = json.loads((run.folder / "trace.json").read_text())
    assert [record["name"] for record in trace if record["ph"] == "i"].count("resumed") == 1
    assert sum(record["name"] == "training" for record in trace) >= len(again.steps())
    for name in NAMES:
        redone = [step["step"] for step in again.steps()[steps_before:] if step["adapter"] == name]
        first = STEPS + 1 - len(redone)  # a quick adapter may have none left
        assert redone == list(range(first, STEPS + 1))
        assert told.get(name, STEPS) == first - 1, "said at the start"
        assert first > before[name] - 2, "at most checkpoint_every - 1 steps are taken again"
        assert adapters_[name]["eval_base"] is not None, "known from before the kill"


@pytest.mark.parametrize("how", ["Ctrl-C", "the terminal closes"])
def test_an_interrupted_run_ends_in_order_and_leaves_nothing(weft: Any, adapters: str, tmp_path: Path, how: str) -> None:
    ours, theirs = os.openpty()
    run = weft(tmp_path / "run", adapters, *OVERRIDES, terminal=theirs)
    os.close(theirs)
    run.wait_until(lambda: run.starts("trainer-0") == 1, "its processes")
    family = psutil.Process(run.process.pid).children(recursive=True)
    if how == "Ctrl-C":
        os.write(ours, b"\x03")  # to the whole group in the foreground, which Ray's servers are in
        status = run.wait()
        os.close(ours)
    else:
        os.close(ours)
        status = run.wait()
    ended_in_order(run, status, family)


@pytest.mark.parametrize("when", ["it says that it starts", "Ray starts", "Ray has started"])
def test_a_run_that_is_told_to_end_while_it_starts_ends_in_order(weft: Any, adapters: str, tmp_path: Path, when: str) -> None:
    run = weft(tmp_path / "run", adapters, *OVERRIDES)
    shared_folder, ray_folder = folders(run)
    told = {"Ray starts": ray_folder.exists, "Ray has started": shared_folder.exists}
    run.wait_until(told.get(when, lambda: "starting 1 sampler" in run.output()), when)
    run.process.terminate()
    ended_in_order(run, run.wait(), [])


def test_an_impatient_interrupt_cuts_no_clean_up_short(weft: Any, adapters: str, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    run = weft(tmp_path / "run", adapters, *OVERRIDES, terminal=theirs)
    os.close(theirs)
    run.wait_until(folders(run)[0].exists, "the pools' start")
    family = psutil.Process(run.process.pid).children(recursive=True)
    while run.process.poll() is None and "interrupted" not in run.output():
        with contextlib.suppress(OSError):  # nobody has the terminal any more: it has just ended
            os.write(ours, b"\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(0.2)
    ended_in_order(run, run.wait(), family)
    os.close(ours)


def folders(run: Any) -> tuple[Path, Path]:
    """What a run has in shared memory, and where Ray has its own."""
    cluster = Cluster(ClusterConfig(), str(run.folder))
    return cluster.shared_folder, Path(tempfile.gettempdir()) / f"weft-ray-{cluster.run_id}"


def ended_in_order(run: Any, status: int, family: list[psutil.Process]) -> None:
    """It says that it was interrupted, and what the same command does; nothing of it is left. family: what it has started."""
    assert status == 130, run.output()[-4000:]
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    assert not alive, [process.cmdline() for process in alive]
    assert "Traceback" not in run.output()
    there = any((run.folder / "checkpoints").glob("*/0*"))
    then = "the same command goes on from the last checkpoints" if there else "no checkpoint has been written yet"
    assert f"weft: interrupted; {then}" in run.output()
    assert not any(folder.exists() for folder in folders(run))


NAMES = ("calculator-strict", "calculator-cispo", "letters")
