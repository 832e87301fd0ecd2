"""The base of the routed models: outputs, routing passes, and the way from inputs to the mixture. Shapes as in routing_moerge."""

# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .cache_moerge import MoergeCache
from .generation_moerge import MoergeGenerationMixin
from .routing_moerge import Prompt, Routing, Share, by_chance, combine, fixed, learned, perplexity, uniform
from .versions_moerge import (
    CACHE,
    CACHES,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenerationMixin,
    PreTrainedModel,
    can_return_tuple,
    given_cache,
    named,
)

Parts = list[tuple[Share, Tensor]]


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@dataclass
class MoergeOutputWithPast(CausalLMOutputWithPast):
    """The usual output and the routing that was used."""

    routing: Routing | None = None


class RoutedPreTrainedModel(PreTrainedModel):
    """The base of the models with and without a head."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def make_prompt(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past: int = 0,
    ) -> Prompt:
        """The inputs of a forward pass; positions count the tokens that are not padding unless given."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass either input_ids or inputs_embeds")
        batch, length = given.shape[:2]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=given.device)[None]
        return Prompt(input_ids, inputs_embeds, attention_mask, position_ids.expand(batch, -1))


class RoutedModel(RoutedPreTrainedModel):
    """The experts without heads. Kinds of routing that read no logits work here too; for others pass a routing."""

    gradient_checkpointing: bool

    def path(self, expert: int, prompt: Prompt, lane: Any = None) -> Tensor:
        """Run one expert over the prompt on a residual stream of its own, and fill the lane."""
        raise NotImplementedError

    def new_cache(self) -> MoergeCache | None:
        """An empty cache; None if an expert can keep none."""
        raise NotImplementedError

    def together(self, prompt: Prompt, shares: list[Share], lanes: list[Any] | None) -> Parts:
        """Run all shares over the prompt on one residual stream."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MoergeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: Routing | None = None,
        past_key_values: MoergeCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states, summed with alpha."""
        given = given_cache(cache, past_key_values, kwargs)
        prompt, cache = self.begin(input_ids, attention_mask, position_ids, inputs_embeds, given, use_cache)
        if cache is None or not cache.is_initialized:
            routing = routing or self.route_by_input(self.scope(prompt, kwargs.get("prompt_mask")))
            if routing is None:
                raise ValueError(f"{self.config.routing['kind']} routing needs the heads: pass a routing or use the causal LM")
        parts = self.states(prompt, routing, cache)
        return BaseModelOutputWithPast(last_hidden_state=combine(parts, len(prompt.position_ids_BT)), **named(cache))

    def begin(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: MoergeCache | None,
        use_cache: bool | None,
    ) -> tuple[Prompt, MoergeCache | None]:
        """Prepare a forward pass: its inputs, and the cache to use, if any."""
        cache = self._open_cache(cache, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        return self.make_prompt(input_ids, attention_mask, position_ids, inputs_embeds, past), cache

    def _open_cache(self, given: Any, use_cache: bool | None) -> MoergeCache | None:
        """The cache to use: the one given, a new one, or none."""
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if given is not None and not isinstance(given, MoergeCache):
            raise TypeError(f"{CACHE} should be a MoergeCache, not {type(given).__name__}: leave it out to get one")
        if (self.gradient_checkpointing and self.training) or not (use_cache or given is not None):
            return None
        return given if given is not None else self.new_cache()

    def scope(self, prompt: Prompt, prompt_mask: Tensor | None) -> Prompt:
        """The prompt, with what of it routing reads: the tokens of `prompt_mask` [B, T], else all."""
        if prompt_mask is None:
            return prompt
        real_BT = prompt.real_BT
        if prompt_mask.shape != real_BT.shape:
            raise ValueError(f"prompt_mask should be of shape {list(real_BT.shape)}, not {list(prompt_mask.shape)}")
        named_BT = prompt_mask.to(real_BT.device).bool() & real_BT
        return replace(prompt, read_BT=torch.where(named_BT.any(-1, keepdim=True), named_BT, real_BT))

    def route_by_input(self, prompt: Prompt) -> Routing | None:
        """The routing, if its kind reads no more than tokens."""
        options, names = self.config.routing, self.config.expert_names
        if options["kind"] == "uniform":
            return uniform(prompt, len(names))
        if options["kind"] == "fixed":
            return fixed(prompt, len(names), names.index(options["expert"]), options["expert"])
        if options["kind"] == "random":
            return by_chance(prompt, len(names), options)
        return None

    def states(self, prompt: Prompt, routing: Routing | None, cache: MoergeCache | None, **options: Any) -> Parts:
        """Run the shares over the prompt; a filled cache keeps its own routing. `options` go to `path`."""
        lanes, apart = None, self.config.streams_apart
        if cache is None:
            assert routing is not None
            shares = routing.shares(idle=self.training and _several_processes())
        elif cache.is_initialized:
            shares, lanes, apart = cache.shares, cache.lanes, cache.apart
        else:
            assert routing is not None
            shares, lanes = cache.begin(routing, apart=apart), cache.lanes
        if not apart:
            return self.together(prompt, shares, lanes)
        return [
            (share, self.path(share.expert, prompt.take(share), None if lanes is None else lanes[index], **options))
            for index, share in enumerate(shares)
        ]


class RoutedForCausalLM(MoergeGenerationMixin, RoutedPreTrainedModel, GenerationMixin):
    """A language model that is routed by its prompt."""

    model: Any
    router: nn.Linear

    def path_nll(self, expert: int, prompt: Prompt, lane: Any = None) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of each sequence under one expert's path, and what that path made of it."""
        raise NotImplementedError

    def mix(self, parts: Parts, batch: int) -> Tensor:
        """Logits of the mixture."""
        raise NotImplementedError

    def check_routing(self, routing: dict[str, Any]) -> dict[str, Any]:
        """The routing with its defaults filled in; ValueError says what is wrong with it."""
        raise NotImplementedError

    def embeddings(self, prompt: Prompt) -> Tensor:
        """The embeddings whose mean the gate reads."""
        if prompt.embeds_BTH is not None:
            return prompt.embeds_BTH
        found: Tensor = self.get_input_embeddings()(prompt.ids_BT)
        return found

    def route_otherwise(self, prompt: Prompt) -> Routing | None:
        """The routing of kinds that only this model has."""
        return None

    def set_routing(self, kind: str, **options: Any) -> None:
        """Route in another way from now on; the options are those of the configuration's `routing`."""
        routing = self.check_routing({"kind": kind, **options})
        if kind == "learned" and not hasattr(self, "router"):
            raise ValueError("learned routing needs a gate, which this checkpoint lacks: load it with that routing")
        self.config.routing = routing

    @torch.no_grad()
    def route(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
    ) -> Routing:
        """Route these prompts: return weights and scores of every expert, and the basis of the decision."""
        prompt = self.model.make_prompt(input_ids, attention_mask, position_ids, inputs_embeds)
        return self._route_and_run(self.model.scope(prompt, prompt_mask), None, route_only=True)[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MoergeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routing: Routing | None = None,
        past_key_values: MoergeCache | None = None,
        **kwargs: Any,
    ) -> MoergeOutputWithPast:
        """Logits of the chosen experts' mixture, and the loss if `labels` are given.

        Without `routing` the sequences are routed by themselves; a filled cache goes on with the routing it was filled with.
        """
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise ValueError("a moerge model returns neither attentions nor hidden states: chosen experts have different ones")
        prompt_mask = kwargs.pop("prompt_mask", None)
        given = given_cache(cache, past_key_values, kwargs)
        prompt, cache = self.model.begin(input_ids, attention_mask, position_ids, inputs_embeds, given, use_cache)
        keep, parts = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep, None
        if cache is not None and cache.is_initialized:
            routing = cache.routing
        elif routing is None:
            routing, parts = self._route_and_run(self.model.scope(prompt, prompt_mask), cache)
        else:
            routing = routing.to(prompt.position_ids_BT.device)
        if parts is None:
            parts = self.run(prompt, routing, cache, keep)
        else:
            parts = [(share, part_RTX[:, keep]) for share, part_RTX in parts]
        logits = self.mix(parts, len(prompt.position_ids_BT))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoergeOutputWithPast(loss=loss, logits=logits, routing=routing, **named(cache))

    def run(self, prompt: Prompt, routing: Routing | None, cache: MoergeCache | None, keep: slice | Tensor) -> Parts:
        """Run the chosen experts over the prompt, and return their outputs at the positions to keep."""
        return [(share, states_RTH[:, keep]) for share, states_RTH in self.model.states(prompt, routing, cache)]

    def _route_and_run(
        self, prompt: Prompt, cache: MoergeCache | None, *, route_only: bool = False
    ) -> tuple[Routing, Parts | None]:
        """The routing, and where scoring has already run the chosen experts as they are mixed, what they made of the prompt.

        With a single expert per sequence one residual stream is as good as several, so its pass is kept either way.
        """
        options, read = self.config.routing, prompt.cropped()
        routing = self.model.route_by_input(read)
        if options["kind"] == "learned":
            routing = learned(self.embeddings(read), read, self.router, options)
        if routing is None:
            routing = self.route_otherwise(read)
        if routing is not None:
            return routing, None
        keep = not route_only and read is prompt and not torch.is_grad_enabled()
        keep = keep and (self.config.streams_apart or options["top_k"] == 1)
        return self._by_perplexity(read, cache if keep else None, keep=keep)

    def _by_perplexity(self, prompt: Prompt, cache: MoergeCache | None, *, keep: bool) -> tuple[Routing, Parts | None]:
        nll, states, lanes = [], {}, {}
        with torch.no_grad(), self.evaluating():
            for expert in range(self.config.num_experts):
                lane = cache.new_lane(expert) if cache is not None else None
                nll_B, states_BTX = self.path_nll(expert, prompt, lane)
                nll.append(nll_B.to(prompt.position_ids_BT.device))
                if keep:
                    states[expert] = states_BTX
                if lane is not None:
                    lanes[expert] = lane
            routing = perplexity(torch.stack(nll, -1), self.config.routing)
        if not keep:
            return routing, None
        shares = routing.shares() if cache is None else cache.begin(routing, apart=True, filled=lanes)
        return routing, [(share, share.take(states[share.expert])) for share in shares]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout, so that the same prompt is always routed the same way."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
