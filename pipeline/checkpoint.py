"""One adapter's checkpoints: atomic, verified, resumable.

    <run.dir>/checkpoints/<adapter>/
        00000-00000005/         lineage 0, version 5: complete, or not there
            manifest.json       names every file with its size and SHA-256, and ends in its own SHA-256
            pipeline.json       Progress, the adapter's configuration, and the defaults that its settings had then
            ...                 what the trainer wrote
        lineage.json            the newest lineage ever begun: none is used twice, whatever was lost
        finished.json           only once the adapter is done: its last Progress
        .writing/               the next one; without meaning until it is renamed
        00000-00000004.damaged/ did not verify; kept for whoever wants to know why

A checkpoint becomes one by a rename, after every byte of it is on the disk; the older ones go only after that. So `kill -9` at
any instant leaves all that was complete. These functions block on the disk: the pipeline calls them in a thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.configs.schema import AdapterConfig
from weft.pipeline.adapter import Progress
from weft.transport.errors import CheckpointError

MANIFEST, PIPELINE, LINEAGE, FINISHED, WRITING = "manifest.json", "pipeline.json", "lineage.json", "finished.json", ".writing"
_NAME = re.compile(r"(\d{5,})-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified one."""

    folder: Path
    progress: Progress


class Checkpoints:
    """All checkpoints of one adapter. Only one process may write them."""

    def __init__(self, run_dir: str, name: str, keep: int) -> None:
        self.folder = Path(run_dir) / "checkpoints" / name
        self._keep = keep

    def exist(self) -> bool:
        """Whether there is one, by its name: none is looked into."""
        return bool(self._complete())

    def begin(self) -> Path:
        """An empty folder for the trainer to write into."""
        writing = self.folder / WRITING
        if writing.exists():
            shutil.rmtree(writing)
        writing.mkdir(parents=True)
        return writing

    def commit(self, config: AdapterConfig, progress: Progress, checksums: Mapping[str, str]) -> Path:
        """Make what was written since `begin` the newest checkpoint. `checksums`: the trainer's files with their SHA-256.

        Raises CheckpointError, and changes nothing, when a file on the disk is not the one that the trainer says it wrote.
        """
        writing = self.folder / WRITING
        body = {"progress": dataclasses.asdict(progress), "config": plain(config), "defaults": _defaults(config)}
        _write_sealed(writing / PIPELINE, body)
        files = {}
        for path in sorted(path for path in writing.rglob("*") if path.is_file()):
            name = path.relative_to(writing).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for name, checksum in checksums.items():
            if files.get(name, {}).get("sha256") != checksum:
                raise CheckpointError(f"{writing / name}: not what the trainer wrote")
        _write_sealed(writing / MANIFEST, {"files": files, "lineage": progress.lineage, "version": progress.version})
        for path in [*writing.rglob("*"), writing]:
            _sync(path)
        final = self.folder / f"{progress.lineage:05d}-{progress.version:08d}"
        assert not final.exists(), f"{final}: a lineage has each version once"
        os.replace(writing, final)
        _sync(self.folder)
        for old in self._complete()[self._keep :]:
            shutil.rmtree(old)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that verifies (None: there never was one), and one line about each that did not, which is set aside.

        Raises CheckpointError, and changes nothing, when there are some and none verifies.
        """
        found, damaged = self._find()
        for folder in damaged:
            aside = folder.with_name(folder.name + ".damaged")
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(folder, aside)
        return found, [f"{error}; set aside, the one before it is used" for error in damaged.values()]

    def check(self) -> int | None:
        """The version of the one that `newest` gives. Raises CheckpointError as that does; changes nothing."""
        found, _ = self._find()
        return found.progress.version if found else None

    def _find(self) -> tuple[Checkpoint | None, dict[Path, CheckpointError]]:
        damaged: dict[Path, CheckpointError] = {}
        for folder in self._complete():
            try:
                return verify(folder), damaged
            except CheckpointError as error:
                damaged[folder] = error
        if damaged:
            raise CheckpointError(f"no checkpoint is whole: {'; '.join(map(str, damaged.values()))}")
        return None, damaged

    def saved_config(self) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """The configuration in the newest checkpoint where it can be read, and the defaults then; the trainer's files are not
        looked at."""
        for folder in self._complete():
            with contextlib.suppress(CheckpointError):  # `newest` will say so
                body = _read_sealed(folder / PIPELINE, progress=Mapping, config=Mapping)
                return body["config"], body.get("defaults", {})
        return None

    def next_lineage(self) -> int:
        """A lineage that was never used, taken for good before this returns."""
        used = [int(match[1]) for match in map(_NAME.match, self._names()) if match]
        path = self.folder / LINEAGE
        if path.exists():
            try:
                used.append(_read_sealed(path, lineage=int)["lineage"])
            except CheckpointError:
                used.append(max(used, default=0) + 1000)  # how many it had counted is lost: leave them all behind
        lineage = max(used, default=-1) + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace_sealed(path, {"lineage": lineage})
        return lineage

    def finish(self, config: AdapterConfig, progress: Progress) -> None:
        """Note that the adapter is done."""
        _replace_sealed(self.folder / FINISHED, {"progress": dataclasses.asdict(progress), "config": plain(config)})

    def finished(self, config: AdapterConfig) -> Progress | None:
        """Where the adapter ended; None if it has not, or is to go on further than it did."""
        path = self.folder / FINISHED
        if not path.exists():
            return None
        try:
            progress = _progress(path, _read_sealed(path, progress=Mapping)["progress"])
        except CheckpointError:
            return None  # its last checkpoint is whole, or the one before is: what followed is done again
        return progress if progress.version >= config.num_steps else None

    def _names(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def _complete(self) -> list[Path]:
        """Newest first: a later lineage is a later history."""
        matches = [match for match in map(_NAME.fullmatch, self._names()) if match]
        return [self.folder / match[0] for match in sorted(matches, key=lambda match: (-int(match[1]), -int(match[2])))]


def check_resume(run_dir: str, config: AdapterConfig) -> None:
    """Raises ValueError when `run_dir` holds this adapter under another configuration (num_steps may grow).

    A setting that only one of the two has, for it is of a newer weft than the other, was at its default in the other.
    """
    before = Checkpoints(run_dir, config.name, 1).saved_config()
    if before is None:
        return
    then, now = _completed(before[0], _defaults(config)), _completed(plain(config), before[1])
    for path, saved, value in _differences(then, now, f"adapters.{config.name}"):
        if path == f"adapters.{config.name}.num_steps" and type(saved) is int and value >= saved:
            continue
        rule = f"{saved!r}, as in the run that {run_dir} holds (run.fresh=true starts anew there, run.dir=NEW elsewhere)"
        raise ValueError(f"{path}={value!r}: must be {rule}")


def verify(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError naming the file that is cut short, altered or not there."""
    for name, said in _read_sealed(folder / MANIFEST, files=Mapping)["files"].items():
        if not (isinstance(said, Mapping) and {"bytes", "sha256"} <= said.keys()):
            raise CheckpointError(f"{folder / MANIFEST}: not what this version of weft writes, by {name!r}")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: not there")
        if path.stat().st_size != said["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, not {said['bytes']}")
        if _sha256(path) != said["sha256"]:
            raise CheckpointError(f"{path}: altered, its SHA-256 is another")
    body = _read_sealed(folder / PIPELINE, progress=Mapping, config=Mapping)
    return Checkpoint(folder, _progress(folder / PIPELINE, body["progress"]))


def replace_folder(written: Path, final: Path) -> None:
    """Put the folder `written` in the place of `final`, with every byte on the disk before.

    Killed at any instant, it leaves a whole one there, but between two renames: then the old one waits for `settle_folder`.
    """
    for path in [*written.rglob("*"), written]:
        _sync(path)
    settle_folder(final)
    if final.exists():
        os.replace(final, _aside(final))
    os.replace(written, final)
    _sync(final.parent)
    settle_folder(final)


def settle_folder(final: Path) -> None:
    """The old folder, which a replacement has moved aside, is removed, or comes back where that one was killed half-way."""
    aside = _aside(final)
    if aside.exists() and final.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        os.replace(aside, final)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")  # no adapter's name begins so


def plain(config: AdapterConfig) -> dict[str, Any]:
    """The configuration as JSON has it."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def _defaults(config: AdapterConfig) -> dict[str, Any]:
    return plain(AdapterConfig(name=config.name))


def _completed(config: Any, defaults: Any) -> Any:
    """The configuration with the defaults of what it does not have."""
    if not (isinstance(config, Mapping) and isinstance(defaults, Mapping)):
        return config
    names = {**defaults, **config}
    return {name: _completed(config[name], defaults.get(name)) if name in config else defaults[name] for name in names}


def _progress(path: Path, saved: Mapping[str, Any]) -> Progress:
    """Raises CheckpointError for what another version of weft may have sealed in `path`: it cannot be gone on from."""
    known = dataclasses.asdict(Progress())
    wrong = sorted({*saved} ^ {*known}) or [name for name, first in known.items() if not _is_like(saved[name], first)]
    if wrong:
        raise CheckpointError(f"{path}: not what this version of weft writes, by {', '.join(map(repr, wrong))}")
    return Progress(**{**saved, "rewards": tuple(saved["rewards"])})


def _is_like(value: Any, first: Any) -> bool:
    """Whether a field of Progress may be `value`. first: what it is at first."""
    if isinstance(first, tuple):
        return isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)
    return value is None or isinstance(value, (int, float)) if first is None else type(value) is type(first)


def _differences(saved: Any, now: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        names = sorted({*saved, *now})
        return [found for name in names for found in _differences(saved.get(name), now.get(name), f"{path}.{name}")]
    return [] if saved == now else [(path, saved, now)]


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_sealed(path: Path, body: Any) -> None:
    path.write_text(json.dumps({"body": body, "sha256": _digest(body)}))


def _replace_sealed(path: Path, body: Any) -> None:
    written = path.with_name(path.name + ".writing")
    _write_sealed(written, body)
    _sync(written)
    os.replace(written, path)
    _sync(path.parent)


def _read_sealed(path: Path, **fields: type) -> Mapping[str, Any]:
    """The body, which has these fields, each of its type. Raises CheckpointError."""
    try:
        sealed = json.loads(path.read_bytes())
        whole = sealed["sha256"] == _digest(sealed["body"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there") from None
    except (ValueError, KeyError, TypeError, RecursionError):  # not JSON, or not the JSON that we write
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: cut short or altered")
    body = sealed["body"]
    for name, kind in fields.items():
        if not (isinstance(body, Mapping) and isinstance(body.get(name), kind)):
            raise CheckpointError(f"{path}: not what this version of weft writes, by {name!r}")
    found: Mapping[str, Any] = body
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
