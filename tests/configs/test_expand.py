"""Adapters out of template, their own settings, every and sweep; and the way back to plain mappings."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from weft.configs.build import SettingError
from weft.configs.expand import expand, to_mapping


def names(**sections: Any) -> list[str]:
    return [adapter.name for adapter in expand(sections).adapters]


def test_an_adapters_own_settings_win_over_the_templates_and_every_wins_over_both() -> None:
    config = expand(
        {
            "template": {"num_steps": 5, "lora": {"rank": 4, "alpha": 4}},
            "adapters": {"a": {"lora": {"rank": 16}}, "b": None},
            "every": {"num_steps": 7},
        }
    )
    a, b = config.adapters
    assert (a.num_steps, a.lora.rank, a.lora.alpha) == (7, 16, 4.0)
    assert (b.num_steps, b.lora.rank, b.lora.alpha) == (7, 4, 4.0)


def test_adapters_may_be_a_list_that_names_them() -> None:
    assert names(adapters=[{"name": "a"}, {"name": "b", "num_steps": 3}]) == ["a", "b"]


def test_without_adapters_the_template_is_one_and_a_sweep_multiplies_it() -> None:
    assert names(template={"name": "calc"}) == ["calc"]
    swept = expand({"template": {"name": "calc"}, "sweep": {"learning_rate": [1e-4, 3e-4], "lora": {"rank": [8, 32]}}})
    assert [adapter.name for adapter in swept.adapters] == [
        "calc-learning_rate-0.0001-rank-8",
        "calc-learning_rate-0.0001-rank-32",
        "calc-learning_rate-0.0003-rank-8",
        "calc-learning_rate-0.0003-rank-32",
    ]
    assert [(one.optimizer.learning_rate, one.lora.rank) for one in swept.adapters] == [
        (1e-4, 8),
        (1e-4, 32),
        (3e-4, 8),
        (3e-4, 32),
    ]


def test_a_sweep_multiplies_each_adapter() -> None:
    assert names(adapters={"a": {}, "b": {}}, sweep={"max_staleness": [0, 1]}) == [
        "a-max_staleness-0",
        "a-max_staleness-1",
        "b-max_staleness-0",
        "b-max_staleness-1",
    ]


def test_values_that_are_long_or_look_alike_are_numbered_in_names() -> None:
    sweep = {"environment.settings.system": ["x" * 300, "y" * 300], "environment.settings.mark": ["á", "é"]}
    assert names(adapters={"a": {}}, sweep=sweep) == [
        f"a-system-{system}-mark-{mark}" for system in (1, 2) for mark in (1, 2)
    ]


def test_a_sweep_of_one_value_sets_it() -> None:
    for value in (3e-4, [3e-4]):
        config = expand({"adapters": {"a": {}}, "sweep": {"learning_rate": value}})
        assert [(one.name, one.optimizer.learning_rate) for one in config.adapters] == [("a", 3e-4)]


def test_a_sweep_reaches_the_environments_own_settings_and_values_that_are_lists() -> None:
    sweep = {"environment.settings.operations": [1, 2], "target_modules": [["q_proj", "v_proj"], "all-linear"]}
    adapters = expand({"adapters": {"a": {}}, "sweep": sweep}).adapters
    assert [adapter.environment.settings for adapter in adapters] == [{"operations": 1}] * 2 + [{"operations": 2}] * 2
    assert [adapter.lora.target_modules for adapter in adapters[:2]] == [("q_proj", "v_proj"), ("all-linear",)]
    assert adapters[0].name == "a-operations-1-target_modules-q_proj_v_proj"


def test_an_environment_of_another_target_inherits_no_settings_of_the_templates() -> None:
    config = expand(
        {
            "environment": {"target": "calculator", "max_turns": 6, "settings": {"operations": 2}},
            "adapters": {
                "same": {"environment": {"settings": {"low": 5}}},
                "other": {"environment": {"target": "jsonl", "settings": {"path": "x"}}},
            },
        }
    )
    same, other = (adapter.environment for adapter in config.adapters)
    assert same.settings == {"operations": 2, "low": 5}
    assert (other.target, other.settings) == ("jsonl", {"path": "x"})


def test_a_configuration_survives_the_way_through_yaml() -> None:
    config = expand({"adapters": {"a": {"sampling": {"stop": ["\n"]}}, "b": {}}, "sweep": {"rank": [4, 8]}})
    assert expand(yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapters": {"calc": {"lora": {"rank": 0}}}}, "adapters.calc.lora.rank=0: must be from 1 to 512"),
        ({"template": {"lora": {"rank": 0}}}, "template.lora.rank=0: must be"),
        ({"adapters": {"calc": {"lora": {"rnk": 1}}}}, "adapters.calc.lora.rnk: unknown setting; did you mean 'rank'?"),
        ({"adaptors": {}}, "adaptors: unknown setting; did you mean 'adapters'?"),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters='a': must be of distinct names"),
        ({"adapters": [{"num_steps": 1}]}, "adapters[0].name is not set"),
        ({"adapters": {"a": {"name": "b"}}}, "adapters.a.name='b': must be 'a'"),
        ({"adapters": {"a": 3}}, "adapters.a=3: must be a mapping"),
        ({"adapters": 3}, "adapters=3: must be a mapping"),
        ({"sweep": {"lerning_rate": [1]}}, "sweep.lerning_rate: unknown setting; did you mean 'learning_rate'?"),
        ({"sweep": {"learning_rate": []}}, "sweep.learning_rate=[]: must be a list of at least one value"),
        ({"sweep": {"rank": [1], "lora": {"rank": [2]}}}, "must vary lora.rank once"),
        ({"sweep": {"rank": [1, 2]}, "every": {"lora": {"rank": 4}}}, "must not vary what every.lora.rank fixes"),
        ({"sweep": {"num_steps": [1, 1]}}, "must be of distinct names"),
        (
            {"adapters": {"a": {"lora": {"rank": 64}}}, "cluster": {"sampler": {"max_lora_rank": 32}}},
            "adapters.a.lora.rank=64: must be at most cluster.sampler.max_lora_rank=32",
        ),
    ],
)
def test_a_message_names_the_setting_by_its_path(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        expand(sections)
    assert message in str(caught.value)


def test_a_path_of_the_users_home_is_where_the_home_is(monkeypatch, tmp_path):
    """No shell expands what stands behind a `=`: a folder named ~ would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"run": {"dir": "~/out"}, "adapters": {"a": {"lora": {"warm_start": "~/peft"}}, "b": {}}}
    config = expand(settings)
    assert config.run.dir == str(tmp_path / "out")
    assert [one.lora.warm_start for one in config.adapters] == [str(tmp_path / "peft"), None]
