"""The plugin: what it replaces in vLLM's own classes, and where it leaves them alone."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import column_parallel_linear
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager

from weft.actors import vllm_plugin

OURS = "weft.actors.punica.DecodeLora"


def test_the_installed_distribution_offers_it_to_every_vllm() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert "weft.actors.vllm_plugin:register" in [point.value for point in points]


def test_a_vllm_on_cpus_keeps_its_own_path_and_hears_nothing() -> None:
    """In a process of its own, through vLLM's own loader, as a worker has it."""
    script = """
from vllm.plugins import load_general_plugins
from vllm.platforms import current_platform
before = current_platform.get_punica_wrapper()
load_general_plugins()
assert current_platform.get_punica_wrapper() == before, before
assert not hasattr(type(current_platform), "weft_installed")
import sys
assert "weft.actors.punica" not in sys.modules
"""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop(vllm_plugin.VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    heard = (done.stdout + done.stderr).replace(str(Path(sys.prefix).parent), "")  # whatever some library warns of, and where
    assert "weft" not in heard


class Gpu:
    """A platform as vLLM 0.24 has it on NVIDIA GPUs, as far as the plugin asks."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "theirs"

    def is_cuda(self) -> bool:
        return True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Gpu]:
    """vLLM's own manager and settings, and this platform in the place of the CPU's, all as they were afterwards."""
    fresh = type("Fresh", (Gpu,), {})
    monkeypatch.setattr("vllm.platforms._current_platform", fresh())
    for owner, name in ((LoRAModelManager, "set_adapter_mapping"), (LoRAConfig, "compute_hash"),
                        (column_parallel_linear, "_mcp_apply")):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.delattr(vllm_plugin.register, "said", raising=False)
    monkeypatch.delenv(vllm_plugin.VARIABLE, raising=False)
    return fresh


def test_on_a_supported_version_vllm_names_our_wrapper(gpu: type[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "_version", lambda: "0.24.0")
    before = LoRAConfig(max_lora_rank=8, max_loras=1).compute_hash()
    for _ in range(3):  # vLLM may load a plugin again
        vllm_plugin.register()
    assert gpu.get_punica_wrapper() == OURS
    assert LoRAConfig(max_lora_rank=8, max_loras=1).compute_hash() == f"{before}-weft"


@pytest.mark.parametrize("version", ["0.23.1", "0.25.0", "0.240.0", "unknown"])
def test_another_version_is_left_alone_and_that_is_said_once(
    gpu: type[Gpu], version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_plugin, "_version", lambda: version)
    with caplog.at_level(logging.WARNING, "vllm.plugins.weft"):
        for _ in range(3):
            vllm_plugin.register()
    assert gpu.get_punica_wrapper() == "theirs"
    said = [record.message for record in caplog.records if record.name == vllm_plugin.logger.name]
    assert [version in one for one in said] == [True]


@pytest.mark.parametrize("missing", [(LoRAModelManager, "set_adapter_mapping"), (column_parallel_linear, "_mcp_apply")])
def test_a_vllm_that_lacks_what_would_be_replaced_keeps_all_its_own_and_starts(
    gpu: type[Gpu], missing: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_plugin, "_version", lambda: "0.24.9")
    before = LoRAConfig(max_lora_rank=8, max_loras=1).compute_hash()
    monkeypatch.delattr(*missing)
    with caplog.at_level(logging.WARNING, "vllm.plugins.weft"):
        for _ in range(3):
            vllm_plugin.register()
    assert gpu.get_punica_wrapper() == "theirs" and LoRAConfig(max_lora_rank=8, max_loras=1).compute_hash() == before
    said = [record.message for record in caplog.records if record.name == vllm_plugin.logger.name]
    assert [missing[1] in one for one in said] == [True]


@pytest.mark.parametrize("setting", ["0", "1", None])
def test_it_runs_unless_the_variable_turns_it_off(gpu: type[Gpu], setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "_version", lambda: "0.24.0")
    if setting is not None:
        monkeypatch.setenv(vllm_plugin.VARIABLE, setting)
    vllm_plugin.register()
    assert gpu.get_punica_wrapper() == ("theirs" if setting == "0" else OURS)


class Wrapper:
    """What the manager tells its wrapper, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def weft_meet(self, modules: dict[str, Any], ranks: dict[int, int]) -> None:
        self.told.append(ranks)

    def update_metadata(self, mapping: LoRAMapping, index_to_id: list[int | None], *rest: Any) -> None:
        self.told.append((mapping.index_mapping, list(index_to_id)))


class Manager(LoRAModelManager):
    """vLLM's own, without a model; its batches are compared as vLLM 0.24 does it, whatever version is here."""

    def __init__(self) -> None:
        adapters = {1: LoRAModel(1, 8, {}), 2: LoRAModel(2, 32, {})}
        state = {"_registered_adapters": adapters, "_active_adapters": {}, "lora_index_to_id": [None, None], "modules": {}}
        state |= {"punica_wrapper_mapping": {"language_model": Wrapper()}, "supports_mm": False, "vocab_size": 10}
        state |= {"lora_config": types.SimpleNamespace(max_loras=2), "_last_mapping": None, "_classification_head": None}
        state |= {"_get_punica_wrapper": lambda name: self.punica_wrapper_mapping["language_model"]}
        vars(self).update(state)

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        if self._last_mapping != mapping:
            self._set_adapter_mapping(mapping)
            self._last_mapping = mapping

    def told(self) -> list[Any]:
        """Since it was asked last."""
        wrapper = self.punica_wrapper_mapping["language_model"]
        told, wrapper.told = wrapper.told, []
        return told


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    kind = type("Plugged", (Manager,), {})
    monkeypatch.setattr(LoRAConfig, "compute_hash", LoRAConfig.compute_hash)
    monkeypatch.setattr(column_parallel_linear, "_mcp_apply", column_parallel_linear._mcp_apply)
    vllm_plugin.install(type("Platform", (), {}), kind, LoRAConfig, column_parallel_linear)
    return kind()


MIX = LoRAMapping((1, 0, 2, 2), (1, 0, 2, 2))


def test_vllms_manager_tells_the_ranks_before_the_tokens_and_the_same_batch_once(manager: Manager) -> None:
    assert manager.activate_adapter(1) and manager.activate_adapter(2)
    manager.set_adapter_mapping(MIX)
    assert manager.told() == [{1: 8, 2: 32}, ((1, 0, 2, 2), [1, 2])]
    manager.set_adapter_mapping(LoRAMapping((1, 0, 2, 2), (1, 0, 2, 2)))
    assert manager.told() == []


def test_the_same_batch_is_looked_at_again_when_vllm_has_loaded_an_adapter_anew(manager: Manager) -> None:
    assert manager.activate_adapter(1) and manager.activate_adapter(2)
    manager.set_adapter_mapping(MIX)
    manager.deactivate_adapter(1)
    manager._registered_adapters[1] = LoRAModel(1, 16, {})
    assert manager.activate_adapter(1)
    manager.told()
    manager.set_adapter_mapping(MIX)
    assert manager.told() == [{1: 16, 2: 32}, ((1, 0, 2, 2), [1, 2])]


def test_the_same_batch_is_looked_at_again_when_somebody_else_has_filled_its_slots(manager: Manager) -> None:
    """As weft's parameter sync does: vLLM's dummies were warmed up under the ids that its first adapters have."""
    assert manager.activate_adapter(1) and manager.activate_adapter(2)
    manager.set_adapter_mapping(MIX)
    manager.told()
    manager.lora_index_to_id = [2, 1]
    manager.set_adapter_mapping(MIX)
    assert manager.told() == [{1: 8, 2: 32}, ((1, 0, 2, 2), [2, 1])]


def test_an_adapter_has_the_rank_of_its_widest_layer() -> None:
    """PEFT's rank_pattern: a layer may be wider than the adapter's own rank, and vLLM applies all of it."""

    def layer(*ranks: int | None) -> LoRALayerWeights:
        a: Any = [None if rank is None else torch.zeros(rank, 4) for rank in ranks]
        return LoRALayerWeights("any", 8, 8, a if len(a) > 1 else a[0], a)

    assert vllm_plugin.rank_of(LoRAModel(1, 8, {})) == 8
    assert vllm_plugin.rank_of(LoRAModel(1, 8, {"o": layer(8), "qkv": layer(4, None, 4)})) == 8
    assert vllm_plugin.rank_of(LoRAModel(1, 8, {"o": layer(8), "qkv": layer(8, None, 24)})) == 24
    assert vllm_plugin.rank_of(LoRAModel(1, 8, {"o": layer(12)})) == 12


def test_every_supported_version_is_one_that_the_gpu_extra_may_install() -> None:
    extra = [one for one in importlib.metadata.requires("weft") or [] if one.startswith("vllm==") and '"gpu"' in one]
    assert len(extra) == 1 and extra[0].removeprefix("vllm==").startswith(vllm_plugin.SUPPORTED)
