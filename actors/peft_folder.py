"""Adapters as PEFT folders, which peft, transformers and vLLM's LoRARequest load from disk.

    adapter_config.json          rank, alpha, targets
    adapter_model.safetensors    base_model.model.<linear>.lora_A.weight [R, I], ...lora_B.weight [O, R], fp32

R rank, I in, O out, D elements of a slab.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.actors.lora import SlabLayout
from weft.actors.trainer_state import naming_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# settings of PEFT under which the same tensors are another function; each must be absent or have this value
PLAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
    "layer_replication": [],
    "trainable_token_indices": [],
    "target_parameters": [],
    "alora_invocation_tokens": [],
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# what init_lora_weights may be: under the others (pissa, olora, corda, loftq, lora_ga) PEFT takes the first weights out of the
# base's own, and the adapter is one of the base that is left, until it has been converted when it was saved
OWN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def write_peft_folder(folder: Path, layout: SlabLayout, flat: Tensor, alpha: float, base_model: str) -> None:
    """flat: fp32 [D], the master weights. base_model: the path or name of the base, which PEFT records.

    The folder is made; files of an earlier adapter in it are replaced, each at once. Raises OSError, which names the folder,
    where the disk does not take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in layout.views(flat.detach().cpu()).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": layout.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": list(layout.modules),  # in full: an ending would also fit layers that this adapter leaves alone
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    parts = {WEIGHTS_FILE: folder / f".{WEIGHTS_FILE}", CONFIG_FILE: folder / f".{CONFIG_FILE}"}
    with naming_folder(folder):
        save_file(tensors, parts[WEIGHTS_FILE], metadata={"format": "pt"})
        parts[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n")
    for name, part in parts.items():
        part.replace(folder / name)


def check_peft_folder(folder: Path, layout: SlabLayout, alpha: float) -> None:
    """Raises ValueError, naming the folder and what does not fit, unless the folder holds an adapter of exactly this shape and
    scale. Reads headers alone."""
    config = _read_config(folder)
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(f"PEFT folder {folder}: {key}={config[key]!r}: must be absent or {plain!r}")
    if (init := config.get("init_lora_weights", True)) not in (*OWN_INITS, None):
        rule = "must leave the base as it is: save it with path_initial_model_for_weight_conversion"
        raise ValueError(f"PEFT folder {folder}: init_lora_weights={init!r}: {rule}")
    for key, setting, expected in (("r", "rank", layout.rank), ("lora_alpha", "alpha", alpha)):
        found = config.get(key)
        if found != expected:
            raise ValueError(f"PEFT folder {folder}: {key}={found!r} there, {setting}={expected:g} by the configuration")
    there, expected_shapes = _shapes(folder), _expected(layout)
    for name, shape in expected_shapes.items():
        if there.get(name) != shape:
            seen = list(there[name]) if name in there else "missing"
            raise ValueError(f"PEFT folder {folder}: tensor {name} is {seen} there, {list(shape)} by the configuration")
    for name, shape in there.items():
        if name not in expected_shapes:
            raise ValueError(f"PEFT folder {folder}: tensor {name} is {list(shape)} there, no target by the configuration")


def read_peft_folder(folder: Path, layout: SlabLayout, alpha: float) -> Tensor:
    """-> fp32 [D] in slab order. Raises ValueError as `check_peft_folder` does."""
    check_peft_folder(folder, layout, alpha)
    flat = torch.empty(layout.numel)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for name, (a, b) in layout.views(flat).items():
            a.copy_(file.get_tensor(f"{PREFIX}{name}.lora_A.weight"))
            b.copy_(file.get_tensor(f"{PREFIX}{name}.lora_B.weight"))
    if not torch.isfinite(flat).all():
        raise ValueError(f"PEFT folder {folder}: holds weights that are not finite")
    return flat


def _expected(layout: SlabLayout) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in layout.entries:
        shapes[f"{PREFIX}{entry.name}.lora_A.weight"] = (layout.rank, entry.in_features)
        shapes[f"{PREFIX}{entry.name}.lora_B.weight"] = (entry.out_features, layout.rank)
    return shapes


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"PEFT folder {folder}: {CONFIG_FILE} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"PEFT folder {folder}: {CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"PEFT folder {folder}: peft_type={kind!r}: must be 'LORA'")
    return config


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"PEFT folder {folder}: {WEIGHTS_FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 not a mapping
    except SafetensorError as error:
        raise ValueError(f"PEFT folder {folder}: {WEIGHTS_FILE} is cut short or altered: {error}") from None
