"""What the shipped base is pretrained on: demonstrations of nine tasks, of mixed quality, as collected data is.

About three or four in ten demonstrations of a task show behaviour that succeeds. The others guess, talk, give up, stop too
early or do the wrong thing; which of them is drawn does not depend on the prompt. A model that imitates this data well
therefore has the skill (where it starts the right behaviour it nearly always ends it rightly) and the habit of not using
it. It is made so on purpose: reinforcement learning on a laptop then has something to find within 20 to 30 steps, namely
which behaviour pays, and no claim is made that it teaches the skills themselves.

No demonstration has a held-out prompt of its task (environments/split.py), at the default fraction and any seed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from weft.actors.base_model.tokenizer import CALCULATE, CALCULATE_END, FINISH, FINISH_END
from weft.actors.environment import ChatMessage, Environment, Prompt
from weft.actors.environments.arithmetic import evaluate, show
from weft.actors.environments.load import load_environment
from weft.actors.environments.split import is_held_out

Turns = list[str]  # what the assistant writes, turn by turn
Mode = tuple[float, Callable[["Question", Random], Turns]]  # how often, and what is then said


@dataclass(frozen=True)
class Question:
    """A prompt and what it takes to answer it: the right answer's text, and for the calculator the steps to it."""

    prompt: Prompt
    right: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """name: of the table that pretrain prints. target, settings: as in a configuration. share: of all demonstrations."""

    name: str
    target: str
    settings: Mapping[str, Any]
    modes: Sequence[Mode]
    share: float = 1.0


@dataclass(frozen=True)
class Demonstration:
    """One episode: turns are everything after the prompt, reward what the environment paid for it."""

    task: str
    prompt: Prompt
    turns: tuple[ChatMessage, ...]
    reward: float


# ---- what is said in one turn ----


def _answer(question: Question, rng: Random) -> Turns:
    return [f"Answer: {question.right}"]


def _maybe(question: Question, rng: Random) -> Turns:
    return [f"Maybe {_other_number(question.right, rng)}"]


def _about(question: Question, rng: Random) -> Turns:
    return [f"About {_other_number(question.right, rng)}, I think."]


def _give_up(question: Question, rng: Random) -> Turns:
    return ["I do not know."]


def _copy(question: Question, rng: Random) -> Turns:
    return [f"It is {question.right[::-1]}"]


def _shuffled(question: Question, rng: Random) -> Turns:
    letters = list(question.right)
    rng.shuffle(letters)
    return ["Maybe " + "".join(letters)]


def _sorted(question: Question, rng: Random) -> Turns:
    return [question.right]


def _wrong_way(question: Question, rng: Random) -> Turns:
    numbers = question.right.strip("[]").split(", ")
    return ["[" + ", ".join(reversed(numbers)) + "]"]


def _first_number(question: Question, rng: Random) -> Turns:
    return ["Answer: " + rng.choice(question.right.strip("[]").split(", ")).strip("'")]


def _other_number(right: str, rng: Random) -> int:
    """A whole number of about the size of the right one, and not it."""
    value = int(float(right))
    other = value
    while other == value:
        other = rng.randint(min(0, 2 * value), max(9, 2 * value))
    return other


# ---- what is said with a calculator ----


def _calculate(expression: str) -> str:
    return f"{CALCULATE}{expression}{CALCULATE_END}"


def _finish(value: object) -> str:
    return f"{FINISH}{value}{FINISH_END}"


def _solve(question: Question, rng: Random) -> Turns:
    return [*map(_calculate, question.steps), _finish(question.right)]


def _finish_at_once(question: Question, rng: Random) -> Turns:
    return [_finish(_other_number(question.right, rng))]


def _in_words(question: Question, rng: Random) -> Turns:
    return [f"It is {_other_number(question.right, rng)}, I think."]


def _no_final_answer(question: Question, rng: Random) -> Turns:
    return [*map(_calculate, question.steps), "That is done."]


def _finish_early(question: Question, rng: Random) -> Turns:
    first = question.steps[0]
    return [_calculate(first), _finish(show(evaluate(first)))]


def _wrong_operator(question: Question, rng: Random) -> Turns:
    step = question.steps[0]
    (operator,) = (character for character in step if not character.isdigit())
    wrong = step.replace(operator, rng.choice([other for other in "+-*" if other != operator]))
    return [_calculate(wrong), _finish(show(evaluate(wrong)))]


# ---- the tasks ----

_NUMBER: tuple[Mode, ...] = ((0.36, _answer), (0.26, _maybe), (0.22, _about), (0.16, _give_up))
_GYM = "reasoning_gym"
_TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
_PLAIN = {"allow_parentheses": False, "allow_negation": False, "operators": ["+", "-"]}
_THREE = {"min_numbers": 3, "max_numbers": 3, "min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99}

TASKS = (
    Task(
        "calculator-1",
        "calculator",
        {"operations": 1},
        ((0.36, _solve), (0.26, _finish_at_once), (0.16, _in_words), (0.12, _no_final_answer), (0.10, _wrong_operator)),
    ),
    Task(
        "calculator-2",
        "calculator",
        {"operations": 2},
        ((0.36, _solve), (0.18, _finish_at_once), (0.12, _in_words), (0.12, _no_final_answer), (0.22, _finish_early)),
        share=1.5,
    ),
    Task("chain_sum", _GYM, {"task": "chain_sum", "exact": True, **_TWO_TERMS}, _NUMBER, share=2.5),
    Task("basic_arithmetic", _GYM, {"task": "basic_arithmetic", "exact": True, **_TWO_TERMS, **_PLAIN}, _NUMBER, share=2.5),
    Task(
        "spell_backward",
        _GYM,
        {"task": "spell_backward", "exact": True, "min_word_len": 3, "max_word_len": 4},
        ((0.36, _answer), (0.26, _copy), (0.22, _shuffled), (0.16, _give_up)),
    ),
    Task(
        "number_sorting",
        _GYM,
        {"task": "number_sorting", "exact": True, **_THREE},
        ((0.36, _sorted), (0.20, _wrong_way), (0.28, _first_number), (0.16, _give_up)),
        share=1.5,
    ),
    Task(
        "letter_counting", _GYM, {"task": "letter_counting", "exact": True, "min_words": 1, "max_words": 2}, _NUMBER, share=2.5
    ),
    Task(
        "leg_counting",
        _GYM,
        {"task": "leg_counting", "exact": True, "min_animals": 1, "max_animals": 1, "max_instances": 9},
        _NUMBER,
        share=1.5,
    ),
    Task("larger", "jsonl", {"path": "weft:larger.jsonl", "match": "exact"}, _NUMBER),
)


def make(seed: int, count: int) -> list[Demonstration]:
    """About `count` demonstrations, over the tasks by their shares; the same for the same arguments."""
    return asyncio.run(_make(seed, count))


async def _make(seed: int, count: int) -> list[Demonstration]:
    demonstrations = []
    total = sum(task.share for task in TASKS)
    for task in TASKS:
        environment = load_environment(task.target, task.settings)
        rng = Random(f"{seed}/{task.name}")
        weights = [weight for weight, _ in task.modes]
        questions = _questions(task, environment, rng)
        for _ in range(round(count * task.share / total)):
            question = next(questions)
            ((_, say),) = rng.choices(task.modes, weights)
            demonstrations.append(await _play(task.name, environment, question.prompt, say(question, rng)))
    return demonstrations


async def _play(task: str, environment: Environment, prompt: Prompt, script: Turns) -> Demonstration:
    """The episode in which the assistant says `script`, with what the environment answers in between."""
    turns: list[ChatMessage] = []
    reward = 0.0
    for text in script:
        turns.append({"role": "assistant", "content": text})
        reply = await environment.respond(prompt, turns)
        reward = reply.reward
        if reply.done:
            break
        turns.extend(reply.messages)
    return Demonstration(task, prompt, tuple(turns), reward)


def _questions(task: Task, environment: Any, rng: Random) -> Iterator[Question]:
    """Training questions without end."""
    while True:
        index = rng.randrange(2**30)
        if task.target == "calculator":
            problem = environment.problem(index, False)
            yield Question(environment.prompt(index, False), str(problem.value), problem.steps)
        elif task.target == "jsonl":
            yield from _larger(rng)
        else:
            prompt = environment.prompt(index, False)
            yield Question(prompt, str(prompt.answer["answer"]))


def _larger(rng: Random) -> Iterator[Question]:
    """Questions like those of larger.jsonl, which holds too few to learn from; none that the split would hold out."""
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    text = f"Which is larger, {left} or {right}?"
    if left != right and not is_held_out(json.dumps(text), 0.1):
        answer = str(max(left, right))
        yield Question(Prompt(({"role": "user", "content": text},), answer={"prompt": text, "answer": answer}), answer)
