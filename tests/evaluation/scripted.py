"""A model of the harness that answers as a function says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.api.model import LM


class Scripted(LM):
    """A model that answers as a function of the document, and ends where it is made to stop, as a real one does."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], str]) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self._until(self.answer(request.doc), request.args[1]["until"]) for request in requests]

    @staticmethod
    def _until(text: str, stops: list[str]) -> str:
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood
