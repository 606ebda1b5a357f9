"""What every result in benchmarks/results holds beside its numbers: which code, on what, with which versions and settings."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ABSOLUTE = re.compile(r"(?<![\w./])/(?:[\w.+-]+/)+([\w.+-]*)")
REQUIRED = ("benchmark", "commit", "date", "command", "hardware", "versions", "settings")


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Median, 10th and 90th percentile (linear between neighbours), and how many there were."""
    if not values:
        return {"median": None, "p10": None, "p90": None, "count": 0}
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[8], "count": len(values)}


def commit() -> str:
    """The commit of the code; `+changes` where tracked files differ from it. An exported tree has it in a file COMMIT."""
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "HEAD") or "unknown") + ("+changes" if changed else "")


def hardware() -> dict[str, Any]:
    """CPU, cores that this process may use, memory, the load that others put on them as it began, and what GPUs there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(pages / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        **({"gpu": gpus} if (gpus := _gpus()) else {}),
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """Python's version and that of each named distribution that is installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def place(cluster: Any) -> str:
    """How results of a cluster's settings are named: cpu, or the kind and number of the GPUs that it takes, such as h200x2."""
    gpus = math.ceil(cluster.samplers * cluster.gpus_per_sampler + cluster.trainers * cluster.gpus_per_trainer)
    found = re.search(r"\b[A-Z]+\d+\w*", _gpus()[0]) if gpus and _gpus() else None
    kind = found[0].lower() if found else "gpu"
    return f"{kind}x{gpus}" if gpus else "cpu"


def check_result(result: Mapping[str, Any]) -> None:
    """Raises ValueError that names what a result lacks."""
    missing = [name for name in REQUIRED if not result.get(name)]
    missing += [f"hardware.{name}" for name in ("cpu", "cores") if not result.get("hardware", {}).get(name)]
    if missing:
        raise ValueError(f"result {result.get('benchmark', 'without a name')!r} lacks {', '.join(missing)}")


def without_paths(value: Any) -> Any:
    """The same, with no more of an absolute path than its last name: where a machine keeps its files is no part of a result."""
    if isinstance(value, Mapping):
        return {key: without_paths(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(own) for own in value]
    return ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Check the result and write it, whole or not at all."""
    result = without_paths(result)
    check_result(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _gpus() -> list[str]:
    """Each with its memory, and how much of that was in use before."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
