"""From the configuration to an environment, with everything that can be wrong said before anything starts."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from weft.actors.blame import shown
from weft.actors.environment import Environment, Prompt

BUILT_IN = {
    "calculator": "weft.actors.environments.calculator.Calculator",
    "reasoning_gym": "weft.actors.environments.reasoning_gym.ReasoningGym",
    "jsonl": "weft.actors.environments.jsonl.Jsonl",
}
MAX_PROMPTS = 2**24  # each epoch has a shuffle of them in memory: 128 MB
MEMBERS = ("num_prompts", "prompt", "respond")  # of the protocol


def load_environment(target: str, settings: Mapping[str, Any]) -> Environment:
    """Import `target` (a built-in name or a dotted path) and build it from `settings` as keyword arguments.

    Raises ValueError, naming target or setting, if it does not import, does not take these settings, refuses one of them, or
    does not fit the Environment protocol (says which members it lacks, or how its first prompt is wrong).
    """
    factory = _import(target)
    _check_settings(target, factory, settings)
    with _blamed_on(target):  # the settings are to blame first
        environment = factory(**settings)
    _check_fit(target, environment)
    return environment  # type: ignore[no-any-return]


def _import(target: str) -> Any:
    path = BUILT_IN.get(target, target)
    module, _, name = path.rpartition(".")
    if not module:
        close = difflib.get_close_matches(target, BUILT_IN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"environment.target={target!r}: must be one of {', '.join(BUILT_IN)}, or a dotted path{hint}")
    with _blamed_on(target, f"module {module!r} does not import: "):
        imported = importlib.import_module(module)
        found = getattr(imported, name, None)
    if not callable(found):
        raise ValueError(f"environment.target={target!r}: module {module!r} has no class {name!r}")
    return found


def _check_settings(target: str, factory: Any, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [name for name, p in parameters.items() if p.kind not in positional]
    for name in settings:
        if name not in names and not takes_any:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"environment.settings.{name}: {target} has no such setting{hint} (it has {', '.join(names)})")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in settings:
            raise ValueError(f"environment.settings.{name} is not set: {target} needs it")


def num_prompts(environment: Environment) -> int | None:
    """The environment's, as a plain int, whatever integer it is. Raises ValueError for what is none, is not above 0, or is more
    than can be shuffled."""
    count = environment.num_prompts
    if count is None:
        return None
    try:
        whole = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"num_prompts={shown(count, repr)}: must be an integer above 0, or None for endless")
    if whole > MAX_PROMPTS:
        raise ValueError(f"num_prompts={shown(count, repr)}: must be at most {MAX_PROMPTS}; None is endless, and in order")
    return whole


def _check_fit(target: str, environment: Any) -> None:
    with _blamed_on(target, "num_prompts raised "):
        lacks = [member for member in MEMBERS if not hasattr(environment, member)]
    if lacks:
        raise ValueError(f"environment.target={target!r}: does not fit the Environment protocol: lacks {', '.join(lacks)}")
    if not inspect.iscoroutinefunction(environment.respond):
        raise ValueError(f"environment.target={target!r}: respond must be an async function")
    with _blamed_on(target, "num_prompts raised "):
        environment.num_prompts  # noqa: B018  it may be a property
    with _blamed_on(target):
        num_prompts(environment)
    with _blamed_on(target, "prompt(0, False) raised "):
        prompt = environment.prompt(0, False)
        fits = isinstance(prompt, Prompt) and len(prompt.messages) > 0
    if not fits:
        said = shown(prompt, repr)
        raise ValueError(f"environment.target={target!r}: prompt(0, False) returned {said}: must be a Prompt with messages")


@contextmanager
def _blamed_on(target: str, what: str = "") -> Iterator[None]:
    """Whatever a user's code raises, a sys.exit() among it, as one ValueError of the target's."""
    try:
        yield
    except BaseException as error:  # a user's code may raise anything
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # somebody's Ctrl-C
        raise ValueError(f"environment.target={target!r}: {what}{_say(error)}") from error


def _say(error: BaseException) -> str:
    return shown(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {shown(error)}"
