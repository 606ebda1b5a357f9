"""benchmarks/installs.py: that it runs, and that what it counts as wrong is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENT = "cluster.start_deadline_s=3000"  # a busy machine takes many times a quiet one's 30 s


def test_installs_are_counted_with_what_is_wrong_about_them(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "installs.py"), "--installs", "12", "--dir", str(tmp_path), PATIENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "installs.json").read_text())
    assert (result["installs"], result["continuations_that_differ"], result["ids_reused"]) == (12, 0, 0)
    assert all(values and min(values) > 0 for values in result["memory_mb"].values())
