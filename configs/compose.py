"""Hydra, in one file: groups and overrides to one composed mapping, every mistake to one SettingError.

`group=choice` picks a file of a group; any other `path.to.setting=value` sets a value, and is checked by the schema and not by
what the YAML happens to hold: a default may be overridden though no file names it, and a misspelt name is told apart from it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from weft.configs.build import SettingError, unknown
from weft.configs.expand import SECTIONS, adapter_settings

GROUPS = ("model", "cluster", "environment", "adapters")
_KEY = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[^=\s]+?)(=(?P<value>.*))?$", re.DOTALL)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The mapping that `expand` takes, from `group=choice` and `setting=value` arguments.

    config_dir: a folder with the user's own group folders (adapters/mine.yaml is chosen by adapters=mine).
    Raises SettingError for whatever cannot be read, is unknown, or would be ignored.
    """
    choices = _choices(config_dir)
    groups, values = [], []
    for override in overrides:
        sign, key, value = _split(override)
        if key in GROUPS and value is not None and not sign and not value.startswith("{"):
            groups.append(f"{key}={_choice(key, value, choices[key])}")
        else:
            values.append((override, sign, key, value))
    chosen = _load(groups, config_dir, complete=False)
    _check_environment(groups, chosen)
    for override, sign, key, _ in values:
        _check_key(override, sign, key, chosen)
    plain = [override if sign == "~" else f"++{override.lstrip('+')}" for override, sign, _, _ in values]
    for override in plain:
        _check_grammar(override)
    return _load(groups + plain, config_dir, complete=True)


def descriptions(config_dir: str | None = None) -> dict[str, dict[str, str]]:
    """Group -> choice -> the comment that its file begins with."""
    return {
        group: {name: _comment(text) for name, text in sorted(files.items())} for group, files in _choices(config_dir).items()
    }


def defaults() -> dict[str, str]:
    """Group -> the choice that is made where the user makes none."""
    primary = yaml.safe_load(resources.files("weft.configs").joinpath("run.yaml").read_text())
    return {group: choice for entry in primary["defaults"] if isinstance(entry, dict) for group, choice in entry.items()}


def _choices(config_dir: str | None) -> dict[str, dict[str, str]]:
    """Group -> choice -> the text of its file; a choice of the user's may not hide one of ours."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise SettingError(f"--config-dir={config_dir!r}: must be a folder that is there")
    found: dict[str, dict[str, str]] = {}
    for group in GROUPS:
        ours = resources.files("weft.configs").joinpath(group)
        found[group] = {entry.name[:-5]: entry.read_text() for entry in ours.iterdir() if entry.name.endswith(".yaml")}
        for file in sorted(Path(config_dir, group).glob("*.yaml")) if config_dir else ():
            if file.stem in found[group]:
                raise SettingError(f"--config-dir={config_dir!r}: {group}/{file.name} must have another name: weft has it")
            found[group][file.stem] = file.read_text()
    return found


def _split(override: str) -> tuple[str, str, str | None]:
    match = _KEY.match(override)
    if match is None or (match["value"] is None and match["sign"] != "~"):
        raise SettingError(f"{override!r}: must be group=choice or setting=value (weft --help lists them)")
    return match["sign"] or "", match["key"], match["value"]


def _choice(group: str, value: str, choices: Mapping[str, str]) -> str:
    if value in choices:
        return value
    close = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    own = "; a folder of your own: model.path=FOLDER" if group == "model" else "; --config-dir DIR adds your own"
    raise SettingError(f"{group}={value}: there is no such choice{hint} (there are: {', '.join(sorted(choices))}{own})")


def _check_key(override: str, sign: str, key: str, chosen: Mapping[str, Any]) -> None:
    """A misspelt section or adapter would make a new one, where the user meant another."""
    parts = key.split(".")
    if parts[0] not in SECTIONS:
        raise SettingError(unknown(parts[0], list(SECTIONS), "", adapter_settings()))
    adapters = chosen.get("adapters")
    if parts[0] != "adapters" or len(parts) < 2 or sign in ("+", "++"):
        return
    names = list(adapters) if isinstance(adapters, Mapping) else []
    if isinstance(adapters, list):
        raise SettingError(f"{override}: must not be set here where adapters is a list; use every.{'.'.join(parts[2:])}")
    if parts[1] not in names:
        raise SettingError(f"{unknown(parts[1], names, 'adapters')}; +{override} adds an adapter")


def _check_environment(groups: Sequence[str], chosen: Mapping[str, Any]) -> None:
    """environment=... fills the template; if no adapter takes it from there, the choice would be ignored."""
    picked = [group for group in groups if group.startswith("environment=")]
    adapters = chosen.get("adapters")
    own = list(adapters.values()) if isinstance(adapters, Mapping) else adapters or []
    if picked and own and all(isinstance(one, Mapping) and "target" in (one.get("environment") or {}) for one in own):
        rule = "must not be chosen here, where every adapter names its own environment; set every.environment.target instead"
        raise SettingError(f"{picked[0]}: {rule}")


def _check_grammar(override: str) -> None:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        text = " ".join(str(error).split("See https")[0].split())
        raise SettingError(f"{override.lstrip('+')}: cannot be read ({text}); quote the value, as in key='\"a, b\"'") from None
    if parsed.is_sweep_override():
        key = parsed.get_key_element().lstrip("+")
        hint = f"a list is {key}=[a,b]; sweep.{key.rsplit('.', 1)[-1]}=[a,b] tries both"
        raise SettingError(f"{override.lstrip('+')}: must be one value; {hint}")


def _load(overrides: list[str], config_dir: str | None, complete: bool) -> dict[str, Any]:
    """complete: every value that a file leaves open (???) has to be given."""
    path = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"] if config_dir else []
    try:
        with initialize_config_module("weft.configs", version_base="1.3"):
            composed = hydra_compose("run", overrides=path + overrides)
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=complete, throw_on_missing=complete))
    except MissingMandatoryValue as error:
        raise SettingError(f"{error.full_key} is not set: it has no default") from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        prefix = "two settings or adapters of one name" if "duplicate key" in text else " ".join(overrides) or "configuration"
        raise SettingError(f"{prefix}: {text}") from None


def _comment(text: str) -> str:
    lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0] if lines else ""
