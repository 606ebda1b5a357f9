"""Triton's interpreter is chosen when triton is first imported, for a whole process: where there is no GPU, test_triton.py runs
the kernels' tests in a process of their own."""

import os

import torch

RUNS_HERE = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if RUNS_HERE else ["test_*_triton.py"]
