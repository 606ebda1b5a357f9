"""Whole runs: the console script in a process of its own, with real Ray, vLLM, ZeroMQ and gloo."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

RUN_DEADLINE_S = 3600.0
# A busy machine takes many times the 30 s of a quiet one.
PATIENT = ("cluster.start_deadline_s=3000", "cluster.sync.deadline_s=300")
RAY_PATIENCE = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "3000"}


@dataclass
class Run:
    """One `weft` process and what it writes."""

    process: subprocess.Popen[str]
    folder: Path
    log: Path

    def wait(self) -> int:
        """Exit status; the log is shown when the run does not end in time."""
        try:
            return self.process.wait(RUN_DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run did not end within {RUN_DEADLINE_S:g} s:\n{self.output()[-4000:]}")

    def output(self) -> str:
        return self.log.read_text()

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def steps(self) -> list[dict[str, Any]]:
        return self._lines("metrics.jsonl")

    def groups(self) -> list[dict[str, Any]]:
        """What the samplers have made, in order."""
        return [line for line in self._lines("events.jsonl") if line["event"] == "GroupSampled"]

    def pid(self, name: str) -> int:
        """The newest process of that name, such as sampler-0."""
        return [int(line["pid"]) for line in self._lines("processes.jsonl") if line["name"] == name][-1]

    def starts(self, name: str) -> int:
        return sum(line["name"] == name for line in self._lines("processes.jsonl"))

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Follows the run's own output; ends with the run or the deadline."""
        waited = 0.0
        while not condition():
            if self.process.poll() is not None:
                pytest.fail(f"the run ended (status {self.process.returncode}) before {what}:\n{self.output()[-4000:]}")
            if waited > RUN_DEADLINE_S:
                pytest.fail(f"not within {RUN_DEADLINE_S:g} s: {what}\n{self.output()[-4000:]}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            waited += 0.1

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]  # what follows the last newline is being written


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def weft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(folder, *overrides) begins a run in `folder`, with a terminal of its own if one is given; whatever
    still runs at the end of the module is ended, by pid."""
    started: list[Run] = []

    def start(folder: Path, *overrides: str, terminal: int | None = None, cwd: Path | None = None) -> Run:
        log = tmp_path_factory.mktemp("log") / "output.txt"
        command = [sys.executable, "-m", "weft.pipeline.main", f"run.dir={folder}", "run.table=plain", *PATIENT, *overrides]
        environment = os.environ | RAY_PATIENCE
        stdin, take_terminal = (subprocess.DEVNULL, None) if terminal is None else (terminal, _take_terminal)
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=stdin, text=True, cwd=cwd, env=environment,
                start_new_session=terminal is not None, preexec_fn=take_terminal,
            )
        started.append(Run(process, folder, log))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            family = psutil.Process(run.process.pid).children(recursive=True)
            run.process.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            run.process.wait()


def _take_terminal() -> None:
    """Make standard input the terminal that controls this session, and heed it: tests in the background may be deaf to it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for heeded in (signal.SIGINT, signal.SIGHUP):
        signal.signal(heeded, signal.SIG_DFL)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> str:
    """--config-dir of a user's own adapters: three quick ones over two tasks, of different rank, loss and bound."""
    folder = tmp_path_factory.mktemp("configs") / "adapters"
    folder.mkdir()
    (folder / "three.yaml").write_text(ADAPTERS)
    return f"--config-dir={folder.parent}"


ADAPTERS = """\
# @package _global_
# three quick ones
template:
  num_steps: 20
  batch_size: 64
  group_size: 8
  eval_prompts: 128
  lora: {rank: 8, alpha: 16}
  optimizer: {learning_rate: 6e-3, schedule: linear}
  sampling: {max_tokens: 16}
adapters:
  calculator-strict: {max_staleness: 0}
  calculator-cispo:
    max_staleness: 2
    lora: {rank: 16, alpha: 32, target_modules: [q_proj, v_proj, down_proj]}
    optimizer: {learning_rate: 4e-3, max_grad_norm: 0.2}
    loss: {name: cispo, advantage: rloo, clip_low: 1.0, clip_high: 1.0}  # steady at staleness 2, all the time
  letters:
    max_staleness: 1
    lora: {rank: 4, alpha: 8}
    loss: {name: dr_grpo}
    environment:
      target: reasoning_gym
      settings: {task: letter_counting, exact: true, min_words: 1, max_words: 2}
      max_turns: 1
"""
