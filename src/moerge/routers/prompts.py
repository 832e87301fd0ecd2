"""Prompts as what tells experts apart: a few texts of each that are typical, and some that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from moerge.errors import InputError, suggest
from moerge.texts import Document, Texts
from moerge.texts.conversations import read_conversation


def _checked(given: Any) -> Any:
    """Return a prompt as the recipe has it: text or a list of messages."""
    if not given or not isinstance(given, str | list):
        raise PydanticCustomError("prompt", "should be text or a list of messages, and not empty")
    try:
        _document(given)
    except InputError as error:
        raise PydanticCustomError("prompt", "{reason}", {"reason": f": {error}"}) from None
    return given


def _document(given: str | list[dict[str, Any]]) -> Document:
    return given if isinstance(given, str) else read_conversation({"messages": given}, "messages", "the prompt")


Prompt = Annotated[Any, AfterValidator(_checked)]


class Prompts(BaseModel):
    """Texts or lists of messages that should go to an expert, and some that should not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positive: tuple[Prompt, ...] = Field(min_length=1)
    negative: tuple[Prompt, ...] = ()

    @property
    def documents(self) -> tuple[Document, ...]:
        """All of them, the positive ones first."""
        return tuple(_document(prompt) for prompt in (*self.positive, *self.negative))


def prompt_texts(prompts: Mapping[str, Prompts], experts: Sequence[str], source: str) -> tuple[Texts, ...]:
    """The prompts as calibration text, which the manifest has the hashes of; InputError unless every expert has some."""
    for name in (*prompts, *experts):
        if name not in experts:
            raise InputError(
                f"{source}: moe.router.prompts: {name!r} is not an expert, {suggest(name, experts)}", code="unknown-name"
            )
        if name not in prompts:
            raise InputError(f"{source}: moe.router.prompts: there are none for {name}: every expert needs some")
    return tuple(Texts(name, "prompts", prompts[name].documents) for name in experts)


def direction(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over positive prompts minus the mean over negative ones, each an array of one shape, in float64."""
    mean: np.ndarray = np.mean(np.stack(positive).astype(np.float64), axis=0)
    return mean - np.mean(np.stack(negative).astype(np.float64), axis=0) if negative else mean
