"""The arrows of DESIGN section 2: who may import whom, and the one file that may import each heavy dependency."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actors", "configs", "kernels", "pipeline", "transport")
ALLOWED = {
    "actors": {"actors", "configs", "kernels", "transport"},
    "configs": {"configs"},
    "kernels": {"kernels"},
    "pipeline": {"pipeline", "configs", "transport.errors", "transport.messages"},
    "transport": {"transport"},
}
ALLOWED_FILES = {"pipeline/main.py": ALLOWED["pipeline"] | {"actors"}}
OWNERS = {
    "hydra": {"configs/compose.py"},
    "omegaconf": {"configs/compose.py"},
    "ray": {"actors/cluster.py"},
    "torch.distributed": {"transport/broadcast.py"},
    "uvloop": {"pipeline/main.py"},
    "vllm": {
        "actors/punica.py",
        "actors/sampler_engine.py",
        "actors/sampler_extension.py",
        "actors/sampler_lora.py",
        "actors/vllm_plugin.py",
    },
    "zmq": {"transport/channel.py"},
}
NOT_IN_PIPELINE = {"torch", "ray", "vllm", "zmq", "transformers"}


def imports_of(source: str) -> Iterator[str]:
    """Every module that a source imports, wherever it stands; `from a import b` gives a.b, for b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            module = node.args[0]
            if name in ("import_module", "__import__") and isinstance(module, ast.Constant):
                yield str(module.value)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(path: str, source: str) -> list[str]:
    package = path.split("/")[0]
    allowed = ALLOWED_FILES.get(path, ALLOWED[package])
    found = []
    for module in imports_of(source):
        if any(within(module, bare) for bare in PACKAGES):
            found.append(f"{path} imports {module}: a bare import makes a second copy of every class; import weft.{module}")
        if within(module, "weft") and not any(within(module, f"weft.{one}") for one in allowed):
            found.append(f"{path} imports {module}: {package} may import {', '.join(sorted(allowed))} of ours")
        for dependency, owners in OWNERS.items():
            if within(module, dependency) and path not in owners:
                found.append(f"{path} imports {module}: only {', '.join(sorted(owners))} may")
        if package == "pipeline" and any(within(module, one) for one in NOT_IN_PIPELINE):
            found.append(f"{path} imports {module}: the pipeline decides, it does not compute")
    return found


def test_every_import_follows_the_arrows() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 40
    found = [line for path in files for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipeline/run.py", "import torch"),
        ("pipeline/run.py", "def f():\n    from weft.actors import pool"),
        ("pipeline/run.py", "from weft.transport import channel"),
        ("pipeline/main.py", "import ray"),
        ("transport/codec.py", "from weft.configs import schema"),
        ("transport/memory.py", "import zmq.asyncio"),
        ("kernels/lora/__init__.py", "import weft.actors.lora"),
        ("actors/trainer.py", "import torch.distributed as dist"),
        ("actors/trainer.py", "from torch import distributed"),
        ("actors/sampler_pool.py", "from transport.messages import Done"),
        ("actors/sampler_pool.py", "import importlib\nimportlib.import_module('ray')"),
    ],
)
def test_an_import_against_the_arrows_is_found(path: str, source: str) -> None:
    assert violations(path, source)
