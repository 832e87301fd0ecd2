"""Conversations as tokens: against transformers' own mask, and against what models are asked and answer turn by turn."""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.errors import InputError
from moerge.texts import Conversation, encode, encode_answers, render
from tests.helpers.chat import CHATML, ENDING, MARKED, STRICT, TEMPLATES, THINKING, UNTHINKING, chat_tokenizer, messages

WORDS = st.text("abc é\n", min_size=1, max_size=12).map(str.strip).filter(bool)
"""Tokens do not cross the beginning of these, so that the tokens of a part are a part of the tokens."""
TURNS = st.lists(WORDS, min_size=2, max_size=7).map(lambda texts: messages(*texts))

SILENT = "{%- for m in messages if m.role == 'user' %}{{- m.content }}{%- endfor %}"


def conversation(*contents: str) -> Conversation:
    return Conversation(tuple(messages(*contents)))


def learned(tokenizer: Any, given: Conversation) -> list[list[str]]:
    """The runs of answers' tokens as text, in each sequence."""
    found = []
    for encoded in encode_answers(tokenizer, given):
        pairs = groupby(zip(encoded.ids, encoded.answers, strict=True), key=itemgetter(1))
        found.append([tokenizer.decode([token for token, _ in run]) for answer, run in pairs if answer])
    return found


@settings(max_examples=30)
@given(TURNS)
def test_marked_answers_are_transformers_own_mask(turns: list[dict[str, Any]]) -> None:
    tokenizer = chat_tokenizer(MARKED)
    turns = turns if turns[-1]["role"] == "assistant" else turns[:-1]
    theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    (ours,) = encode_answers(tokenizer, Conversation(tuple(turns)))
    assert ours.ids == theirs["input_ids"] and ours.answers == [bool(one) for one in theirs["assistant_masks"]]


@pytest.mark.parametrize("template", [CHATML, STRICT])
@settings(max_examples=30)
@given(turns=TURNS)
def test_other_answers_are_what_each_turn_adds(template: str, turns: list[dict[str, Any]]) -> None:
    """The incremental construction on tokens, independent of characters."""
    tokenizer = chat_tokenizer(template)

    def ids(part: list[dict[str, Any]], ask: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(part, add_generation_prompt=ask, return_dict=False))

    (ours,) = encode_answers(tokenizer, Conversation(tuple(turns)))
    expected = [False] * len(ours.ids)
    for place in range(1, len(turns), 2):
        asked, answered = ids(turns[:place], True), ids(turns[: place + 1], False)
        assert ours.ids[: len(asked)] == asked and ours.ids[: len(answered)] == answered
        expected[len(asked) : len(answered)] = [True] * (len(answered) - len(asked))
    assert ours.answers == expected


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=30)
@given(turns=TURNS)
def test_every_answer_is_marked_once_with_the_text_that_it_was_asked_with(name: str, turns: list[dict[str, Any]]) -> None:
    tokenizer, given = chat_tokenizer(TEMPLATES[name]), Conversation(tuple(turns))
    runs = [run for sequence in learned(tokenizer, given) for run in sequence]
    assert len(runs) == len(given.answers)
    for place in given.answers:
        text = turns[place]["content"].strip()
        assert sum(text in run for run in runs) >= 1
    for encoded in encode_answers(tokenizer, given):
        end = max(place for place, answer in enumerate(encoded.answers) if answer)
        whole = tokenizer.decode(encoded.ids[: end + 1])
        assert any(render(tokenizer, given.until(place + 1)).startswith(whole) for place in given.answers)


def test_thinking_that_history_loses_is_learned_where_it_is_generated() -> None:
    turns = messages("one?", "<think>\nfirst\n</think>\n\nA", "two?", "<think>\nsecond\n</think>\n\nB")
    last, first = learned(chat_tokenizer(THINKING), Conversation(tuple(turns)))
    assert last == ["<think>\nsecond\n</think>\n\nB<|im_end|>\n"] and first == ["<think>\nfirst\n</think>\n\nA<|im_end|>\n"]


def test_tools_and_their_calls_are_written() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    given = Conversation(
        (
            {"role": "user", "content": "two?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "four"},
        ),
        ({"type": "function", "function": {"name": "add"}},),
    )
    tokenizer = chat_tokenizer(CHATML)
    assert learned(tokenizer, given) == [
        ['<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>\n', "four<|im_end|>\n"]
    ]
    assert '"name": "add"' in render(tokenizer, given.until(1))


def test_a_conversation_has_no_tokens_but_the_templates() -> None:
    tokenizer = chat_tokenizer(STRICT)
    given = conversation("a?", "b", "c?", "d")
    whole = tokenizer.apply_chat_template(list(given.messages), return_dict=False)
    assert encode(tokenizer, given) == whole and whole.count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, given, 7) == whole[:7]


@pytest.mark.parametrize("ask", ["%d %b %Y", "%Y-%m-%d", "%B"])
def test_the_date_is_the_same_every_day(ask: str) -> None:
    template = "{%- set day = strftime_now('" + ask + "') if strftime_now is defined else '' %}{{- day }}" + CHATML
    tokenizer, given = chat_tokenizer(template), conversation("a?", "b")
    expected = {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26", "%B": "July"}[ask]
    assert render(tokenizer, given).startswith(expected + "<|im_start|>")
    today = tokenizer.apply_chat_template(list(given.messages), tokenize=False)
    assert render(tokenizer, given, dated=True) == today != render(tokenizer, given)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, ("a?", "b"), "no chat template"),
        ("{% for m in messages %}", ("a?", "b"), "the chat template does not compile: line 1"),
        (STRICT, ("a?", "b", "c?"), None),
        (CHATML, ("a?",), "no answer of an assistant"),
        (
            SILENT,
            ("a?", "b"),
            "leaves out the text of message 2",
        ),
        (UNTHINKING, ("a?", "<think>hm</think>b"), "leaves out the thinking of message 2"),
        (CHATML.replace("m.content", "(loop.length ~ m.content)"), ("a?", "b"), "otherwise once that is there"),
        ("{{- messages.nothing.at_all }}", ("a?", "b"), "refuses this conversation"),
    ],
)
def test_what_a_template_cannot_do_is_one_sentence(template: str | None, turns: tuple[str, ...], message: str | None) -> None:
    tokenizer, given = chat_tokenizer(template), conversation(*turns)
    if message is None:
        assert len(list(encode_answers(tokenizer, given))) == 1
        return
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        list(encode_answers(tokenizer, given))
    assert "\n" not in str(caught.value)


def test_roles_that_the_template_refuses_and_an_answer_that_it_drops_are_said_in_calibration_too() -> None:
    system = Conversation(({"role": "system", "content": "be brief"}, *messages("a?", "b")))
    with pytest.raises(InputError, match="refuses this conversation: roles must alternate"):
        encode(chat_tokenizer(STRICT), system)
    with pytest.raises(InputError, match="leaves out the text of message 2"):
        encode(chat_tokenizer(SILENT), conversation("a?", "b"))


def test_a_template_that_ends_texts_gives_each_answer_a_sequence_of_its_own() -> None:
    assert learned(chat_tokenizer(ENDING), conversation("a?", "b", "c?", "d")) == [["d<|end|>\n</s>"], ["b<|end|>\n</s>"]]
