"""What is installed is what is here: the packages of pyproject.toml are the folders, and their data goes along."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOP = ("actors", "configs", "kernels", "pipeline", "transport")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *TOP], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines()]


def test_the_packages_of_pyproject_are_the_folders() -> None:
    folders = {f"weft.{init.parent.as_posix().replace('/', '.')}" for init in tracked() if init.name == "__init__.py"}
    assert set(project()["tool"]["setuptools"]["packages"]) == folders


def test_every_module_is_in_a_package() -> None:
    packages = set(project()["tool"]["setuptools"]["packages"])
    modules = [path for path in tracked() if path.suffix == ".py"]
    lost = [path for path in modules if f"weft.{path.parent.as_posix().replace('/', '.')}" not in packages]
    assert not lost, lost


def test_kernels_is_no_package_so_that_hugging_faces_kernels_wins_on_the_repositorys_path() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert all((ROOT / top / "__init__.py").exists() for top in TOP if top != "kernels")


def test_every_data_file_is_in_the_package_data() -> None:
    settings = project()["tool"]["setuptools"]
    data = settings["package-data"]
    lost = []
    for path in tracked():
        if path.suffix == ".py":
            continue
        packages = [name for name in data if path.as_posix().startswith(name.removeprefix("weft.").replace(".", "/") + "/")]
        patterns = [
            f"{name.removeprefix('weft.').replace('.', '/')}/{pattern}" for name in packages for pattern in data[name]
        ]
        if not any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in patterns):
            lost.append(path)
    assert not lost, lost


def test_the_installed_distribution_has_the_command_and_its_version() -> None:
    distribution = importlib.metadata.distribution("weft")
    assert distribution.version == project()["project"]["version"]
    assert [point.value for point in distribution.entry_points if point.name == "weft"] == ["weft.pipeline.main:main"]


def test_every_dependency_has_its_reason_beside_it() -> None:
    bare = []
    inside = False
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        stripped = line.strip()
        if stripped.startswith(("dependencies = [", "actors = [", "dev = [")):
            inside = True
        elif stripped == "]":
            inside = False
        elif inside and "#" not in stripped:
            bare.append(stripped)
    assert not bare, bare


def test_nothing_imports_twice_under_two_names() -> None:
    """In a fresh interpreter, from the repository's root, as every Ray worker has it on its path."""
    script = "import kernels, sys; import weft.pipeline.run; print([m for m in sys.modules if m.split('.')[0] in {}])"
    done = subprocess.run(
        [sys.executable, "-c", script.format(("actors", "configs", "pipeline", "transport"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
