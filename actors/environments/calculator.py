"""Word problems as tool use: the model calls Calculator as often as it likes, then FinalAnswer, which ends the episode.

    user       Ann has 34 coins, finds 21. How many now?
    assistant  <tool_call>{"name": "Calculator", "arguments": {"expression": "34+21"}}</tool_call>
    tool       55
    assistant  <tool_call>{"name": "FinalAnswer", "arguments": {"answer": 55}}</tool_call>

Calls have the form that Qwen and Hermes models are trained on. Only FinalAnswer with the right value is worth 1.0; to answer
in words, without a call, ends the episode with 0. A call that cannot be understood is answered by an error, and may be mended.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.actors.environment import ChatMessage, Prompt, Reply
from weft.actors.environments.answer import same_number, to_number
from weft.actors.environments.arithmetic import evaluate, show
from weft.actors.environments.chat import with_system
from weft.actors.environments.split import check_fraction, pick

NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
NOUNS = ("apples", "books", "cards", "coins", "pens", "shells")
EVENTS = {
    "+": ("buys {}", "finds {}", "gets {} more"),
    "-": ("gives away {}", "loses {}", "sells {}"),
    "*": ("ends up with {} times as many",),
    "/": ("keeps one of every {}",),
}
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|$)", re.DOTALL)
_STREAM = 2**61 - 1  # problems are drawn from this many seeds


def _tool(name: str, description: str, parameter: str, kind: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {parameter: {"type": kind}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    _tool("Calculator", "The value of an arithmetic expression.", "expression", "string"),
    _tool("FinalAnswer", "Gives the answer and ends.", "answer", "number"),
)


@dataclass(frozen=True)
class Problem:
    """text: what the model reads. steps: the expressions that lead to `value`, one an operation."""

    text: str
    steps: tuple[str, ...]
    value: int


@dataclass(frozen=True)
class Call:
    """One tool call as the model wrote it; `error` says why it cannot be understood."""

    name: str = ""
    arguments: Mapping[str, Any] | None = None
    error: str = ""


class Calculator:
    """operations: how many in a problem. low, high: the range of its numbers. max_factor: of times and division.
    operators: those in use, of "+-*/". system: text of a system turn, if any. chat_template_kwargs: what else the chat template
    reads."""

    def __init__(
        self,
        *,
        operations: int = 1,
        operators: str = "+-*",
        low: int = 2,
        high: int = 99,
        max_factor: int = 9,
        held_out_fraction: float = 0.1,
        seed: int = 0,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not 1 <= operations <= 8:
            raise ValueError(f"operations={operations!r}: must be from 1 to 8")
        if not operators or set(operators) - set(EVENTS):
            raise ValueError(f"operators={operators!r}: must be some of + - * /")
        if not 1 <= low < high:
            raise ValueError(f"low={low!r}, high={high!r}: must hold 1 <= low < high")
        if max_factor < 2:
            raise ValueError(f"max_factor={max_factor!r}: must be at least 2")
        check_fraction(held_out_fraction)
        self._operations, self._operators, self._low, self._high = operations, operators, low, high
        self._max_factor, self._fraction, self._seed, self._system = max_factor, held_out_fraction, seed, system
        self._chat_template_kwargs = chat_template_kwargs
        self.problem(0, held_out=True)  # too narrow a range leaves one side empty: say so now

    @property
    def num_prompts(self) -> None:
        """Endless."""
        return

    def prompt(self, index: int, held_out: bool) -> Prompt:
        """The word problem `index` of one side, with both tools."""
        problem = self.problem(index, held_out)
        messages = with_system(self._system, [{"role": "user", "content": problem.text}])
        return Prompt(messages, TOOLS, problem.value, self._chat_template_kwargs)

    def problem(self, index: int, held_out: bool) -> Problem:
        """The problem `index` of one side, with its solution."""
        return pick(self._draw, lambda problem: problem.text, index, held_out, self._fraction, _STREAM)

    async def respond(self, prompt: Prompt, turns: Sequence[ChatMessage]) -> Reply:
        """Runs the calls of the newest turn, in order."""
        calls = parse_calls(str(turns[-1]["content"]))
        outputs: list[ChatMessage] = []
        for call in calls:
            answer = _final_answer(call)
            if answer is not None:
                return self._end(turns, outputs, float(same_number(answer, prompt.answer)))
            outputs.append({"role": "tool", "name": call.name, "content": _output(call)})
        if not calls:
            return self._end(turns, outputs, 0.0)
        return Reply(tuple(outputs))

    def _end(self, turns: Sequence[ChatMessage], outputs: Sequence[ChatMessage], reward: float) -> Reply:
        tools = [message for message in (*turns, *outputs) if message["role"] == "tool"]
        errors = sum(str(message["content"]).startswith("error:") for message in tools)
        return Reply(done=True, reward=reward, metrics={"tool_calls": float(len(tools)), "tool_errors": float(errors)})

    def _draw(self, number: int) -> Problem:
        rng = random.Random(f"{self._seed}/{number}")  # a text seed: near numbers give unlike problems
        value = rng.randint(self._low, self._high)
        text = f"{rng.choice(NAMES)} has {value} {rng.choice(NOUNS)}"
        steps = []
        for _ in range(self._operations):
            operator, operand = self._operation(rng, value)
            steps.append(f"{value}{operator}{operand}")
            value = int(evaluate(steps[-1]))
            text += ", " + rng.choice(EVENTS[operator]).format(operand)
        return Problem(text + ". How many now?", tuple(steps), value)

    def _operation(self, rng: random.Random, value: int) -> tuple[str, int]:
        """An operator and operand that keep the value whole and at least 0; addition where the drawn one cannot."""
        operator = rng.choice(self._operators)
        if operator == "-" and value >= self._low:
            return operator, rng.randint(self._low, min(self._high, value))
        if operator == "*":
            return operator, rng.randint(2, self._max_factor)
        divisors = [d for d in range(2, self._max_factor + 1) if value % d == 0]
        if operator == "/" and divisors and value > 0:
            return operator, rng.choice(divisors)
        return "+", rng.randint(self._low, self._high)


def parse_calls(text: str) -> list[Call]:
    """Every tool call in `text`, in order; those that cannot be understood have an `error`."""
    return [_parse(body, bool(end)) for body, end in _CALL.findall(text)]


def _parse(body: str, closed: bool) -> Call:
    if not closed:
        return Call(error="the call has no </tool_call>")
    try:
        call = json.loads(body)
    except ValueError:
        return Call(error="the call is not JSON")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Call(error='the call needs a "name"')
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return Call(call["name"], error='"arguments" must be an object')
    return Call(call["name"], arguments)


def _final_answer(call: Call) -> float | None:
    """The number, if this is a FinalAnswer that can be understood."""
    if call.error or call.name != "FinalAnswer" or call.arguments is None:
        return None
    return to_number(call.arguments.get("answer"))


def _output(call: Call) -> str:
    """What the model gets to read."""
    if call.error or call.arguments is None:
        return f"error: {call.error}"
    if call.name == "FinalAnswer":
        return 'error: "answer" must be a number'
    if call.name != "Calculator":
        return f"error: there is no tool {call.name!r}, only Calculator and FinalAnswer"
    expression = call.arguments.get("expression")
    if not isinstance(expression, str):
        return 'error: "expression" must be a string'
    try:
        return show(evaluate(expression))
    except ValueError as error:
        return f"error: {error}"
