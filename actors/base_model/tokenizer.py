"""The tokenizer of the shipped base: bytes, and one token for each phrase that its tasks repeat.

A rollout on a CPU costs by the token, so what is the same in every prompt (instructions, tool schemas, the frame of a tool
call) is one token each. What a task asks to be worked on (digits, letters of words) stays bytes, so that digits and letters
are seen one by one. Any other text works too, at one token a byte.

The chat template is of the ChatML form that Qwen models use: tools in the system turn, <tool_call> in the assistant's,
<tool_response> in a user's. What it renders for some messages is a prefix of what it renders for these and more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from weft.actors.environments.calculator import EVENTS, NAMES, NOUNS, TOOLS

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN, END_OF_TURN)
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<answer>", "</answer>", "<think>", "</think>")
MULTIPLE = 64  # the vocabulary is rounded up to it
MAX_LENGTH = 2048  # tokens of a chat

_TOOL_TEXT = 'Call one with\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
CHAT_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\n' }}{%- endfor %}"
    "{{- " + json.dumps(_TOOL_TEXT) + " }}{{- '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif not (loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

CALL = '<tool_call>\n{{"name": "{}", "arguments": {{"{}": '
CALCULATE = CALL.format("Calculator", "expression") + '"'
CALCULATE_END = '"}}\n</tool_call>'
FINISH = CALL.format("FinalAnswer", "answer")
FINISH_END = "}}\n</tool_call>"

ANSWERS = ("Answer: ", "Maybe ", "About ", ", I think.", "I do not know.", "It is ", "That is done.", "['", "', '", "']")
QUESTIONS = (
    "State the final answer to the following arithmetic problem: ",
    "Calculate ",
    "Spell this word backward (example: sun -> nus): ",
    "Sort these numbers in ascending order: ",
    "Sort these numbers in descending order: ",
    "\nPlease follow the instruction below:\n## 1. Let all your answers be a list of numbers. Instead of reporting your "
    "answer as -69, -13, 1, 7, 11, 43, 59, 61, use ['-69', '-13', '1', '7', '11', '43', '59', '61'] instead\n## 2. Convert all "
    "numbers in the square brackets as strings. For example, ['-69', '-13', '1', '7', '11', '43', '59', '61']",
    'How many times does the letter "',
    '" appear in the text: "',
    '"?',
    "Your task is to count how many legs there are in total when given a list of animals.\n\nNow, how many legs are there in "
    "total if you have ",
    "Which is larger, ",
    " or ",
    " + ",
    " - ",
    " * ",
    " =",
    ", ",
    ".0",
)


def phrases() -> list[str]:
    """Every phrase that is one token, without repetition."""
    chat = ["system\n", "user\n", "assistant\n", "# Tools\n", _TOOL_TEXT, "<tool_response>\n", "\n</tool_response>"]
    chat += [json.dumps(tool, ensure_ascii=False) + "\n" for tool in TOOLS]
    calculator = [f"{name} has " for name in NAMES] + [f" {noun}" for noun in NOUNS] + [". How many now?"]
    for events in EVENTS.values():
        for event in events:
            before, after = event.split("{}")
            calculator += [f", {before}", *([after] if after else [])]
    calculator += [CALCULATE, CALCULATE_END, FINISH, FINISH_END]
    return list(dict.fromkeys([*chat, *calculator, *ANSWERS, *QUESTIONS]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; ids: 256 bytes, then special tokens, tags, phrases."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*TAGS, *phrases())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding: the tokens, rounded up to a multiple of 64."""
    return -(-len(tokenizer) // MULTIPLE) * MULTIPLE


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template beside them."""
    tokenizer.save_pretrained(folder)


def render(tokenizer: Any, messages: Any, tools: Any, add_generation_prompt: bool) -> str:
    """The text of a chat."""
    text = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(text)
