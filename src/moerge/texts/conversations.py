"""Conversations as documents: messages by role, in the spelling of chat templates or in ShareGPT's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.texts.images import Picture, has_images, with_pictures

MESSAGES = ("messages", "conversations")
"""Fields that hold a conversation: OpenAI's and transformers' name, and ShareGPT's."""
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
"""Roles of transformers' templates by ShareGPT's."""
_CALL = "function_call"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields for what a model thinks; templates read the first."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each with a `role`, and the schemas of the `tools` that they may call, as chat templates read them.

    Whatever else a message has (`tool_calls`, `reasoning_content`) is there for the template. `where` names the place it is from,
    `images` are those that parts of messages stand for, in order.
    """

    messages: tuple[Mapping[str, Any], ...] = field(repr=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    where: str = field(default="the conversation", compare=False)
    images: tuple[Picture, ...] = field(default=(), repr=False)

    def __hash__(self) -> int:
        return hash(text_of(self))

    @property
    def answers(self) -> tuple[int, ...]:
        """The places of the assistant's messages."""
        return tuple(index for index, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def question(self) -> Conversation:
        """The messages before the last answer: what a model is given to write it. All of them where none follows."""
        last = len(self.messages) - 1
        return self.until(last) if last in self.answers and last > 0 else self

    @property
    def last_turn(self) -> Conversation:
        """The last message of the `question` that a user wrote, or else its last one."""
        asked = self.question.messages
        written = [message for message in asked if message["role"] == "user"]
        (turn,) = written[-1:] or asked[-1:]
        return Conversation((turn,), self.tools, self.where, self.images if has_images([turn]) else ())

    def until(self, end: int) -> Conversation:
        """The messages before this place."""
        count = sum(part["type"] == "image" for message in self.messages[:end] for part in parts_of(message))
        return Conversation(self.messages[:end], self.tools, self.where, self.images[:count])


def parts_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a message's content, of which one that is no text makes it a list."""
    content = message.get("content", "")
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


Document = str | Conversation
"""A text as it is, or a conversation that a model's own chat template makes a text of."""


def text_of(document: Document) -> str:
    """A document's text; of a conversation its messages and tools as JSON, the same however the file spelt them."""
    if isinstance(document, str):
        return document
    written: dict[str, Any] = {"messages": document.messages, **({"tools": document.tools} if document.tools else {})}
    written |= {"images": [picture.digest for picture in document.images]} if document.images else {}
    return json.dumps(written, ensure_ascii=False, sort_keys=True)


def read_conversation(entry: Mapping[str, Any], name: str, where: str, folder: Path = Path()) -> Conversation:
    """The conversation in the field `name` of a file's entry, with the entry's `tools`, `system` and images, if it has some.

    Paths of images start from `folder`. Raises InputError for a message without a role, for content other than text and images,
    and for an image that cannot be read.
    """
    given = entry[name]
    if not isinstance(given, list) or not given:
        raise InputError(f'{where}: "{name}" should be a list of messages, and is {_shown(given)}')
    messages = [_message(message, number, where) for number, message in enumerate(given, 1)]
    system = entry.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages, pictures = with_pictures(messages, entry, where, folder)
    found = Conversation(tuple(messages), _tools(entry.get("tools"), where), where, pictures)
    try:
        text_of(found).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: a message has half of a character (a lone surrogate): write it whole, or remove it") from None
    return found


def _message(given: Any, number: int, where: str) -> dict[str, Any]:
    place = f"{where}: message {number}"
    if not isinstance(given, Mapping):
        raise InputError(f"{place} should be an object with a role and content, and is {_shown(given)}")
    message = {key: _plain(value) for key, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        return _from_sharegpt(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f"{place} has no role: each message needs one, such as user or assistant")
    message["content"] = _content(message.get("content", ""), place)
    thought = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
    if thought is not None:
        message["reasoning_content"] = thought
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call, place) for call in _listed(message["tool_calls"], f"{place}: tool_calls")]
    return message


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    speaker, content = message.pop("from"), _content(message.pop("value", ""), place)
    if not isinstance(speaker, str) or speaker not in _SHAREGPT:
        raise InputError(f"{place} is from {_shown(speaker)}, which is no role: known are {', '.join(_SHAREGPT)}")
    if speaker == _CALL:
        calls = _parsed(str(content), f"{place}: a function call")
        calls = calls if isinstance(calls, list) else [calls]
        return {**message, "role": "assistant", "content": "", "tool_calls": [_call(call, place) for call in calls]}
    return {**message, "role": _SHAREGPT[speaker], "content": content}


def _content(given: Any, place: str) -> str | list[Any]:
    """A message's text, or its parts where some are images; parts that are all text count as one."""
    if isinstance(given, str):
        return given
    if isinstance(given, list) and all(_is_text(part) or has_images([part]) for part in given):
        return given if has_images(given) else "".join(part["text"] for part in given)
    raise InputError(f"{place} should have text or images as its content, and has {_shown(given)}: moerge reads nothing else")


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _call(given: Any, place: str) -> dict[str, Any]:
    """A tool call as templates read it, its arguments an object: OpenAI's API writes them as JSON in a string."""
    call = dict(given) if isinstance(given, Mapping) else {}
    call = call if "function" in call else {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{place}: a tool call needs the name of a function, and is {_shown(given)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}: the arguments of {function['name']}")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(given: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    tools = _parsed(given, f"{where}: tools") if isinstance(given, str) and given.strip() else given or []
    return tuple(_plain(tool) for tool in _listed(tools, f"{where}: tools"))


def _listed(given: Any, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise InputError(f"{what} should be a list of objects, and is {_shown(given)}")
    return given


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} should be JSON: {error}") from None


def _plain(value: Any) -> Any:
    """A value without the keys that hold nothing: parquet gives every message the keys of all."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return ascii(value)[:60]
