"""Talking with a checkpoint: turns in its own chat template, answered until its template ends them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moerge.errors import InputError
from moerge.inference.generation import Generation, check_temperature, continue_tokens, routing_by_name
from moerge.inference.routes import RouteBy
from moerge.runtime.loading import Loaded, context_length
from moerge.texts import Conversation, end_token, has_template, render

RoutePer = Literal["turn", "conversation"]


@dataclass
class Chat:
    """A conversation with a model; `messages` are what was said so far.

    A sequence-routed model is routed anew before each answer or, with `route_per: conversation`, once before the first. It reads
    the whole prompt, that is everything said so far, as it does by itself; with `route_by: last-turn` the last question alone.
    Raises InputError where the model has no chat template, and for either of the two where it does not route sequences.
    """

    loaded: Loaded
    system: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    route_per: RoutePer = "turn"
    route_by: RouteBy = "prompt"
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    _routing: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not has_template(self.loaded.tokenizer):
            raise InputError(
                f"{self.loaded.name} has no chat template, so it is no chat model: leave out --chat to continue a text, or put a "
                "chat_template.jinja into its folder"
            )
        if (self.route_per, self.route_by) != ("turn", "prompt") and not self.loaded.by_sequence:
            raise InputError(f"{self.loaded.name} does not route sequences: leave out --route-per and --route-by")
        self._ends = end_tokens(self.loaded)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._routing = None

    def ask(self, text: str, show: Callable[[str], None] | None = None) -> Generation:
        """Answer a question, which becomes part of the conversation with it; `show` receives the answer's text as it grows.

        What a model thinks and what tools it calls stay in the answer as it writes them. Raises InputError where the template
        refuses the conversation, or the model has no room for an answer; the question is forgotten then.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids_1T = self._tokens(asked)
        self._check_room(ids_1T.shape[1])
        options: dict[str, Any] = {} if show is None else {"streamer": _streamer(self.loaded, show, self._ends)}
        if self.loaded.by_sequence:
            options |= self._route(asked)
        turn = sum(message["role"] == "user" for message in self.messages)
        settings = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed + turn}
        new_T, seconds = continue_tokens(self.loaded, ids_1T, ends=self._ends, **settings, **options)
        ids = new_T.tolist()
        ids = ids[:-1] if ids and ids[-1] in self._ends else ids
        answer = str(self.loaded.tokenizer.decode(ids, skip_special_tokens=False))
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        routing = routing_by_name(self.loaded, options.get("routing"), ids_1T)
        return Generation(
            self.loaded.name, text, answer, ids_1T.shape[1], len(new_T), seconds, routing, messages=tuple(self.messages)
        )

    def _tokens(self, messages: list[Mapping[str, Any]]) -> Any:
        text = render(self.loaded.tokenizer, Conversation(tuple(messages)), ask=True, dated=True)
        return self.loaded.tensor(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"], "the conversation")

    def _route(self, messages: list[Mapping[str, Any]]) -> dict[str, Any]:
        """The routing to generate with; nothing where the model is to route by itself, which needs no further pass."""
        if (self.route_per, self.route_by) == ("turn", "prompt"):
            return {}
        if self._routing is None or self.route_per == "turn":
            read = messages if self.route_by == "prompt" else messages[-1:]
            self._routing = self.loaded.model.route(self._tokens(read))
        return {"routing": self._routing}

    def _check_room(self, tokens: int) -> None:
        context = context_length(self.loaded)
        if context is not None and tokens + self.max_new_tokens > context:
            raise InputError(
                f"the conversation has {tokens} tokens, and {self.loaded.name} takes {context} in all, {self.max_new_tokens} of "
                "them for the answer: begin a new one, or choose a smaller --max-new-tokens"
            )


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config, and the one that the chat template writes behind answers."""
    config = loaded.model.generation_config.eos_token_id
    ends = set(config if isinstance(config, list) else [] if config is None else [config])
    written = end_token(loaded.tokenizer)
    return frozenset(ends if written is None else {*ends, written})


def _streamer(loaded: Loaded, show: Callable[[str], None], ends: frozenset[int]) -> Any:
    """transformers' streamer that shows text once its characters are whole, without the token that ends it."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or value.tolist()[-1] not in ends:
                super().put(value)  # type: ignore[no-untyped-call, unused-ignore]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                show(text)

    return Shown(loaded.tokenizer, skip_prompt=True, skip_special_tokens=False)
