"""The settings: frozen, at most sixty, and these; each refuses what it cannot be by name, value and rule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from weft.configs import schema
from weft.configs.build import SettingError, build, leaves
from weft.configs.schema import AdapterConfig, ClusterConfig, Config, LossConfig, ModelConfig, RunConfig

SECTIONS = {"run": RunConfig, "model": ModelConfig, "cluster": ClusterConfig, "adapter": AdapterConfig}
LISTED = """
run.dir run.fresh run.checkpoint_every run.table
model.path model.dtype
cluster.samplers cluster.trainers cluster.gpus_per_sampler cluster.gpus_per_trainer
cluster.dashboard_port cluster.start_deadline_s
cluster.sampler.max_lora_rank cluster.sampler.max_num_seqs cluster.sampler.max_model_len
cluster.sampler.kv_cache_gib cluster.sampler.gpu_memory_utilization
cluster.trainer.token_budget cluster.trainer.device_adapters cluster.trainer.host_adapters cluster.trainer.num_threads
cluster.sync.backend cluster.sync.deadline_s
adapter.name adapter.num_steps adapter.batch_size adapter.group_size adapter.max_staleness adapter.rollout_version
adapter.eval_prompts
adapter.environment.target adapter.environment.settings adapter.environment.max_turns
adapter.lora.rank adapter.lora.alpha adapter.lora.target_modules adapter.lora.exclude_modules adapter.lora.warm_start
adapter.optimizer.learning_rate adapter.optimizer.schedule adapter.optimizer.warmup_steps adapter.optimizer.betas
adapter.optimizer.eps adapter.optimizer.weight_decay adapter.optimizer.max_grad_norm
adapter.loss.name adapter.loss.advantage adapter.loss.normalization adapter.loss.clip_low adapter.loss.clip_high
adapter.loss.kl_coefficient adapter.loss.correction adapter.loss.correction_cap
adapter.sampling.temperature adapter.sampling.top_p adapter.sampling.top_k adapter.sampling.max_tokens
adapter.sampling.stop adapter.sampling.stop_token_ids adapter.sampling.seed
"""


def dataclasses_of_schema() -> list[type]:
    return [cls for cls in vars(schema).values() if isinstance(cls, type) and cls.__module__ == schema.__name__]


def test_every_dataclass_of_the_schema_is_frozen() -> None:
    classes = dataclasses_of_schema()
    assert len(classes) > 8
    for cls in classes:
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]


def test_the_settings_are_these() -> None:
    found = [f"{section}.{leaf}" for section, cls in SECTIONS.items() for leaf in leaves(cls)]
    assert sorted(found) == sorted(LISTED.split())
    assert len(found) <= 60


def test_every_setting_but_an_adapters_name_has_a_default() -> None:
    for cls in SECTIONS.values():
        build(cls, {"name": "a"} if cls is AdapterConfig else {})


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (AdapterConfig, {"lora": {"rank": 0}}, "a.lora.rank=0: must be from 1 to 512"),
        (AdapterConfig, {"lora": {"rank": 513}}, "a.lora.rank=513: must be from 1 to 512"),
        (AdapterConfig, {"lora": {"rank": 1.5}}, "a.lora.rank=1.5: must be of type int"),
        (AdapterConfig, {"lora": {"rank": True}}, "a.lora.rank=True: must be of type int"),
        (AdapterConfig, {"lora": {"rnk": 8}}, "a.lora.rnk: unknown setting; did you mean 'rank'?"),
        (AdapterConfig, {"max_staleness": -1}, "a.max_staleness=-1: must be at least 0"),
        (AdapterConfig, {"batch_size": 65}, "a.batch_size=65: must be a multiple of group_size=8"),
        (AdapterConfig, {"batch_size": 8, "group_size": 1}, "a.group_size=1: must be at least 2 with loss.advantage=auto"),
        (
            AdapterConfig,
            {"batch_size": 1, "group_size": 1, "loss": {"advantage": "reinforce"}},
            "a.batch_size=1: must be at least 2 with loss.advantage=reinforce",
        ),
        (AdapterConfig, {"name": "a/b"}, "a.name='a/b': must be letters a to z, digits"),
        (AdapterConfig, {"name": "žluť"}, "a.name='žluť': must be letters a to z, digits"),
        (AdapterConfig, {"name": "a" * 129}, "at most 128 in all"),
        (AdapterConfig, {"optimizer": {"betas": [0.9]}}, "a.optimizer.betas=[0.9]: must have 2 values"),
        (AdapterConfig, {"optimizer": {"learning_rate": "fast"}}, "a.optimizer.learning_rate='fast': must be of type float"),
        (AdapterConfig, {"optimizer": {"learning_rate": math.inf}}, "a.optimizer.learning_rate=inf: must be a finite number"),
        (AdapterConfig, {"lora": {"alpha": "nan"}}, "a.lora.alpha=nan: must be a finite number"),
        (AdapterConfig, {"lora": {"alpha": 10**400}}, "must be a finite number"),
        (AdapterConfig, {"sampling": {"seed": 10**23}}, "a.sampling.seed=100000000000000000000000: must be a whole number of"),
        (AdapterConfig, {"num_steps": 1e24}, "must be a whole number of 64 bits"),
        (AdapterConfig, {"loss": {"name": "grop"}}, "a.loss.name='grop': must be one of importance_sampling, ppo, grpo"),
        (AdapterConfig, {"loss": {"name": "cross_entropy", "advantage": "rloo"}}, "a.loss.advantage='rloo': must be auto with"),
        (AdapterConfig, {"sampling": {"temperature": 0}}, "a.sampling.temperature=0.0: must be from 0.01 to 2"),
        (AdapterConfig, {"sampling": {"temperature": 2.5}}, "a.sampling.temperature=2.5: must be from 0.01 to 2"),
        (AdapterConfig, {"sampling": {"stop": ["\n", ""]}}, "a.sampling.stop=('\\n', ''): must be texts that are not empty"),
        (AdapterConfig, {"sampling": {"stop_token_ids": [-1]}}, "a.sampling.stop_token_ids=(-1,): must be token ids from 0"),
        (AdapterConfig, {"sampling": 3}, "a.sampling=3: must be a mapping of settings"),
        (ClusterConfig, {"gpus_per_sampler": -1}, "a.gpus_per_sampler=-1.0: must be a whole number, or a share"),
        (ClusterConfig, {"gpus_per_trainer": 2}, "a.gpus_per_trainer=2.0: must be at most 1: more trainers use more cards"),
        (ClusterConfig, {"sync": {"backend": "mpi"}}, "a.sync.backend='mpi': must be one of gloo, nccl"),
        (RunConfig, {"checkpoint_every": 0}, "a.checkpoint_every=0: must be above 0"),
        (ModelConfig, {"dtype": "int8"}, "a.dtype='int8': must be one of float32, bfloat16, bfloat16+fp8"),
    ],
)
def test_what_cannot_be_is_refused_by_name_value_and_rule(cls: type, settings: dict[str, Any], message: str) -> None:
    named = {"name": "a", **settings} if cls is AdapterConfig else settings
    with pytest.raises(SettingError) as caught:
        build(cls, named, "a")
    assert message in str(caught.value)


def test_whole_cards_of_a_sampler_are_tensor_parallel_and_a_share_of_one_is_not() -> None:
    sizes = [ClusterConfig(gpus_per_sampler=gpus).tensor_parallel for gpus in (0, 0.5, 1, 2, 4)]
    assert sizes == [1, 1, 1, 2, 4]
    assert ClusterConfig(samplers=3, gpus_per_sampler=2, trainers=2, gpus_per_trainer=1).gpus == 8


def test_auto_is_the_losss_own() -> None:
    assert {name: LossConfig(name=name).estimator for name in ("grpo", "dr_grpo", "gspo")} == {
        "grpo": "grpo",
        "dr_grpo": "dr_grpo",
        "gspo": "grpo",
    }
    assert LossConfig(name="dr_grpo", advantage="rloo").estimator == "rloo"
    assert {name: LossConfig(name=name).denominator for name in ("grpo", "dr_grpo", "gspo")} == {
        "grpo": "token",
        "dr_grpo": "constant",
        "gspo": "sequence",
    }


def test_numbers_as_yaml_gives_them_become_what_the_schema_says() -> None:
    built = build(AdapterConfig, {"name": "a", "num_steps": 3.0, "optimizer": {"learning_rate": "1e-4"}, "lora": {"alpha": 4}})
    assert (built.num_steps, built.optimizer.learning_rate, built.lora.alpha) == (3, 1e-4, 4.0)
    assert isinstance(built.num_steps, int)
    assert build(AdapterConfig, {"name": "a", "sampling": {"stop": "\n"}}).sampling.stop == ("\n",)


def test_fp8_is_asked_for_with_the_dtype_and_needs_a_gpu() -> None:
    model = ModelConfig(dtype="bfloat16+fp8")
    assert (model.tensors, model.base_precision) == ("bfloat16", "fp8")
    assert (ModelConfig().tensors, ModelConfig().base_precision) == ("float32", "full")
    adapters = (AdapterConfig(name="a"),)
    Config(RunConfig(), model, ClusterConfig(gpus_per_trainer=1), adapters)
    with pytest.raises(ValueError, match=r"model.dtype='bfloat16\+fp8': must be bfloat16 with cluster.gpus_per_trainer=0"):
        Config(RunConfig(), model, ClusterConfig(), adapters)
