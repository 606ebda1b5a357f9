"""A base model's folder as Hugging Face lays it out: config.json, safetensors (one file, or shards and their index), tokenizer.

Every ValueError names the folder or file and the rule it breaks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.actors.architecture import Architecture

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a mapping. Raises ValueError if there is none, or if it is no JSON object."""
    if not Path(folder).is_dir():
        raise ValueError(f"model folder {folder}: must be a folder, and is not there")
    return _read_json(Path(folder) / CONFIG)


def check_folder(folder: str | Path) -> None:
    """Raises ValueError unless every tensor that config.json calls for is there in its shape. Reads headers alone."""
    folder = Path(folder)
    config = read_config(folder)
    try:
        expected = Architecture.from_hf(config).tensors()
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in sorted(set(_files(folder).values())):
        for name, shape, dtype in _headers(file):
            found[name] = (file, shape, dtype)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder}: tensor {name} {list(shape)} is missing; {CONFIG} calls for it")
        file, there, dtype = found[name]
        if there != shape:
            raise ValueError(f"{file}: tensor {name} is {list(there)} there, and must be {list(shape)} by {CONFIG}")
        if dtype not in FLOATS:
            raise ValueError(f"{file}: tensor {name} is of type {dtype}, and must be one of {', '.join(FLOATS)}")
    spare = {name for name in found if name not in expected and name != "lm_head.weight" and "rotary_emb" not in name}
    if spare:
        raise ValueError(f"{folder}: tensor {min(spare)} has no place in the model that {CONFIG} describes")


def read_tensors(folder: str | Path, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Those tensors, on the CPU, in the type they are kept in. The folder has passed `check_folder`."""
    wanted = set(names)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(_files(Path(folder)).values())):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys() if name in wanted})  # noqa: SIM118 no mapping
    return tensors


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and the tensors, sharded above max_shard_bytes; copies the tokenizer's files from `tokenizer_from`.
    Weights that were in `folder` are removed first: transformers would otherwise read the old single file before new shards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if _OURS.fullmatch(old.name):
            old.unlink()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    shards = _shards(tensors, max_shard_bytes)
    files = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # a copy each: parts of one fused weight share memory, which the format refuses
        save_file({name: tensors[name].detach().cpu().clone() for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if tokenizer_from is not None:
        for source in (Path(tokenizer_from) / name for name in TOKENIZER_FILES):
            if source.is_file() and source.parent.resolve() != folder.resolve():
                shutil.copyfile(source, folder / source.name)


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: must be there, and is not")
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must be a JSON object, not {type(value).__name__}")
    return value


def _files(folder: Path) -> dict[str, Path]:
    """The safetensors files, by the tensors that an index puts in them. A single file goes first, as in transformers."""
    if (folder / WEIGHTS).is_file():
        return {"": folder / WEIGHTS}
    if not (folder / INDEX).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        also = f"; {', '.join(others)} is of another format" if others else ""
        raise ValueError(f"{folder}: has no weights: {WEIGHTS} or {INDEX} must be there{also}")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: must have a weight_map of tensor names to files")
    for name, shard in weight_map.items():
        if not (folder / str(shard)).is_file():
            raise ValueError(f"{folder}: shard {shard} is missing; {INDEX} names it for {name}")
    return {name: folder / shard for name, shard in weight_map.items()}


def _headers(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, type) of every tensor in one file."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 it is no mapping
            return [(name, tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()]
    except SafetensorError as error:
        raise ValueError(f"{file}: must be a whole safetensors file: {error}") from error
