"""The composed mapping to `Config`: template, every and sweep folded into complete adapters.

    one adapter = environment <- template <- its own settings <- every <- one point of the sweep        (the right one wins)

A sweep is a mapping from a setting of an adapter (dotted, or its last name where that is unique) to a list of values.
It multiplies every adapter by the Cartesian product of the lists; without adapters it multiplies the template.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from weft.configs.build import SettingError, build, leaves, unknown
from weft.configs.schema import AdapterConfig, ClusterConfig, Config, LoraConfig, ModelConfig, RunConfig

SECTIONS = ("run", "model", "cluster", "environment", "template", "adapters", "every", "sweep")
MAX_WORD = 24  # characters of one swept value in an adapter's name
FREE = "environment.settings"  # its names belong to the environment's class, which checks them itself

Settings = Mapping[str, Any]


def expand(composed: Settings) -> Config:
    """Build the Config of a run.

    Raises SettingError (a ValueError) whose message names the setting by its dotted path, its value and the rule.
    """
    for name in composed:
        if name not in SECTIONS:
            raise SettingError(unknown(str(name), list(SECTIONS), "", adapter_settings()))
    run = build(RunConfig, _section(composed, "run"), "run")
    run = dataclasses.replace(run, dir=os.path.expanduser(run.dir))  # which no shell does behind a `=`
    model = build(ModelConfig, _section(composed, "model"), "model")
    cluster = build(ClusterConfig, _section(composed, "cluster"), "cluster")
    adapters = tuple(build(AdapterConfig, settings, path) for path, settings in _adapters(composed))
    adapters = tuple(dataclasses.replace(one, lora=_at_home(one.lora)) for one in adapters)
    try:
        return Config(run=run, model=model, cluster=cluster, adapters=adapters)
    except ValueError as error:
        raise SettingError(str(error)) from None


def _at_home(lora: LoraConfig) -> LoraConfig:
    return dataclasses.replace(lora, warm_start=os.path.expanduser(lora.warm_start)) if lora.warm_start else lora


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain mappings, lists and scalars: what YAML, JSON and messages hold. `expand`, `build` read it."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def adapter_settings() -> list[str]:
    """Where the template has each setting of an adapter."""
    return [f"template.{leaf}" for leaf in leaves(AdapterConfig)]


def _adapters(composed: Settings) -> Iterator[tuple[str, Settings]]:
    """(path for messages, complete settings) of each adapter."""
    template = dict(_section(composed, "template"))
    alone = template.pop("name", "adapter")
    template = merge({"environment": _section(composed, "environment")}, template)
    own = list(_named(composed.get("adapters")))
    every = _section(composed, "every")
    sweep = _sweep(_section(composed, "sweep"), every)
    for name, path, settings in own or [(alone, "template", {})]:
        complete = merge(merge(template, settings), every)
        for suffix, point in sweep:
            swept = complete
            for leaf, value in point:
                swept = merge(swept, _nested(leaf, value))
            yield path + suffix, {**swept, "name": f"{name}{suffix}" if isinstance(name, str) else name}


def _named(adapters: Any) -> Iterator[tuple[Any, str, Settings]]:
    """(name, path, own settings) from a mapping by name, or from a list whose entries hold their `name`."""
    if adapters is None:
        return
    if isinstance(adapters, Mapping):
        for name, settings in adapters.items():
            path = f"adapters.{name}"
            settings = _mapping({} if settings is None else settings, path)
            if settings.get("name", name) != name:
                raise SettingError(f"{path}.name={settings['name']!r}: must be {str(name)!r}, the name it has under adapters")
            yield str(name), path, settings
    elif isinstance(adapters, (list, tuple)):
        for index, settings in enumerate(adapters):
            settings = _mapping(settings, f"adapters[{index}]")
            if "name" not in settings:
                raise SettingError(f"adapters[{index}].name is not set: it has no default")
            yield settings["name"], f"adapters.{settings['name']}", settings
    else:
        raise SettingError(f"adapters={adapters!r}: must be a mapping from names to settings")


def merge(below: Settings, above: Settings) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping. An environment of another target inherits nothing: it is another class."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if not (isinstance(under, Mapping) and isinstance(value, Mapping)):
            merged[name] = value
            continue
        if name == "environment" and value.get("target", under.get("target")) != under.get("target"):
            under = {}
        merged[name] = merge(under, value)
    return merged


def _sweep(sweep: Settings, every: Settings) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(suffix of the name, [(leaf, value), ...]) of each point of the Cartesian product; one empty point without a sweep."""
    known = [leaf for leaf in leaves(AdapterConfig) if leaf != "name"]
    axes: list[list[tuple[str, str, Any]]] = []
    taken: set[str] = set()
    fixed = set(_flat(every))
    for path, values in _flat(sweep).items():
        leaf = _resolve(path, known)
        if leaf in taken:
            raise SettingError(f"sweep.{path}={values!r}: must vary {leaf} once; it is there twice")
        if leaf in fixed:
            raise SettingError(f"sweep.{path}={values!r}: must not vary what every.{leaf} fixes")
        taken.add(leaf)
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        if not values:
            raise SettingError(f"sweep.{path}=[]: must be a list of at least one value")
        short = leaf.rsplit(".", 1)[-1]
        axes.append([(f"-{short}-{word}" if len(values) > 1 else "", leaf, value) for word, value in _words(values)])
    return [
        ("".join(suffix for suffix, _, _ in point), [(leaf, value) for _, leaf, value in point])
        for point in itertools.product(*axes)
    ]


def _resolve(path: str, known: list[str]) -> str:
    """The full path of a swept setting, from the path itself or from its last name."""
    if path in known or path.startswith(FREE + "."):
        return path
    matches = [leaf for leaf in known if leaf.endswith("." + path)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SettingError(f"sweep.{path}: must name one setting; it could be " + " or ".join(matches))
    raise SettingError(unknown(path, sorted({leaf.rsplit(".", 1)[-1] for leaf in known}), "sweep"))


def _words(values: list[Any]) -> Iterator[tuple[str, Any]]:
    """Each value with its part of an adapter's name: the value itself, or its number where values are long or look alike."""
    words = [_word(value) for value in values]
    if len(set(words)) < len(set(map(repr, values))) or max(map(len, words)) > MAX_WORD:
        words = [str(number) for number in range(1, len(values) + 1)]
    return zip(words, values, strict=True)


def _word(value: Any) -> str:
    """A value as part of a legal adapter name."""
    if isinstance(value, (list, tuple)):
        return "_".join(_word(item) for item in value) or "none"
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)


def _flat(settings: Settings, path: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        here = f"{path}.{name}" if path else str(name)
        flat.update(_flat(value, here) if isinstance(value, Mapping) else {here: value})
    return flat


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


def _section(composed: Settings, name: str) -> Settings:
    value = composed.get(name)
    return _mapping({} if value is None else value, name)


def _mapping(value: Any, path: str) -> Settings:
    if not isinstance(value, Mapping):
        raise SettingError(f"{path}={value!r}: must be a mapping of settings")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
