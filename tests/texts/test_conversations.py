"""Conversations in files: their spellings, what belongs to them, and what is said about those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.texts import Conversation, document_hash, read_documents

SPOKEN = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
]
SHAREGPT = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def read(folder: Path, *entries: Any, **options: Any) -> list[Any]:
    (folder / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return list(read_documents("a.jsonl", relative_to=folder, **options))


def test_both_spellings_are_the_same_conversation(tmp_path: Path) -> None:
    ours, theirs, apart, text = read(
        tmp_path,
        {"messages": SPOKEN},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "be brief"},
        {"text": "plain", "messages": SPOKEN},
    )
    assert ours == theirs == apart == Conversation(tuple(SPOKEN)) and ours.answers == (2,)
    assert text == "plain"
    assert document_hash(ours) == document_hash(theirs) != document_hash(ours.until(2))
    assert ours.where == f"{tmp_path / 'a.jsonl'}, line 1"


def test_the_messages_may_be_in_another_field_and_their_content_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "and two?"}]
    (found,) = read(tmp_path, {"chat": [SPOKEN[0], {"role": "user", "content": parts}, SPOKEN[2]]}, field="chat")
    assert found == Conversation(tuple(SPOKEN))


def test_tool_calls_and_thinking_stay(tmp_path: Path) -> None:
    question, result = {"role": "user", "content": "two and two?"}, {"role": "tool", "content": "4"}
    as_text = {"function": {"name": "add", "arguments": json.dumps({"a": 2, "b": 2})}, "type": "function"}
    openai = [question, {"role": "assistant", "content": None, "tool_calls": [as_text]}, {**result, "tool_call_id": "1"}]
    value = json.dumps({"name": "add", "arguments": {"a": 2, "b": 2}})
    sharegpt = [{"from": "human", "value": "two and two?"}, {"from": "function_call", "value": value}]
    sharegpt.append({"from": "observation", "value": "4"})
    thought = [question, {"role": "assistant", "content": "four", "thinking": "easy"}]
    ours, theirs, thinking = read(
        tmp_path,
        {"messages": openai, "tools": [TOOL]},
        {"conversations": sharegpt, "tools": json.dumps([TOOL])},
        {"messages": thought},
    )
    assert ours.messages[1] == theirs.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert ours.tools == theirs.tools == (TOOL,) and ours.messages[2]["tool_call_id"] == "1"
    assert theirs.messages[2] == result
    assert thinking.messages[1]["reasoning_content"] == "easy"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    rows = [SPOKEN, [SPOKEN[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}], []]
    parquet.write_table(pyarrow.table({"id": [1, 2], "messages": rows[:2], "tools": [None, [TOOL]]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "b.parquet")
    first, second = read_documents("a.parquet", relative_to=tmp_path)
    assert first == Conversation(tuple(SPOKEN)) and second.tools[0]["function"]["name"] == "add"
    assert second.messages[1]["tool_calls"] == [CALL] and "tool_calls" not in second.messages[0]
    with pytest.raises(InputError, match=r"b\.parquet, row 3: \"messages\" should be a list of messages"):
        list(read_documents("b.parquet", relative_to=tmp_path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": "hello"}, 'line 1: "messages" should be a list of messages'),
        ({"messages": []}, 'line 1: "messages" should be a list of messages'),
        ({"messages": ["hello"]}, "line 1: message 1 should be an object with a role"),
        ({"messages": [SPOKEN[0], {"content": "hello"}]}, "line 1: message 2 has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "line 1: message 1 should have text"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 1: message 1 should have text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "message 1: a tool call needs the name"),
        ({"messages": [{"role": "assistant", "tool_calls": {"id": "1"}}]}, "tool_calls should be a list"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{"}]}]},
            "the arguments of add should be JSON",
        ),
        ({"messages": SPOKEN, "tools": "{"}, "line 1: tools should be JSON"),
        ({"conversations": [{"from": "narrator", "value": "once"}]}, "line 1: message 1 is from 'narrator', which is no role"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "line 1: a message has half of a character"),
    ],
)
def test_what_is_no_conversation_is_one_sentence(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, entry)
    assert message in str(caught.value) and "\n" not in str(caught.value)
