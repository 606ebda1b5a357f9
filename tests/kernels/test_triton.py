"""Every Triton kernel's tests through Triton's interpreter, where there is no GPU to run them on."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_kernel_passes_its_tests_through_the_interpreter() -> None:
    modules = sorted(str(path) for path in HERE.glob("test_*_triton.py"))
    assert len(modules) == 7
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
