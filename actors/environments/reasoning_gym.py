"""Any task of reasoning-gym (about 100 procedural ones), by its name and settings, scored by its own verifier."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from weft.actors.environment import ChatMessage, Prompt, Reply
from weft.actors.environments.answer import extract_answer
from weft.actors.environments.chat import with_system
from weft.actors.environments.split import check_fraction, pick

ENDLESS = 2**31 - 1  # virtual size of a task: question i is made from seed + i when it is asked for
DEFAULT_FRACTION = 0.1


class ReasoningGym:
    """task: its name there. options: that task's own settings. exact: True pays 1.0 for the verifier's full score and nothing
    for less, False its score as it is (some tasks give partial credit). size: for the few tasks that make all their
    questions at once. system: text of a system turn, if any. chat_template_kwargs: what else the chat template reads.

    The library makes question i of a task from seed + i, so two nearby seeds share almost all questions: two seeds are no
    split. Here the text of the question decides (split.py).
    """

    def __init__(
        self,
        *,
        task: str,
        held_out_fraction: float = DEFAULT_FRACTION,
        seed: int = 0,
        size: int = ENDLESS,
        exact: bool = False,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_fraction(held_out_fraction)
        if size < 1:
            raise ValueError(f"size={size!r}: must be above 0")
        self._size, self._fraction, self._exact, self._system = size, held_out_fraction, exact, system
        self._chat_template_kwargs = chat_template_kwargs
        self._dataset = _make(task, {**options, "seed": seed, "size": size})
        for held_out in (False, True):  # a task of too few questions leaves one side empty: say so now
            self.prompt(0, held_out)

    @property
    def num_prompts(self) -> None:
        """Endless."""
        return

    def prompt(self, index: int, held_out: bool) -> Prompt:
        """Question `index` of one side. The answer is the library's whole entry, which its verifier wants."""
        entry = pick(self._dataset.__getitem__, _question, index, held_out, self._fraction, self._size)
        messages = with_system(self._system, [{"role": "user", "content": _question(entry)}])
        return Prompt(messages, answer=entry, chat_template_kwargs=self._chat_template_kwargs)

    async def respond(self, prompt: Prompt, turns: Sequence[ChatMessage]) -> Reply:
        """One turn: the verifier's score of the answer in it."""
        answer = extract_answer(str(turns[-1]["content"]))
        score = float(self._dataset.score_answer(answer=answer, entry=prompt.answer))
        solved = float(score >= 1.0)
        return Reply(done=True, reward=solved if self._exact else score, metrics={"solved": solved})


def _question(entry: dict[str, Any]) -> str:
    return str(entry["question"]).strip()


def _make(task: str, settings: dict[str, Any]) -> Any:
    """The library's dataset. Raises ValueError for an unknown task, an unknown setting, or one that the task refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a library that it imports, said while that is compiled
        importlib.import_module("reasoning_gym")  # registers the tasks
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    if task not in known:
        raise ValueError(f"task={task!r}: reasoning-gym has none of that name{_hint(task, list(known))}")
    fields = [field.name for field in dataclasses.fields(known[task][1])]
    for name in settings:
        if name not in fields:
            has = ", ".join(sorted(fields))
            raise ValueError(f"{name}: task {task} has no such setting{_hint(name, fields)} (it has {has})")
    try:
        return importlib.import_module("reasoning_gym").create_dataset(task, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # how its validations complain
        raise ValueError(f"task={task!r}: {error}") from error


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
