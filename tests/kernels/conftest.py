"""Triton's interpreter is chosen when triton is first imported, for a whole process: where there is no GPU, test_triton.py runs
the kernels' tests in a process of their own."""

import os

import pytest
import torch

RUNS_HERE = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if RUNS_HERE else ["test_*_triton.py"]


@pytest.fixture(autouse=True)
def the_same_numbers_each_time() -> None:
    """Of any two random float16 some are equal, and of many sums one rounds worse than all before it."""
    torch.manual_seed(0)
