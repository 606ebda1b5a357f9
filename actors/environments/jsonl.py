"""Your own prompts and answers: one JSON object a line, checked line by line before anything starts."""

from __future__ import annotations

import heapq
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from weft.actors.environment import ChatMessage, Prompt, Reply
from weft.actors.environments.answer import extract_answer, last_number, same_number, to_number
from weft.actors.environments.chat import with_system
from weft.actors.environments.split import check_fraction, is_held_out

MATCHES = ("exact", "numeric", "regex")
SHIPPED = "weft:"  # path="weft:larger.jsonl" is the file that lies beside this one
LONGEST = 64  # rows of a side that are looked at before a run: in tokens the longest is one of the longest in bytes
Row = Mapping[str, Any]
Reward = Callable[[str, Row], Any]


class Jsonl:
    """path: the file, or "weft:NAME" for one that ships with weft. prompt_field: a text, or a list of chat messages.

    match: exact (the answer's text, spaces at the ends aside), numeric (the last number of what the model wrote), or regex
    (the answer field is a pattern that must be found in it). reward: instead of a match, the dotted path of a function
    (completion: str, row: dict) -> number, sync or async; the answer field is then not needed. With a match, the model's
    answer is what stands in <answer></answer> or after "Answer:", else all of its text (answer.py). system: text of a system
    turn, if any. chat_template_kwargs: what else the chat template reads ({"enable_thinking": False}).
    """

    def __init__(
        self,
        *,
        path: str,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        match: str = "exact",
        reward: str | None = None,
        held_out_fraction: float = 0.1,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if match not in MATCHES:
            raise ValueError(f"match={match!r}: must be one of {', '.join(MATCHES)}")
        check_fraction(held_out_fraction)
        self._prompt_field, self._answer_field, self._match, self._system = prompt_field, answer_field, match, system
        self._chat_template_kwargs = chat_template_kwargs
        self._reward = None if reward is None else import_reward(reward)
        file = Path(__file__).parent / path.removeprefix(SHIPPED) if path.startswith(SHIPPED) else Path(path)
        sides = _split(self._read(file), prompt_field, held_out_fraction)
        for side, rows in zip(("training", "held-out"), sides, strict=True):
            if not rows:
                raise ValueError(f"held_out_fraction={held_out_fraction!r}: leaves no {side} row in {path}")
        self._training, self._held_out = sides
        self._path, self._fraction = path, held_out_fraction
        self._longest: dict[bool, list[int]] = {}

    @property
    def num_prompts(self) -> int:
        """Training rows of the file."""
        return len(self._training)

    def reused(self, prompts: int) -> str:
        """What to say of so many held-out prompts where the rows are fewer; empty where they are not."""
        rows = len(self._held_out)
        if prompts <= rows:
            return ""
        told = f"{rows} held-out row{'s' * (rows > 1)} (held_out_fraction={self._fraction:g})"
        return f"{self._path} has {told}, fewer than eval_prompts={prompts}: they are asked again"

    def longest(self, held_out: bool) -> list[int]:
        """Of one side the rows with the longest prompts, some dozens."""
        if held_out not in self._longest:  # every adapter of the task asks
            rows = self._held_out if held_out else self._training
            texts = (json.dumps(row[self._prompt_field], ensure_ascii=False) for row in rows)
            lengths = [len(text.encode(errors="surrogatepass")) for text in texts]
            self._longest[held_out] = heapq.nlargest(LONGEST, range(len(rows)), key=lengths.__getitem__)
        return self._longest[held_out]

    def prompt(self, index: int, held_out: bool) -> Prompt:
        """Row `index` of one side, in the file's order, round and round."""
        rows = self._held_out if held_out else self._training
        row = rows[index % len(rows)]
        text = row[self._prompt_field]
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return Prompt(with_system(self._system, messages), answer=row, chat_template_kwargs=self._chat_template_kwargs)

    async def respond(self, prompt: Prompt, turns: Sequence[ChatMessage]) -> Reply:
        """One turn: 1.0 for a match, or what the user's function says."""
        completion = str(turns[-1]["content"])
        if self._reward is None:
            return Reply(done=True, reward=float(self._matches(extract_answer(completion), prompt.answer[self._answer_field])))
        reward = self._reward(completion, prompt.answer)
        if inspect.isawaitable(reward):
            reward = await reward
        if not isinstance(reward, SupportsFloat) or not math.isfinite(reward):
            raise TypeError(f"the reward function returned {reward!r}: must be a finite number")
        return Reply(done=True, reward=float(reward))

    def _matches(self, said: str, answer: Any) -> bool:
        if self._match == "exact":
            return said == str(answer).strip()
        if self._match == "regex":
            return re.search(str(answer), said) is not None
        number, right = last_number(said), to_number(answer)
        return number is not None and right is not None and same_number(number, right)

    def _read(self, file: Path) -> list[Row]:
        if not file.is_file():
            raise ValueError(f"path={str(file)!r}: there is no such file")
        rows = []
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if line.strip():
                try:
                    rows.append(self._checked(line))
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from None
        return rows

    def _checked(self, line: bytes) -> Row:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8") from None
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"is a {type(row).__name__}, must be a JSON object")
        needed = (self._prompt_field,) if self._reward is not None else (self._prompt_field, self._answer_field)
        for field in needed:
            if field not in row:
                raise ValueError(f"lacks the field {field!r} (it has {', '.join(map(repr, row)) or 'none'})")
        _check_prompt(self._prompt_field, row[self._prompt_field])
        if self._reward is None:
            self._check_answer(row[self._answer_field])
        return row

    def _check_answer(self, answer: Any) -> None:
        if not isinstance(answer, (str, int, float)):
            raise ValueError(f"{self._answer_field}={answer!r}: must be text or a number")
        if self._match == "numeric" and to_number(answer) is None:
            raise ValueError(f"{self._answer_field}={answer!r}: match=numeric needs a number")
        if self._match == "regex":
            try:
                re.compile(str(answer))
            except re.error as error:
                raise ValueError(f"{self._answer_field}={answer!r}: is no regular expression: {error}") from None


def import_reward(path: str) -> Reward:
    """The function at a dotted path. Raises ValueError if there is none, or if it does not take (completion, row)."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind("", {})
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"reward={path!r}: must be the dotted path of a function (completion, row): {error}") from error
    return function  # type: ignore[no-any-return]


def _check_prompt(field: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        return
    chat = isinstance(prompt, list) and bool(prompt)
    if not chat or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in prompt):
        raise ValueError(f"{field}={prompt!r}: must be text, or a list of messages with role and content")


def _split(rows: Sequence[Row], prompt_field: str, fraction: float) -> tuple[list[Row], list[Row]]:
    """(training, held-out), by the text of the prompt: equal prompts stay together."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(json.dumps(row[prompt_field], sort_keys=True), fraction)].append(row)
    return sides
