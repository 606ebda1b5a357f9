"""A task's arguments of the chat template reach every text that is rendered for it, and no other."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from weft.actors.base_model import tiny_path
from weft.actors.base_model.tokenizer import CHAT_TEMPLATE, make_tokenizer
from weft.actors.environment import ChatMessage, Prompt, Reply
from weft.actors.environments.load import load_environment
from weft.actors.episode import Bounds, Chat, Turn, run_episode
from weft.actors.preflight import preflight
from weft.configs.build import SettingError
from weft.configs.expand import expand
from weft.transport.messages import UNSAMPLED, AdapterRef, Sample

REF = AdapterRef("riddles", 0, 3)
TOOLS = [{"type": "function", "function": {"name": "Add", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
# Of the call that renders, or of what it hands to the template itself.
TAKEN = ("messages", "conversation", "tools", "add_generation_prompt", "tokenize", "chat_template", "max_length")
UNTHOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"  # how hybrid models are told not to think
# Of hybrid models: where thinking is off the model begins behind an empty thought, and its earlier turns show none.
BEGIN = "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
SAID = "{%- elif message.role == 'assistant' and mark %}{{- '<|im_start|>' + mark + '\n' + message.content + '<|im_end|>\n' }}"
TOLD = (
    "{%- if style == 'rude' %}{{- raise_exception('no manners') }}{%- endif %}"
    "{%- if style == 'long' %}{{- 'why ' * 1000 }}{%- endif %}"
    "{%- if documents %}{{- documents[0].text }}{%- endif %}"
)
BEFORE = "{%- elif not (loop.first"
TEMPLATE = TOLD + CHAT_TEMPLATE.replace(BEFORE, SAID + BEFORE).replace("{{- '<|im_start|>assistant\n' }}", BEGIN)
TASK = """
from weft.actors.environment import Prompt, Reply

class Riddles:
    num_prompts = 3
    def __init__(self, training=None, held_out=None):
        self.arguments = (training, held_out)
    def prompt(self, index, held_out):
        return Prompt([{"role": "user", "content": "Two and two?"}], chat_template_kwargs=self.arguments[held_out])
    async def respond(self, prompt, turns):
        return Reply(done=True)

class Odd(Riddles):
    def prompt(self, index, held_out):
        return Prompt([{"role": "user", "content": "Two and two?"}], chat_template_kwargs={1: 2})
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped base, with that template."""
    copied = Path(shutil.copytree(tiny_path(), tmp_path / "base"))
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    return copied


def told(folder: Path, environment: dict[str, Any], **adapter: Any) -> tuple[str, ...]:
    """What preflight has to say."""
    adapters = {"calc": {"environment": environment, **adapter}}
    sections = {"run": {"dir": str(folder.parent / "out")}, "cluster": {"dashboard_port": 0}, "model": {"path": str(folder)}}
    return preflight(expand({"adapters": adapters, **sections}))


def refusal(folder: Path, environment: dict[str, Any], **adapter: Any) -> str:
    with pytest.raises(SettingError) as caught:
        told(folder, environment, **adapter)
    return str(caught.value)


def calculator(arguments: Any) -> dict[str, Any]:
    return {"target": "calculator", "settings": {"chat_template_kwargs": arguments}}


def play(tokenizer: Any, arguments: Mapping[str, Any] | None) -> tuple[Sample, list[str]]:
    """An episode of two turns; and what the model read before each."""
    prompt, asked = Prompt(ASKED, TOOLS, chat_template_kwargs=arguments), []

    class Twice:
        num_prompts = None

        def prompt(self, index: int, held_out: bool) -> Prompt:
            return prompt

        async def respond(self, prompt: Prompt, turns: Sequence[ChatMessage]) -> Reply:
            return Reply([{"role": "tool", "content": "4"}]) if len(turns) == 1 else Reply(done=True)

    async def generate(tokens: Sequence[int], ref: AdapterRef, max_tokens: int, seed: int) -> Turn:
        asked.append(tokenizer.decode(tokens))
        text = ("Add(2,2)", "four")[len(asked) - 1]
        said = [*tokenizer.encode(text), tokenizer.eos_token_id]
        return Turn(said, [-0.5] * len(said), text)

    chat = Chat(tokenizer)
    bounds = Bounds(max_turns=4, max_tokens=64, max_length=2000)
    tokens = chat.prompt(prompt)
    playing = run_episode("riddles", Twice(), prompt, tokens, chat, generate, bounds, lambda: REF, lambda turn: turn)
    return asyncio.run(playing), asked


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize(
    "arguments", [None, {}, {"enable_thinking": False}, {"enable_thinking": True}, {"documents": [{"text": "2+2=4"}]}]
)
def test_a_prompt_is_what_transformers_renders_with_the_same_arguments(tokenizer: Any, arguments: Any, tools: Any) -> None:
    ours = Chat(tokenizer).prompt(Prompt(ASKED, tools, chat_template_kwargs=arguments))
    theirs = tokenizer.apply_chat_template(
        ASKED, tools=list(tools) or None, add_generation_prompt=True, return_dict=False, **(arguments or {})
    )
    assert ours == theirs


def test_every_turn_of_a_task_without_thinking_begins_behind_an_empty_thought(tokenizer: Any) -> None:
    thinking, without = play(tokenizer, None)[1], play(tokenizer, {"enable_thinking": False})[1]
    assert all(text.endswith("<|im_start|>assistant\n") for text in thinking)
    assert all(text.endswith(UNTHOUGHT) for text in without)
    assert [text.replace(UNTHOUGHT, "<|im_start|>assistant\n") for text in without] == thinking


@pytest.mark.parametrize("arguments", [{"enable_thinking": False}, {"mark": "past"}])
def test_arguments_change_what_stands_behind_a_turn_and_never_the_turn(tokenizer: Any, arguments: dict[str, Any]) -> None:
    """Of a template that would show earlier turns otherwise than as they were sampled."""
    sample, (first, second) = play(tokenizer, arguments)
    said = [{"role": "assistant", "content": "Add(2,2)"}, {"role": "tool", "content": "4"}]
    whole = tokenizer.apply_chat_template([*ASKED, *said], tools=TOOLS, add_generation_prompt=True, tokenize=False, **arguments)
    assert not whole.startswith(first + "Add(2,2)"), "it would"
    assert second == first + "Add(2,2)" + whole.rpartition("Add(2,2)")[2]
    end = tokenizer.eos_token
    assert tokenizer.decode(sample.tokens) == second + "four" + end
    assert tokenizer.decode(sample.tokens[sample.versions != UNSAMPLED]) == f"Add(2,2){end}four{end}"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("target", ["calculator", "reasoning_gym", "jsonl"])
def test_what_ships_takes_them_as_a_setting_for_both_sides(target: str, held_out: bool) -> None:
    settings = {"reasoning_gym": {"task": "chain_sum"}, "jsonl": {"path": "weft:larger.jsonl"}}.get(target, {})
    arguments = {"enable_thinking": False}
    given = load_environment(target, {**settings, "chat_template_kwargs": arguments})
    assert given.prompt(1, held_out).chat_template_kwargs == arguments
    assert not load_environment(target, settings).prompt(1, held_out).chat_template_kwargs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (3, "chat_template_kwargs=3: must be a mapping"),
        ("", "chat_template_kwargs='': must be a mapping"),
        (False, "chat_template_kwargs=False: must be a mapping"),
        (["enable_thinking"], "chat_template_kwargs=['enable_thinking']: must be a mapping"),
        ({"style": "rude"}, "TemplateError: no manners"),
        *(({name: 1}, f"chat_template_kwargs.{name}: must be a name that the template alone reads") for name in TAKEN),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_their_adapters_name(folder: Path, arguments: Any, says: str) -> None:
    said = refusal(folder, calculator(arguments))
    assert said.startswith("adapters.calc.environment.target='calculator': prompt(0, False) cannot be rendered: ")
    assert says in said


def test_a_task_of_ones_own_gives_them_with_its_prompts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hybrid.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))

    def own(**settings: Any) -> dict[str, Any]:
        return {"target": "hybrid.Riddles", "settings": settings}

    assert told(folder, own(training={"enable_thinking": False})) == ()
    assert "prompt(0, False) cannot be rendered: TemplateError: no manners" in refusal(folder, own(training={"style": "rude"}))
    assert "prompt(0, True) cannot be rendered: TemplateError: no manners" in refusal(
        folder, own(held_out={"style": "rude"}), eval_prompts=2
    )
    assert "chat_template_kwargs={1: 2}: must be a mapping from names" in refusal(folder, {"target": "hybrid.Odd"})


def test_a_files_longest_rows_are_looked_at_as_they_will_be_rendered(folder: Path) -> None:
    def rows(style: str) -> dict[str, Any]:
        return {"target": "jsonl", "settings": {"path": "weft:larger.jsonl", "chat_template_kwargs": {"style": style}}}

    assert told(folder, rows("short")) == ()
    assert "tokens, and cluster.sampler.max_model_len=512 must be above that" in refusal(folder, rows("long"))


def test_a_turn_end_is_looked_for_as_the_task_renders_it(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    ends = "{%- elif message.role == 'assistant' and bare %}{{- message.content + '<|im_start|>' }}"
    template.write_text(TEMPLATE.replace(BEFORE, ends + BEFORE))
    assert told(folder, calculator({"bare": False})) == ()
    (said,) = told(folder, calculator({"bare": True}))
    assert "the chat template ends a turn with '<|im_start|>'" in said


def test_an_argument_that_the_template_never_reads_is_told_of_once(folder: Path) -> None:
    assert told(folder, calculator({"enable_thinking": False})) == ()
    (said,) = told(folder, calculator({"enable_thinkin": False}))
    assert "chat_template_kwargs.enable_thinkin" in said and "changes nothing" in said
    assert told(folder, calculator(None)) == ()
