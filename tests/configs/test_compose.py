"""Groups, values and mistakes on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.configs.build import SettingError
from weft.configs.compose import compose, descriptions
from weft.configs.expand import expand

GROUP = """\
# @package _global_
# of the user's own
adapters:
  first: {lora: {rank: 4}}
  second: {environment: {target: jsonl, settings: {path: x}}}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "mine.yaml").write_text(GROUP)
    return str(tmp_path)


def test_every_choice_of_every_group_composes_and_says_what_it_is() -> None:
    for group, choices in descriptions().items():
        assert choices
        for choice, comment in choices.items():
            assert comment, f"{group}/{choice}.yaml begins with a comment for weft --help"
            overrides = {"model=local": ["model.path=x"], "environment=jsonl": ["environment.settings.path=x"]}
            expand(compose([f"{group}={choice}", *overrides.get(f"{group}={choice}", [])]))


def test_the_demo_is_eight_different_experiments() -> None:
    adapters = expand(compose(["adapters=demo"])).adapters
    tasks = {(one.environment.target, one.environment.settings.get("task", "")) for one in adapters}
    assert len(adapters) == 8
    assert len(tasks) >= 3
    assert "calculator" in {target for target, _ in tasks}
    assert {one.max_staleness for one in adapters} == {0, 1, 2}
    for different in (
        {one.lora.rank for one in adapters},
        {one.optimizer.learning_rate for one in adapters},
        {one.loss.name for one in adapters},
        {one.loss.advantage for one in adapters},
    ):
        assert len(different) >= 3


def test_values_override_what_the_groups_say_and_what_no_file_mentions(own: str) -> None:
    config = expand(compose(["adapters=mine", "adapters.first.lora.rank=2", "every.sampling.top_k=5"], own))
    first, second = config.adapters
    assert (first.lora.rank, first.sampling.top_k, second.sampling.top_k) == (2, 5, 5)


def test_an_adapter_is_added_and_taken_away(own: str) -> None:
    config = expand(compose(["adapters=mine", "+adapters.third.num_steps=1", "~adapters.second"], own))
    assert [adapter.name for adapter in config.adapters] == ["first", "third"]


def test_a_sweep_is_a_list() -> None:
    config = expand(compose(["sweep.learning_rate=[1e-4,3e-4]"]))
    assert [adapter.optimizer.learning_rate for adapter in config.adapters] == [1e-4, 3e-4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tyny"], "model=tyny: there is no such choice; did you mean 'tiny'? (there are: local, tiny"),
        (["modle=tiny"], "modle: unknown setting; did you mean 'model'?"),
        (["cluster=none"], "cluster=none: there is no such choice (there are: h200x1, h200x2, h200x4, h200x8, laptop"),
        (["model=local"], "model.path is not set: it has no default"),
        (["hydra.run.dir=x"], "hydra: unknown setting"),
        (["template.lora.rank"], "'template.lora.rank': must be group=choice or setting=value"),
        (["template.lora.rank=1,2"], "template.lora.rank=1,2: must be one value; a list is"),
        (["template.lora.rank=[1"], "template.lora.rank=[1: cannot be read"),
        (["adapters=mine", "adapters.frist.lora.rank=2"], "adapters.frist: unknown setting; did you mean 'first'?"),
        (["adapters=demo", "environment=calculator"], "environment=calculator: must not be chosen here"),
    ],
)
def test_a_mistake_is_said_with_what_there_is(own: str, overrides: list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        expand(compose(overrides, own))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_adapters_of_one_name_in_a_file_are_refused(own: str) -> None:
    Path(own, "adapters", "twice.yaml").write_text(GROUP + "  first: {}\n")
    with pytest.raises(SettingError, match=r"two settings or adapters of one name.*first.*twice.yaml"):
        compose(["adapters=twice"], own)


def test_a_group_of_the_users_may_not_hide_one_of_ours(own: str) -> None:
    Path(own, "adapters", "demo.yaml").write_text(GROUP)
    with pytest.raises(SettingError, match="must have another name"):
        compose([], own)
    with pytest.raises(SettingError, match="must be a folder that is there"):
        compose([], own + "/absent")
