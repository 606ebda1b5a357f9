"""What of an adapter survives its trainer: masters and moments in one file, and in its header what they are of."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.actors.lora import SlabLayout
from weft.configs.schema import AdapterConfig
from weft.transport.errors import CheckpointError
from weft.transport.messages import AdapterRef

STATE_FILE = "adapter.safetensors"
STATE_TENSORS = ("master", "exp_avg", "exp_avg_sq")  # fp32 [D] each


def identity(layout: SlabLayout, ref: AdapterRef) -> dict[str, Any]:
    """What a checkpoint must agree on to be loaded as `ref`."""
    return {"version": ref.version, "rank": layout.rank, "modules": list(layout.modules)}


def first_seed(config: AdapterConfig) -> int:
    """Of an adapter's first weights: the same for every lineage, machine and run. Nothing is drawn later."""
    return int.from_bytes(hashlib.sha256(f"{config.name}/{config.sampling.seed}".encode()).digest()[:7])


def write_state(folder: Path, state: Tensor, header: Mapping[str, Any]) -> dict[str, str]:
    """state: fp32 [3, D] on the host. -> SHA-256 by file name, once it is on the disk. Raises OSError, which names the folder,
    where the disk does not take it."""
    part = folder / f".{STATE_FILE}"
    tensors = {name: tensor.clone() for name, tensor in zip(STATE_TENSORS, state.unbind(), strict=True)}
    with naming_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"weft": json.dumps(header)})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        part.replace(folder / STATE_FILE)
    return {STATE_FILE: checksum}


@contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """What the disk refuses is an OSError that names the folder; safetensors has one of its own, without errno."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else 0
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def read_state(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """-> fp32 [3, D], and the header. Raises CheckpointError for a file that is not whole."""
    path = folder / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            state = torch.stack([file.get_tensor(name) for name in STATE_TENSORS])
            return state, json.loads((file.metadata() or {})["weft"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is cut short or altered: {error}") from error
