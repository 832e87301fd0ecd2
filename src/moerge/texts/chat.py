"""Conversations as tokens: the tokenizer's own chat template, and which tokens the assistant writes.

A template that marks them with `{% generation %}` is believed. Of another one, an answer is what the template writes more once
the answer is there than it writes before it to ask for one, its end token included: what a model generates that is asked so.
Shapes: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moerge.errors import InputError
from moerge.texts.conversations import Conversation, Document

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_DAY = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday", "%j": "208"}
_DAY |= dict.fromkeys(("%H", "%M", "%S"), "00")
"""The day that templates are told it is, which Llama's own take where they have no clock: text has no other date each time."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a conversation [T], whether the assistant writes each, and the text that they are of."""

    ids: list[int]
    answers: list[bool]
    text: str


def refuse_images(conversation: Conversation) -> None:
    """InputError for a conversation with images, where only its text would be read."""
    if conversation.images:
        raise InputError(f"{conversation.where} has images, and here only text is read: leave it out")


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer's model is a chat model."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, document: Document, limit: int | None = None, *, ask: bool = False) -> list[int]:
    """Up to `limit` tokens of a document: a text as the tokenizer starts one, a conversation as the chat template writes it.

    With `ask` the beginning of an answer follows a conversation.
    """
    options: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
    if isinstance(document, Conversation):
        refuse_images(document)
        document, options = written_text(tokenizer, document, ask=ask), {**options, "add_special_tokens": False}
    return list(tokenizer(document, verbose=False, **options)["input_ids"])


def written_text(tokenizer: Any, conversation: Conversation, *, ask: bool = False) -> str:
    """A conversation as `render` writes it; InputError also where the template leaves out what an answer says."""
    text = render(tokenizer, conversation, ask=ask)
    for place in conversation.answers:
        _check_written(conversation, place, text, thinking=place == len(conversation.messages) - 1)
    return text


def render(tokenizer: Any, conversation: Conversation, *, ask: bool = False, dated: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it, with `ask` also the beginning of an answer to come.

    Templates that write the date write a fixed one, or with `dated` today's. Raises InputError where there is no template, or it
    does not compile or refuses the conversation.
    """
    return str(_apply(tokenizer, conversation, dated=dated, add_generation_prompt=ask, tokenize=False))


def end_token(tokenizer: Any) -> int | None:
    """The token that the chat template writes behind an answer, if it is one: an answer ends there, whatever a config says."""
    question, answer = ({"role": role, "content": role[:1]} for role in ("user", "assistant"))
    behind = render(tokenizer, Conversation((question, answer))).rpartition(answer["content"])[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if ids and ids[0] in tokenizer.added_tokens_decoder else None


def encode_answers(tokenizer: Any, conversation: Conversation, *, images: bool = False) -> Iterator[Encoded]:
    """The conversation up to its last answer, with every answer marked.

    Some templates write an answer otherwise once others follow, such as without its thinking. Such an answer is marked in a
    conversation of its own, which ends with it.
    With `images` their places may be among the tokens. Raises InputError as `render`, and for a tokenizer that does not tell
    characters.
    """
    if not images:
        refuse_images(conversation)
    if not tokenizer.is_fast:
        raise InputError(
            f"{conversation.where}: this tokenizer does not tell which characters a token stands for, so answers cannot be told "
            "from questions: use one with a tokenizer.json"
        )
    spans = _Answers(tokenizer, conversation)
    pending = [place for place in conversation.answers if place > 0]
    if not pending:
        raise InputError(f"{conversation.where} has no answer of an assistant, so nothing can be learned from it: leave it out")
    if _MARKED.search(_template(tokenizer, conversation)):
        yield _marked(tokenizer, conversation.until(pending[-1] + 1), spans)
        return
    while pending:
        whole = spans.text(pending[-1] + 1)
        here = [place for place in pending if whole.startswith(spans.text(place + 1))]
        yield _encoded(tokenizer, whole, [spans.of(place) for place in here])
        pending = [place for place in pending if place not in here]


def _common(first: str, second: str) -> int:
    """The number of characters at the beginning in which two texts agree."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


class _Answers:
    """The places of a conversation's answers in its text."""

    def __init__(self, tokenizer: Any, conversation: Conversation) -> None:
        self._tokenizer, self._conversation = tokenizer, conversation
        self._texts: dict[int, str] = {}

    def text(self, end: int) -> str:
        """The text of the messages before this place."""
        if end not in self._texts:
            self._texts[end] = render(self._tokenizer, self._conversation.until(end))
        return self._texts[end]

    def of(self, place: int) -> tuple[int, int]:
        """The first and the last character but one of an answer, in the text that ends with it."""
        whole = self.text(place + 1)
        asked = render(self._tokenizer, self._conversation.until(place), ask=True)
        start = len(asked)
        if not whole.startswith(asked):  # such as one that opens a thought, which the answer has not
            start = _common(asked, whole)
            if start < len(self.text(place)) or not whole.startswith(self.text(place)):
                raise InputError(
                    f"{self._conversation.where}: the chat template writes what stands before message {place + 1} otherwise once "
                    "that is there, so it cannot be told what is its answer: use a template that does not"
                )
        _check_written(self._conversation, place, whole[start:])
        return start, len(whole)


def _check_written(conversation: Conversation, place: int, written: str, *, thinking: bool = True) -> None:
    """InputError unless what an answer says, calls and, with `thinking`, thinks is in what the template has written of it."""
    for what, text in _parts(conversation.messages[place], thinking=thinking):
        if text not in written:
            raise InputError(
                f"{conversation.where}: the chat template leaves out {what} of message {place + 1}, an answer of the assistant: "
                "use a template that writes it, or remove it from the text"
            )


def _parts(message: Mapping[str, Any], *, thinking: bool) -> Iterator[tuple[str, str]]:
    content = message["content"]
    thoughts = [*_THOUGHT.findall(content), message.get("reasoning_content", "")]
    yield "the text", _THOUGHT.sub("", content).strip()
    yield from (("the thinking", thought.strip()) for thought in thoughts if thinking)
    yield from (("the tool call", call["function"]["name"]) for call in message.get("tool_calls", ()))


def _marked(tokenizer: Any, conversation: Conversation, spans: _Answers) -> Encoded:
    """A conversation whose template marks the answers itself."""
    found = _apply(tokenizer, conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    mask = [bool(one) for one in found["assistant_masks"]]
    for place in conversation.answers:
        _check_written(conversation, place, spans.text(place + 1))
    if not any(mask):
        raise InputError(f"{conversation.where}: the chat template marks no token as the assistant's: mend its generation block")
    return Encoded(list(found["input_ids"]), mask, spans.text(len(conversation.messages)))


def _encoded(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [any(start < last and end > first for first, last in spans) for start, end in found["offset_mapping"]]
    return Encoded(list(found["input_ids"]), answers, text)


def _template(tokenizer: Any, conversation: Conversation) -> str:
    if not has_template(tokenizer):
        raise InputError(
            f"{conversation.where} is a conversation, and the model has no chat template to write it with: name one with "
            "'chat_template' in the recipe, put a chat_template.jinja into the model's folder, or give plain text"
        )
    try:
        return str(tokenizer.get_chat_template(None, list(conversation.tools) or None))
    except ValueError as error:  # several templates, none of them for this
        raise InputError(f"{conversation.where}: no chat template of the model fits: {_short(error)}") from None


def _apply(tokenizer: Any, conversation: Conversation, *, dated: bool = False, **options: Any) -> Any:
    from jinja2 import TemplateError, TemplateSyntaxError

    template = _template(tokenizer, conversation)
    template = template if dated or "strftime_now" not in template else _without_clock() + template
    try:
        return tokenizer.apply_chat_template(
            list(conversation.messages), tools=list(conversation.tools) or None, chat_template=template, **options
        )
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template does not compile: line {error.lineno}: {_short(error)}: mend it, or name another with "
            "'chat_template' in the recipe"
        ) from None
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{conversation.where}: the chat template refuses this conversation: {_short(error)}") from None


def _without_clock() -> str:
    """A macro in place of transformers' clock, which templates call `strftime_now`."""
    day = "format" + "".join(f" | replace({key!r}, {value!r})" for key, value in _DAY.items())
    return "{%- macro strftime_now(format) -%}{{ " + day + " }}{%- endmacro -%}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
