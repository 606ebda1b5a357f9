"""The multi-turn loop, without an engine: a scripted model, a real tokenizer and chat template."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from weft.actors.environment import MAX_REWARD, Prompt, Reply
from weft.actors.environment_thread import EnvironmentThread
from weft.actors.episode import Bounds, Chat, Turn, run_episode, seed_of
from weft.transport.codec import decode, encode
from weft.transport.errors import AdapterFault
from weft.transport.messages import UNSAMPLED, AdapterRef, Group, Sample

REF = AdapterRef("riddles", 0, 3)
TOOLS = [{"type": "function", "function": {"name": "Add", "parameters": {"type": "object", "properties": {}}}}]
PROMPT = Prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}], TOOLS)
# Qwen's shape: tools in the system turn, consecutive tool outputs in one user turn.
TEMPLATE = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- elif message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level without merges: every byte a token, and the marks of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


class Scripted:
    """An environment that plays a list of replies; an exception in it is raised."""

    num_prompts = None

    def __init__(self, *replies: Reply | BaseException) -> None:
        self.replies = list(replies)
        self.seen: list[Sequence[Any]] = []

    def prompt(self, index: int, held_out: bool) -> Prompt:
        return PROMPT

    async def respond(self, prompt: Prompt, turns: Sequence[Any]) -> Reply:
        self.seen.append(turns)
        reply = self.replies[len(self.seen) - 1]
        if isinstance(reply, BaseException):
            raise reply
        return reply


class Unspeakable(Exception):
    """Raises whenever somebody asks what it says."""

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


class Own(BaseException):
    """A user's own."""


class Speaker:
    """A model that says fixed things, each ended by the end-of-turn token unless there is no room for it."""

    def __init__(self, tokenizer: Any, *texts: str, ends: bool = True) -> None:
        self.tokenizer, self.texts, self.ends = tokenizer, list(texts), ends
        self.asked: list[tuple[list[int], AdapterRef, int, int]] = []

    async def __call__(self, tokens: Sequence[int], ref: AdapterRef, max_tokens: int, seed: int) -> Turn:
        text = self.texts[len(self.asked)]
        self.asked.append((list(tokens), ref, max_tokens, seed))
        said = self.tokenizer.encode(text) + ([self.tokenizer.eos_token_id] if self.ends else [])
        cut = len(said) > max_tokens
        said = said[:max_tokens]
        return Turn(said, [-0.5 - i for i in range(len(said))], text, cut)


def play(
    tokenizer: Any,
    environment: Scripted,
    speaker: Speaker,
    bounds: Bounds | None = None,
    version: Callable[[], AdapterRef] = lambda: REF,
) -> Sample:
    bounds = bounds or Bounds(max_turns=8, max_tokens=64, max_length=2000)
    chat = Chat(tokenizer, bounds.max_length)
    tokens = chat.prompt(PROMPT)
    thread = EnvironmentThread("riddles", environment)
    try:
        return asyncio.run(
            run_episode("riddles", thread, PROMPT, tokens, chat, speaker, bounds, version, lambda turn: 100 + turn)
        )
    finally:
        thread.close()


def tool(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("outputs", [["4"], ["4", "five"], ["4", "five", ""]])
def test_the_sequence_equals_a_fresh_rendering_of_the_conversation(tokenizer: Any, outputs: list[str]) -> None:
    replies = [
        Reply([tool(text) for text in outputs]),
        Reply([{"role": "user", "content": "So?"}]),
        Reply(done=True, reward=1.0),
    ]
    sample = play(tokenizer, Scripted(*replies), Speaker(tokenizer, "Add(2,2)", "hm", "four"))
    whole = [
        *PROMPT.messages,
        said("Add(2,2)"),
        *map(tool, outputs),
        said("hm"),
        {"role": "user", "content": "So?"},
        said("four"),
    ]
    rendered = tokenizer.apply_chat_template(whole, tools=TOOLS, tokenize=False)
    assert tokenizer.encode(rendered.rstrip("\n")) == sample.tokens.tolist()


def test_the_messages_are_what_the_tokens_say_tool_replies_included_in_order(tokenizer: Any) -> None:
    replies = [Reply([tool("4"), tool("five")]), Reply([{"role": "user", "content": "So?"}]), Reply([tool("6")], done=True)]
    sample = play(tokenizer, Scripted(*replies), Speaker(tokenizer, "Add(2,2)", "hm", "four"))
    assert sample.messages == (
        said("Add(2,2)"), tool("4"), tool("five"), said("hm"), {"role": "user", "content": "So?"}, said("four"),
    )  # fmt: skip
    rendered = tokenizer.apply_chat_template([*PROMPT.messages, *sample.messages], tools=TOOLS, tokenize=False)
    assert tokenizer.decode(sample.tokens) == rendered.rstrip("\n")


def test_every_sampled_token_and_no_other_carries_a_version(tokenizer: Any) -> None:
    speaker = Speaker(tokenizer, "ab", "c")
    sample = play(tokenizer, Scripted(Reply([tool("4")]), Reply(done=True)), speaker)
    end = tokenizer.eos_token
    assert tokenizer.decode(sample.tokens[sample.versions == 3]) == f"ab{end}c{end}"
    assert set(sample.versions.tolist()) == {UNSAMPLED, 3}
    assert (sample.logprobs[sample.versions == UNSAMPLED] == 0).all()
    assert sample.logprobs[sample.versions == 3].tolist() == [-0.5, -1.5, -2.5, -0.5, -1.5]
    assert (sample.tokens.dtype, sample.versions.dtype, sample.logprobs.dtype) == (np.int32, np.int32, np.float32)


def test_the_models_own_tokens_are_never_tokenised_again(tokenizer: Any) -> None:
    class Odd(Speaker):
        async def __call__(self, tokens: Sequence[int], ref: AdapterRef, max_tokens: int, seed: int) -> Turn:
            turn = await super().__call__(tokens, ref, max_tokens, seed)
            return Turn([7, 7, *turn.tokens], [0.0, 0.0, *turn.logprobs], "not what these tokens spell")

    sample = play(tokenizer, Scripted(Reply([tool("4")]), Reply(done=True)), Odd(tokenizer, "ab", "c"))
    own = sample.tokens[sample.versions == 3].tolist()
    assert own == [7, 7, *tokenizer.encode("ab"), tokenizer.eos_token_id, 7, 7, *tokenizer.encode("c"), tokenizer.eos_token_id]


def test_the_environment_sees_every_message_since_the_prompt(tokenizer: Any) -> None:
    environment = Scripted(Reply([tool("4")]), Reply(done=True))
    play(tokenizer, environment, Speaker(tokenizer, "Add(2,2)", "four"))
    assert environment.seen == [(said("Add(2,2)"),), (said("Add(2,2)"), tool("4"), said("four"))]


def test_each_turn_records_the_version_it_was_sampled_under(tokenizer: Any) -> None:
    versions = iter([AdapterRef("riddles", 0, 3), AdapterRef("riddles", 0, 5)])
    sample = play(
        tokenizer, Scripted(Reply([tool("4")]), Reply(done=True)), Speaker(tokenizer, "a", "b"), version=lambda: next(versions)
    )
    assert [v for v in sample.versions.tolist() if v != UNSAMPLED] == [3, 3, 5, 5]


def test_a_turn_cut_short_is_closed_by_unsampled_tokens(tokenizer: Any) -> None:
    bounds = Bounds(max_turns=8, max_tokens=3, max_length=2000)
    speaker = Speaker(tokenizer, "abcdef", "g")
    sample = play(tokenizer, Scripted(Reply([tool("4")]), Reply(done=True, reward=0.5)), speaker, bounds)
    assert sample.truncated and sample.reward == 0.5 and sample.turns == 2
    asked = tokenizer.decode(speaker.asked[1][0])
    assert asked.endswith(
        "abc<|im_end|>\n<|im_start|>user<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_last_turn_is_cut_to_what_the_model_has_left(tokenizer: Any) -> None:
    length = len(Chat(tokenizer).prompt(PROMPT))
    speaker = Speaker(tokenizer, "abcdef")
    sample = play(tokenizer, Scripted(Reply([tool("4")], reward=0.25)), speaker, Bounds(8, 64, length + 4))
    assert speaker.asked[0][2] == 4
    assert len(sample.tokens) == length + 4 and sample.truncated and sample.reward == 0.25


def test_an_episode_without_room_for_the_reply_ends_with_the_last_reward(tokenizer: Any) -> None:
    length = len(Chat(tokenizer).prompt(PROMPT))
    sample = play(
        tokenizer, Scripted(Reply([tool("4" * 50)], reward=0.25)), Speaker(tokenizer, "a"), Bounds(8, 64, length + 20)
    )
    assert sample.truncated and sample.turns == 1 and sample.reward == 0.25
    assert sample.versions[-1] == 3, "nothing stands behind the last sampled token"


def test_an_episode_ends_with_its_turns(tokenizer: Any) -> None:
    environment = Scripted(*[Reply([tool("4")], reward=0.1 * i, metrics={"calls": i}) for i in range(1, 4)])
    sample = play(tokenizer, environment, Speaker(tokenizer, "a", "b", "c"), Bounds(3, 64, 2000))
    assert sample.turns == 3 and sample.reward == pytest.approx(0.3) and not sample.truncated
    assert sample.metrics == {"calls": 3.0}
    assert sample.versions[-1] == 3


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("no oven"),
        "a string",
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(),
        Own(),
        Unspeakable(),
        asyncio.CancelledError(),
    ],
)
def test_an_environments_fault_is_its_adapters_alone(tokenizer: Any, fault: Any) -> None:
    with pytest.raises(AdapterFault, match="riddles: its environment's respond raised") as caught:
        play(tokenizer, Scripted(fault), Speaker(tokenizer, "a"))
    assert "Traceback" in caught.value.traceback


def test_what_a_fault_says_can_travel(tokenizer: Any) -> None:
    for error in (ValueError("half \ud800 a pair"), ValueError("x" * 10_000_000), Unspeakable()):
        with pytest.raises(AdapterFault) as caught:
            play(tokenizer, Scripted(error), Speaker(tokenizer, "a"))
        assert len(str(caught.value).encode()) < 100_000


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e39, -2 * MAX_REWARD, 10**400, "1", None])
def test_a_reward_that_no_step_could_follow_is_its_adapters_fault_alone(tokenizer: Any, reward: Any) -> None:
    with pytest.raises(AdapterFault, match="riddles: its environment's respond raised ValueError: reward="):
        play(tokenizer, Scripted(Reply(done=True, reward=reward)), Speaker(tokenizer, "a"))
    assert play(tokenizer, Scripted(Reply(done=True, reward=-MAX_REWARD)), Speaker(tokenizer, "a")).reward == -MAX_REWARD


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(
    "metrics",
    [
        {"why": "wrong"},
        {"why": None},
        {"why": "\ud800"},
        {3: 1.0},
        {"many": 10**400},
        {"many": 1e39},
        {"many": float("inf")},
        {"none": float("nan")},
        {"\ud800": 1.0},
        None,
        ["why"],
    ],
)
def test_a_metric_that_is_no_number_is_its_adapters_fault_alone(tokenizer: Any, metrics: Any, done: bool) -> None:
    with pytest.raises(AdapterFault, match="riddles: its environment's respond raised") as caught:
        play(tokenizer, Scripted(Reply(done=done, metrics=metrics)), Speaker(tokenizer, "a"), Bounds(1, 64, 2000))
    assert "Traceback" in caught.value.traceback


@pytest.mark.parametrize("one", [1, True, 1.0, np.float32(1), np.int64(1), np.array(1.0)])
def test_numbers_of_any_type_travel_as_rewards_and_metrics(tokenizer: Any, one: Any) -> None:
    sample = play(tokenizer, Scripted(Reply(done=True, reward=one, metrics={"one": one})), Speaker(tokenizer, "a"))
    group = Group(REF, 0, (sample,))
    assert decode(encode(group)).samples[0].metrics == {"one": 1.0}
    assert decode(encode(group)).samples[0].reward == 1.0


def test_a_rollout_that_is_given_up_is_no_fault_of_its_environment(tokenizer: Any) -> None:
    task: asyncio.Task[Any] | None = None

    class Slow(Scripted):
        async def respond(self, prompt: Prompt, turns: Sequence[Any]) -> Reply:
            assert task is not None
            task.get_loop().call_soon_threadsafe(task.cancel)
            await asyncio.Event().wait()
            return Reply()

    class Notes(Speaker):
        async def __call__(self, *asked: Any) -> Turn:
            nonlocal task
            task = asyncio.current_task()
            return await super().__call__(*asked)

    with pytest.raises(asyncio.CancelledError):
        play(tokenizer, Slow(), Notes(tokenizer, "a"))


def test_a_task_that_cancels_itself_is_its_adapters_fault(tokenizer: Any) -> None:
    class Cancels(Scripted):
        async def respond(self, prompt: Prompt, turns: Sequence[Any]) -> Reply:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
            return Reply()

    with pytest.raises(AdapterFault, match="respond raised CancelledError"):
        play(tokenizer, Cancels(), Speaker(tokenizer, "a"))


def test_a_huge_reply_ends_its_episode_and_never_costs_the_callers_loop(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    encode = Chat._encode

    def watched(chat: Chat, text: str) -> list[int]:
        tokens = encode(chat, text)
        seen.append((threading.get_ident(), len(tokens)))
        return tokens

    monkeypatch.setattr(Chat, "_encode", watched)
    sample = play(tokenizer, Scripted(Reply([tool("4" * 6_000_000)], reward=0.5)), Speaker(tokenizer, "a"))
    assert sample.truncated and sample.turns == 1 and sample.reward == 0.5
    thread, tokens = seen[-1]
    assert thread != threading.get_ident(), "one adapter's text is no other's wait"
    assert 2000 < tokens < 100_000, "seen not to fit, at the cost of what does"


def test_no_text_that_could_fit_is_cut(tokenizer: Any) -> None:
    longest = max(tokenizer.get_vocab(), key=len)
    text = longest * 50
    whole = Prompt([{"role": "user", "content": text}])
    tokens = Chat(tokenizer).prompt(whole)
    assert Chat(tokenizer, len(tokens)).prompt(whole) == tokens
    assert len(Chat(tokenizer, len(tokens) - 1).prompt(whole)) >= len(tokens) - 1, "and what cannot is seen not to"


def test_an_environment_that_never_replies_is_its_adapters_fault(tokenizer: Any) -> None:
    class Silent(Scripted):
        async def respond(self, prompt: Prompt, turns: Sequence[Any]) -> Reply:
            await asyncio.Event().wait()
            return Reply()

    with pytest.raises(AdapterFault, match=r"respond raised TimeoutError: no answer within 0.01 s"):
        play(tokenizer, Silent(), Speaker(tokenizer, "a"), Bounds(8, 64, 2000, reply_s=0.01))


def test_each_turn_has_a_seed_of_its_own(tokenizer: Any) -> None:
    speaker = Speaker(tokenizer, "a", "b")
    play(tokenizer, Scripted(Reply([tool("4")]), Reply(done=True)), speaker)
    assert [asked[3] for asked in speaker.asked] == [100, 101]


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    seeds = {seed_of(s, name, i, j) for s in (0, 1) for name in ("a", "b") for i in range(10) for j in range(10)}
    assert len(seeds) == 400
    assert seed_of(0, "a", 1, 12) != seed_of(0, "a", 11, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("x", 1) == 8016992354512837684
