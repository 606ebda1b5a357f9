"""A file under 400 lines, a function under 60: what is longer is two things."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("actors", "benchmarks", "configs", "kernels", "pipeline", "transport")
MAX_FILE, MAX_FUNCTION = 400, 60


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_file_is_under_400_lines() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert not {path: count for path, count in lines.items() if count >= MAX_FILE}


def test_every_function_is_under_60_lines() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": lines
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) >= MAX_FUNCTION
    }
    assert not long, long


def test_there_is_no_drawer_for_everything() -> None:
    names = ("utils", "util", "helpers", "misc", "common")
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.stem.lower() in names]
    assert not found, found
