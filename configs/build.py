"""Mappings to frozen dataclasses: every message names the setting by its dotted path, its value and the rule."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, Union

T = TypeVar("T")


class SettingError(ValueError):
    """A setting that cannot be: the message names the setting, its value and the rule."""


def build(cls: type[T], settings: Mapping[str, Any], path: str = "") -> T:
    """Build `cls` (a dataclass) from a nested mapping of plain values.

    Raises SettingError for an unknown name, a value of the wrong type, or one that `cls` refuses.
    """
    if not isinstance(settings, Mapping):
        raise SettingError(f"{path or cls.__name__}={settings!r}: must be a mapping of settings")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in settings:
        if name not in fields:
            raise SettingError(unknown(str(name), list(fields), path, leaves(cls)))
    hints = typing.get_type_hints(cls)
    values = {name: convert(value, hints[name], _join(path, name)) for name, value in settings.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise SettingError(f"{_join(path, missing[0])} is not set: it has no default")
    try:
        return cls(**values)
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"{path}.{error}" if path else str(error)) from None


def unknown(name: str, known: list[str], path: str = "", settings: Iterable[str] = ()) -> str:
    """The message for a misspelt name, with the nearest known one. settings: by their dotted paths, those that may be meant by
    the last part alone."""
    meant = [one for one in settings if one.rpartition(".")[2] == name] or difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    there = f" (known here: {', '.join(sorted(known))})" if known else " (there is none here)"
    return f"{_join(path, name)}: unknown setting{hint}{there}"


def leaves(cls: type, path: str = "") -> Iterator[str]:
    """The dotted path of every setting of a dataclass and the dataclasses it holds."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        here = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], here)
        else:
            yield here


def convert(value: Any, hint: Any, path: str) -> Any:
    """Give `value` the type `hint`, or raise SettingError; whole floats pass as int, ints as float, lists as tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        return convert(value, inner[0], path)
    if hint is Any:
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, path)
    if origin in (dict, Mapping) or str(origin).endswith("abc.Mapping"):
        if not isinstance(value, Mapping):
            raise SettingError(f"{path}={value!r}: must be a mapping")
        return {str(key): convert(item, arguments[1], _join(path, str(key))) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    return _convert_scalar(value, hint, path)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        value = [value]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(convert(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise SettingError(f"{path}={list(value)!r}: must have {len(arguments)} values")
    return tuple(convert(item, kind, f"{path}[{i}]") for i, (item, kind) in enumerate(zip(value, arguments, strict=True)))


def _convert_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise SettingError(f"{path}={value!r}: must be a finite number")
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SettingError(f"{path}={value!r}: must be a whole number of 64 bits")
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise SettingError(f"{path}={value!r}: must be of type {kind.__name__}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
