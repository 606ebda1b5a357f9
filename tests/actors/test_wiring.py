"""From the configuration to the processes: each is told what its class takes, and what all adapters together need."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from weft.actors.wiring import PARAM_SYNC, SAMPLER, TRAINER, param_sync_arguments, sampler_arguments, trainer_arguments
from weft.configs.expand import expand
from weft.configs.schema import Config


def of(*adapters: dict[str, Any]) -> Config:
    return expand({"adapters": {f"a{index}": adapter for index, adapter in enumerate(adapters)}})


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (SAMPLER, lambda config: sampler_arguments(config, 0)),
        (TRAINER, lambda config: trainer_arguments(config, 0, "shared")),
        (PARAM_SYNC, param_sync_arguments),
    ],
)
def test_each_process_is_given_what_its_class_takes(target: str, arguments: Callable[[Config], dict[str, Any]]) -> None:
    module, name = target.rsplit(".", 1)
    inspect.signature(getattr(importlib.import_module(module), name)).bind(**arguments(of({})))


def test_samplers_and_trainers_are_made_for_the_largest_of_all_adapters() -> None:
    config = of(
        {"lora": {"rank": 4}, "group_size": 4, "batch_size": 16, "max_staleness": 3},
        {"lora": {"rank": 12}, "group_size": 16, "batch_size": 16, "max_staleness": 0},
    )
    sampler = sampler_arguments(config, 1)
    assert (sampler["index"], sampler["max_lora_rank"], sampler["largest_group"]) == (1, 16, 16)
    assert sampler["max_live_versions"] >= sum(adapter.live_versions for adapter in config.adapters)
    assert trainer_arguments(config, 1, "shared")["ranks"] == [4, 12]
