"""Laws of the environments: prompts, rewards, and what a user can get wrong."""

import asyncio
import contextlib
import json
import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.actors.environment import Environment, Prompt, Reply
from weft.actors.environments.answer import extract_answer, last_number
from weft.actors.environments.arithmetic import evaluate, show
from weft.actors.environments.calculator import TOOLS, Calculator, parse_calls
from weft.actors.environments.jsonl import Jsonl
from weft.actors.environments.load import load_environment, num_prompts
from weft.actors.environments.split import is_held_out

BUILT_IN = [
    ("calculator", {"operations": 1}),
    ("calculator", {"operations": 3, "operators": "+-*/"}),
    ("reasoning_gym", {"task": "chain_sum", "max_terms": 2, "max_digits": 2}),
    ("reasoning_gym", {"task": "spell_backward", "max_word_len": 4, "exact": True}),
    (
        "reasoning_gym",
        {"task": "word_ladder", "size": 50, "min_word_length": 3, "max_word_length": 3, "held_out_fraction": 0.3},
    ),
    ("jsonl", {"path": "weft:larger.jsonl", "match": "numeric"}),
]


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def respond(environment: Environment, prompt: Prompt, *turns: str | dict[str, str]) -> Reply:
    """The reply to these turns; a text is a turn of the model, and the tools' messages are given."""
    messages = [turn if isinstance(turn, dict) else {"role": "assistant", "content": turn} for turn in turns]
    return asyncio.run(environment.respond(prompt, messages))


def text_of(prompt: Prompt) -> str:
    return json.dumps(list(prompt.messages), sort_keys=True)


@pytest.mark.parametrize(("target", "settings"), BUILT_IN)
def test_no_prompt_is_on_both_sides_and_an_index_always_means_the_same(target: str, settings: dict) -> None:
    environment, again = load_environment(target, settings), load_environment(target, settings)
    training = [text_of(environment.prompt(i, False)) for i in range(200)]
    held_out = [text_of(environment.prompt(i, True)) for i in range(60)]
    assert not set(training) & set(held_out)
    assert training[::50] == [text_of(again.prompt(i, False)) for i in range(0, 200, 50)]
    assert held_out[7] == text_of(again.prompt(7, True))
    assert len(set(training)) > 20


def test_the_split_is_the_same_for_every_seed() -> None:
    sides = [load_environment("reasoning_gym", {"task": "chain_sum", "max_digits": 1, "seed": seed}) for seed in (0, 1, 2)]
    training = {text_of(side.prompt(i, False)) for side in sides for i in range(300)}
    held_out = {text_of(side.prompt(i, True)) for side in sides for i in range(100)}
    assert not training & held_out


def test_about_the_asked_fraction_is_held_out() -> None:
    assert 150 < sum(is_held_out(f"prompt {i}", 0.2) for i in range(1000)) < 250


# ---- calculator ----


@given(st.integers(1, 8), st.sampled_from(["+", "-", "*", "/", "+-", "+-*/"]), st.integers(0, 10_000), st.booleans())
def test_the_steps_of_a_problem_lead_to_its_value(operations: int, operators: str, index: int, held_out: bool) -> None:
    problem = Calculator(operations=operations, operators=operators).problem(index, held_out)
    values = [evaluate(step) for step in problem.steps]
    assert len(values) == operations and values[-1] == problem.value >= 0
    assert all(step.startswith(show(value)) for value, step in zip(values, problem.steps[1:], strict=False))


def test_calculator_pays_only_a_right_final_answer() -> None:
    environment = Calculator(operations=1)
    prompt, problem = environment.prompt(3, False), environment.problem(3, False)
    first = respond(environment, prompt, call("Calculator", expression=problem.steps[0]))
    assert not first.done
    assert first.messages == ({"role": "tool", "name": "Calculator", "content": str(problem.value)},)
    asked = (call("Calculator", expression=problem.steps[0]), dict(first.messages[0]))
    right = respond(environment, prompt, *asked, call("FinalAnswer", answer=problem.value))
    assert (right.done, right.reward, right.metrics["tool_calls"]) == (True, 1.0, 1.0)
    assert respond(environment, prompt, *asked, call("FinalAnswer", answer=f"{problem.value}.0")).reward == 1.0
    wrong = respond(environment, prompt, *asked, call("FinalAnswer", answer=problem.value + 1))
    assert (wrong.done, wrong.reward) == (True, 0.0)
    words = respond(environment, prompt, *asked, f"It is {problem.value}.")
    assert (words.done, words.reward) == (True, 0.0)


def test_two_calls_in_one_turn_run_in_order() -> None:
    environment = Calculator()
    prompt = environment.prompt(0, False)
    both = call("Calculator", expression="1+1") + call("FinalAnswer", answer=prompt.answer)
    assert respond(environment, prompt, both).reward == 1.0
    two = respond(environment, prompt, call("Calculator", expression="2*3") + call("Calculator", expression="7/2"))
    assert [message["content"] for message in two.messages] == ["6", "3.5"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<tool_call>{'name': 1}</tool_call>", "not JSON"),
        ("<tool_call>[1]</tool_call>", "name"),
        ('<tool_call>{"name": "Calculator"}</tool_call>', "arguments"),
        ('<tool_call>{"name": "Calculator", "arguments": {"expression": "1+1"}}', "no </tool_call>"),
        (call("Calculator"), "expression"),
        (call("Calculator", expression="__import__('os').getcwd()"), "only numbers"),
        (call("Calculator", expression="1 +"), "not an arithmetic expression"),
        (call("Calculator", expression="1/0"), "division by zero"),
        (call("Calculator", expression="9**9**9"), "too large"),
        (call("Calculator", expression="(" * 150 + ")" * 150), "longer than"),
        (call("FinalAnswer"), "number"),
        (call("FinalAnswer", answer="many"), "number"),
        (call("FinalAnswer", answer=True), "number"),
        ('<tool_call>{"name": "FinalAnswer", "arguments": {"answer": NaN}}</tool_call>', "number"),
        (call("Search", query="x"), "no tool"),
    ],
)
def test_a_call_that_cannot_be_understood_is_answered_by_an_error(text: str, says: str) -> None:
    environment = Calculator()
    reply = respond(environment, environment.prompt(0, False), text)
    assert not reply.done and reply.reward == 0.0
    (message,) = reply.messages
    assert message["role"] == "tool" and message["content"].startswith("error:") and says in message["content"]


def test_tools_are_json_schemas_that_a_chat_template_takes() -> None:
    assert [tool["function"]["name"] for tool in TOOLS] == ["Calculator", "FinalAnswer"]
    assert json.loads(json.dumps(TOOLS)) == list(TOOLS)
    assert parse_calls("no call here") == []


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from(["+", "-", "*", "//", "%"]), st.integers(0, 9))
def test_arithmetic_equals_pythons(left: int, right: int, operator: str, factor: int) -> None:
    expression = f"({left} {operator} {right}) * {factor} - -{abs(left)}"
    if right == 0 and operator in ("//", "%"):
        with pytest.raises(ValueError, match="division by zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == eval(expression)


@given(st.text(max_size=60))
def test_arithmetic_never_raises_anything_but_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert abs(evaluate(text)) <= 1e15


def test_arithmetic_shows_whole_numbers_without_a_point() -> None:
    assert [show(evaluate(text)) for text in ("6/2", "7/2", "1/3", "2**10", "2**-1", "-3")] == [
        "3",
        "3.5",
        "0.3333333333",
        "1024",
        "0.5",
        "-3",
    ]


# ---- reasoning-gym ----


def test_reasoning_gym_scores_by_the_tasks_own_verifier() -> None:
    environment = load_environment("reasoning_gym", {"task": "spell_backward", "min_word_len": 4, "max_word_len": 4})
    strict = load_environment("reasoning_gym", {"task": "spell_backward", "min_word_len": 4, "max_word_len": 4, "exact": True})
    prompt = environment.prompt(0, False)
    right = prompt.answer["answer"]
    assert respond(environment, prompt, f"Answer: {right}").reward == 1.0
    assert respond(environment, prompt, f"<think>hm</think> so <answer>{right}</answer>").metrics == {"solved": 1.0}
    half = right[:2] + "##"
    assert 0.0 < respond(environment, prompt, half).reward < 1.0
    assert respond(strict, prompt, half).reward == 0.0
    assert respond(strict, prompt, right).reward == 1.0
    assert respond(strict, prompt, "").reward == 0.0


@pytest.mark.parametrize("task", ["gcd", "products", "aiw", "basic_arithmetic", "number_sorting", "family_relationships"])
def test_reasoning_gym_tasks_pay_their_own_answers(task: str) -> None:
    environment = load_environment("reasoning_gym", {"task": task, "exact": True})
    for held_out in (False, True):
        prompt = environment.prompt(1, held_out)
        assert respond(environment, prompt, f"Answer: {prompt.answer['answer']}").reward == 1.0


# ---- jsonl ----


def write(path, *rows: object) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def grade(completion: str, row: dict) -> float:
    return float(completion == row["prompt"])


async def grade_async(completion: str, row: dict) -> float:
    return len(completion) / 4


def grade_in_numpy(completion: str, row: dict[str, Any]) -> Any:
    return np.float32(0.25) if completion else np.True_


def grade_badly(completion: str, row: dict) -> str:
    return "good"


@pytest.fixture
def graders(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which this module's functions can be imported."""
    monkeypatch.setitem(sys.modules, "graders_of_the_test", sys.modules[__name__])
    return "graders_of_the_test"


@pytest.mark.parametrize(
    ("match", "answer", "right", "wrong"),
    [
        ("exact", "Paris", "I say. Answer: Paris ", "paris"),
        ("exact", 4, "4", "4.0"),
        ("numeric", "1,200", "about 3, no: 1200.0.", "1201"),
        ("numeric", -2.5, "Answer: -2.5", "none"),
        ("regex", r"^(yes|Yes)\b", "Answer: Yes, it is", "No, yes"),
    ],
)
def test_jsonl_matches(tmp_path, match: str, answer: object, right: str, wrong: str) -> None:
    path = write(tmp_path / "rows.jsonl", *({"q": f"question {i}", "a": answer} for i in range(30)))
    settings = {"path": path, "prompt_field": "q", "answer_field": "a", "match": match, "held_out_fraction": 0.3}
    environment = load_environment("jsonl", settings)
    prompt = environment.prompt(0, False)
    assert respond(environment, prompt, right) == Reply(done=True, reward=1.0)
    assert respond(environment, prompt, wrong) == Reply(done=True, reward=0.0)


def test_jsonl_takes_chat_messages_and_goes_round_and_round(tmp_path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"hello {i}"}], "answer": ""} for i in range(40)]
    path = write(tmp_path / "rows.jsonl", *rows, "\n")
    environment = load_environment("jsonl", {"path": path, "held_out_fraction": 0.5, "system": "Be kind."})
    count = environment.num_prompts
    assert count is not None and 0 < count < 40
    assert environment.prompt(count, False) == environment.prompt(0, False)
    assert environment.prompt(0, False).messages[0] == {"role": "system", "content": "Be kind."}
    assert len({text_of(environment.prompt(i, True)) for i in range(100)}) == 40 - count


def test_jsonl_says_when_held_out_rows_are_fewer_than_are_asked_for(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"prompt": f"say {i}", "answer": i} for i in range(30)))
    environment = Jsonl(path=path, held_out_fraction=0.2)
    rows = 30 - environment.num_prompts
    assert [environment.reused(prompts) for prompts in (0, 1, rows)] == ["", "", ""]
    said = environment.reused(rows + 1)
    assert all(word in said for word in (path, f"{rows} held-out rows", "held_out_fraction=0.2", f"eval_prompts={rows + 1}"))


def test_jsonl_reward_functions_sync_and_async(tmp_path, graders: str) -> None:
    path = write(tmp_path / "rows.jsonl", *({"prompt": f"say {i}"} for i in range(30)))
    settings = {"path": path, "held_out_fraction": 0.3}
    environment = load_environment("jsonl", {**settings, "reward": f"{graders}.grade"})
    prompt = environment.prompt(0, False)
    assert respond(environment, prompt, prompt.answer["prompt"]).reward == 1.0
    slow = load_environment("jsonl", {**settings, "reward": f"{graders}.grade_async"})
    assert respond(slow, prompt, "ab").reward == 0.5
    array = load_environment("jsonl", {**settings, "reward": f"{graders}.grade_in_numpy"})
    assert [respond(array, prompt, said).reward for said in ("ab", "")] == [0.25, 1.0]
    bad = load_environment("jsonl", {**settings, "reward": f"{graders}.grade_badly"})
    with pytest.raises(TypeError, match="'good'"):
        respond(bad, prompt, "ab")


@pytest.mark.parametrize(
    ("line", "match", "says"),
    [
        ("{nope}\n", "exact", "is not JSON"),
        ("[1]\n", "exact", "must be a JSON object"),
        ('{"prompt": "x"}\n', "exact", "lacks the field 'answer'"),
        ('{"answer": "x"}\n', "exact", "lacks the field 'prompt'"),
        ('{"prompt": 3, "answer": "x"}\n', "exact", "must be text, or a list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": "x"}\n', "exact", "must be text, or a list of messages"),
        ('{"prompt": "x", "answer": null}\n', "exact", "must be text or a number"),
        ('{"prompt": "x", "answer": "many"}\n', "numeric", "needs a number"),
        ('{"prompt": "x", "answer": "("}\n', "regex", "no regular expression"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line: str, match: str, says: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "answer": "1"}, "\n", line)
    with pytest.raises(ValueError, match="rows.jsonl:3: ") as raised:
        load_environment("jsonl", {"path": path, "match": match})
    assert says in str(raised.value)


def test_a_line_that_is_no_utf8_is_named(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a", "answer": "b"}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="rows.jsonl:2: is not UTF-8"):
        load_environment("jsonl", {"path": str(tmp_path / "rows.jsonl")})


# ---- load ----


@dataclass
class Riddles:
    """A user's own class."""

    num_prompts: int = 3

    def prompt(self, index: int, held_out: bool) -> Prompt:
        return Prompt([{"role": "user", "content": str(index)}])

    async def respond(self, prompt: Prompt, turns: object) -> Reply:
        return Reply(done=True, reward=random.random())


class NoTurns:
    num_prompts = None

    def prompt(self, index: int, held_out: bool) -> Prompt:
        return Prompt([{"role": "user", "content": "x"}])


class NotAsync(NoTurns):
    def respond(self, prompt: Prompt, turns: object) -> Reply:
        return Reply(done=True)


class NoPrompt(Riddles):
    def prompt(self, index: int, held_out: bool) -> str:  # type: ignore[override]
        return "x"


class Raises(Riddles):
    def __init__(self) -> None:
        raise KeyError("licence")


def test_a_users_class_is_found_by_its_dotted_path(graders: str) -> None:
    environment = load_environment(f"{graders}.Riddles", {"num_prompts": 5})
    assert isinstance(environment, Environment) and environment.num_prompts == 5


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


class Own(BaseException):
    """A user's own."""


class Falls(Riddles):
    """Raises what it is told to, where it is told to."""

    def __init__(self, where: str, error: type[BaseException]) -> None:
        self.where, self.error = where, error
        self.falls("init")

    def falls(self, where: str) -> None:
        if where == self.where:
            raise self.error()

    @property
    def num_prompts(self) -> int:  # type: ignore[override]
        self.falls("num_prompts")
        return 3

    def prompt(self, index: int, held_out: bool) -> Prompt:
        self.falls("prompt")
        return super().prompt(index, held_out)


@pytest.mark.parametrize("where", ["init", "num_prompts", "prompt"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, Own, Unspeakable])
def test_whatever_a_users_class_raises_is_said_as_the_targets(graders: str, where: str, error: type[BaseException]) -> None:
    async def law() -> None:  # on a thread, as in a sampler: on the main one a KeyboardInterrupt is somebody's Ctrl-C
        with pytest.raises(ValueError, match=f"environment.target='{graders}.Falls': .*{error.__name__}"):
            await asyncio.to_thread(load_environment, f"{graders}.Falls", {"where": where, "error": error})

    asyncio.run(law())


@pytest.mark.parametrize("count", [3, np.int64(3), np.int32(3), np.uint8(3)])
def test_any_integer_counts_the_prompts(graders: str, count: Any) -> None:
    found = num_prompts(load_environment(f"{graders}.Riddles", {"num_prompts": count}))
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("count", [0, -1, np.int64(0), True, np.bool_(True), 3.0, "3", Unspeakable()])
def test_what_counts_no_prompts_is_refused(graders: str, count: Any) -> None:
    with pytest.raises(ValueError, match="num_prompts=.*: must be an integer above 0"):
        load_environment(f"{graders}.Riddles", {"num_prompts": count})


@pytest.mark.parametrize(
    ("target", "settings", "says"),
    [
        ("calculater", {}, "did you mean 'calculator'"),
        ("no_such_module.Task", {}, "does not import"),
        ("GRADERS.Missing", {}, "has no class 'Missing'"),
        ("GRADERS.NoTurns", {}, "lacks respond"),
        ("GRADERS.NotAsync", {}, "async"),
        ("GRADERS.NoPrompt", {}, "must be a Prompt"),
        ("GRADERS.Raises", {}, "licence"),
        ("GRADERS.Riddles", {"num_prompts": 0}, "num_prompts=0"),
        ("GRADERS.Riddles", {"number": 1}, "environment.settings.number"),
        ("calculator", {"operation": 2}, "did you mean 'operations'"),
        ("calculator", {"operations": 0}, "operations=0"),
        ("calculator", {"operators": "+^"}, "operators='+^'"),
        ("calculator", {"low": 9, "high": 3}, "low=9"),
        ("calculator", {"max_factor": 1}, "max_factor=1"),
        ("calculator", {"held_out_fraction": 1.5}, "held_out_fraction=1.5"),
        ("reasoning_gym", {}, "environment.settings.task is not set"),
        ("reasoning_gym", {"task": "chain_sums"}, "did you mean 'chain_sum'"),
        ("reasoning_gym", {"task": "chain_sum", "max_term": 2}, "did you mean 'max_terms'"),
        ("reasoning_gym", {"task": "chain_sum", "min_terms": 9, "max_terms": 2}, "max_terms"),
        ("reasoning_gym", {"task": "coin_flip", "held_out_fraction": 1e-9}, "too few different prompts"),
        ("jsonl", {"path": "no/such/file.jsonl"}, "no such file"),
        ("jsonl", {"path": "weft:larger.jsonl", "match": "fuzzy"}, "match='fuzzy'"),
        ("jsonl", {"path": "weft:larger.jsonl", "reward": "no_such_module.f"}, "reward='no_such_module.f'"),
        ("jsonl", {"path": "weft:larger.jsonl", "reward": "json.JSONDecodeError"}, "completion, row"),
        ("jsonl", {"path": "weft:larger.jsonl", "held_out_fraction": 1e-9}, "no held-out row"),
    ],
)
def test_what_is_wrong_with_an_environment_is_said(graders: str, target: str, settings: dict, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_environment(target.replace("GRADERS", graders), settings)
    assert says in str(raised.value)


# ---- answers ----


def test_the_answer_is_the_tagged_then_the_labelled_then_all_of_it() -> None:
    assert extract_answer("<answer> a </answer> <answer>b</answer>") == "b"
    assert extract_answer("Answer: no. ANSWER: 12 ") == "12"
    assert extract_answer("<think>Answer: 3</think> 4\n") == "4"
    assert extract_answer("<think>3, or <answer>4</answer>, so 12") == "" == extract_answer("<think>1</think><think>2")
    assert extract_answer("  plain ") == "plain"
    assert [last_number(text) for text in ("1 and -2.5", "1,200.", "none", ".5e1")] == [-2.5, 1200.0, None, 5.0]
