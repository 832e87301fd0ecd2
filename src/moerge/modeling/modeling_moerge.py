"""The sequence-routed model: experts of one dense family, whole sequences routed to some of them. Shapes as in routing_moerge.

model = AutoModelForCausalLM.from_pretrained(folder)
model.route(input_ids)                   # alpha and scores of every expert, and what they are based on
model.generate(input_ids)                # routed by the prompt; the routing stays while it generates
"""

# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache_moerge import MoergeCache
from .configuration_moerge import MoergeConfig, check_routing
from .generation_moerge import MoergeGenerationMixin
from .layers_moerge import MoergeDecoderLayer, combine, dense_parts, heads, log_mixture, make_lane, pick
from .routing_moerge import WHOLE, Prompt, Routing, Share, by_chance, by_scores, fixed, learned, perplexity, sequence_nll, uniform
from .task_vector_moerge import BASED_ON, cosines

Parts = list[tuple[Share, Tensor]]


def _require_grads(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@dataclass
class MoergeOutputWithPast(CausalLMOutputWithPast):
    """The usual output and the routing that was used."""

    routing: Routing | None = None


class MoergePreTrainedModel(PreTrainedModel):
    """What the models with and without a head share."""

    config_class = MoergeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoergeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MoergeConfig) -> None:
        super().__init__(config)
        self._pass_attention_on()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Choose eager, sdpa, ... for all experts."""
        super().set_attn_implementation(*args, **kwargs)
        self._pass_attention_on()

    def _pass_attention_on(self) -> None:
        # the experts' modules read it from their own configuration
        self.config.expert_config._attn_implementation = self.config._attn_implementation

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


class MoergeModel(MoergePreTrainedModel):
    """The experts without heads. Kinds of routing that read no logits work here too; for others pass a routing."""

    def __init__(self, config: MoergeConfig) -> None:
        super().__init__(config)
        self.embed_tokens, self.norm, self.rotary_emb = dense_parts(config)
        self.layers = nn.ModuleList(MoergeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first expert's embedding, the only one if it is shared."""
        return pick(self.embed_tokens, 0)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding that all experts share."""
        self._need_shared("embedding")
        self.embed_tokens[0] = value

    def _need_shared(self, role: str) -> None:
        if role in self.config.separate:
            raise ValueError(f"every expert has its own {role}: it cannot be replaced by one")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoergeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states, summed with alpha."""
        prompt, cache = self.begin(input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, use_cache)
        if cache is None or not cache.is_initialized:
            routing = routing or self.route_by_input(prompt)
            if routing is None:
                raise ValueError(f"{self.config.routing['kind']} routing needs the heads: pass a routing or use the causal LM")
        parts = self.states(prompt, routing, cache, apart=self.config.mix != "layer")
        return BaseModelOutputWithPast(last_hidden_state=combine(parts, len(prompt.position_ids_BT)), past_key_values=cache)

    def begin(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: MoergeCache | None,
        use_cache: bool | None,
    ) -> tuple[Prompt, MoergeCache | None]:
        """What a forward pass starts from: its inputs, and the cache to use, if any."""
        cache = self._open_cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        return self.make_prompt(input_ids, attention_mask, position_ids, inputs_embeds, past), cache

    def _open_cache(self, given: Any, use_cache: bool | None) -> MoergeCache | None:
        """The cache to use: the one given, a new one, or none."""
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if given is not None and not isinstance(given, MoergeCache):
            raise TypeError(f"past_key_values should be a MoergeCache, not {type(given).__name__}: leave it out to get one")
        if (self.gradient_checkpointing and self.training) or not (use_cache or given is not None):
            return None
        return given if given is not None else MoergeCache(self.config)

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

    def states(self, prompt: Prompt, routing: Routing | None, cache: MoergeCache | None, *, apart: bool) -> Parts:
        """Final hidden states of the shares that make up the result; a filled cache keeps its own routing."""
        lanes = None
        if cache is None:
            assert routing is not None
            shares = routing.shares(idle=self.training and _several_processes())
        elif cache.is_initialized:
            shares, lanes, apart = cache.shares, cache.lanes, cache.apart
        else:
            assert routing is not None
            shares, lanes = cache.begin(routing, apart=apart), cache.lanes
        if not apart:
            return self._stream(prompt, shares, lanes)
        return [
            (share, self.path(share.expert, prompt.take(share), None if lanes is None else lanes[index]))
            for index, share in enumerate(shares)
        ]

    def path(self, expert: int, prompt: Prompt, lane: DynamicCache | None = None) -> Tensor:
        """Final hidden states of one expert on a residual stream of its own."""
        return self._stream(prompt, [Share(expert)], None if lane is None else [lane])[0][1]

    def _stream(self, prompt: Prompt, shares: list[Share], caches: list[DynamicCache] | None) -> Parts:
        """One residual stream that these shares write to."""
        hidden_BTH = self._embed(prompt, shares)
        rotary, expert_config = self.rotary_emb, self.config.expert_config
        lanes = [
            make_lane(share, prompt, hidden_BTH, rotary, expert_config, None if caches is None else caches[index])
            for index, share in enumerate(self._spread(shares, "attention", "norm"))
        ]
        ffn_shares = self._spread(shares, "ffn", "norm")
        for layer in self.layers:
            hidden_BTH = layer(hidden_BTH, lanes, ffn_shares)
        return [(share, pick(self.norm, share.expert)(share.take(hidden_BTH))) for share in self._spread(shares, "norm", "head")]

    def _embed(self, prompt: Prompt, shares: list[Share]) -> Tensor:
        if prompt.input_ids_BT is None:
            assert prompt.embeds_BTH is not None
            return prompt.embeds_BTH
        spread = self._spread(shares, "embedding")
        parts = [(share, pick(self.embed_tokens, share.expert)(share.take(prompt.input_ids_BT))) for share in spread]
        return combine(parts, len(prompt.input_ids_BT))

    def _spread(self, shares: list[Share], *roles: str) -> list[Share]:
        """The shares of a block that reads these roles: one each, or the whole if all of them are shared."""
        return shares if set(roles) & set(self.config.separate) else [WHOLE]


class MoergeForCausalLM(MoergeGenerationMixin, MoergePreTrainedModel, GenerationMixin):
    """The sequence-routed language model."""

    def __init__(self, config: MoergeConfig) -> None:
        super().__init__(config)
        self.model = MoergeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = heads(config)
        if config.routing["kind"] == "learned":
            self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self._tied_weights_keys = {
            f"lm_head.{expert}.weight": f"model.embed_tokens.{expert}.weight" for expert in range(len(self.lm_head))
        }
        self.own_parameters = frozenset(name for name, _ in self.named_parameters())
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The first expert's head, the only one if it is shared."""
        return pick(self.lm_head, 0)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head that all experts share."""
        self.model._need_shared("head")
        self.lm_head[0] = new_embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The first expert's embedding, the only one if it is shared."""
        return pick(self.model.embed_tokens, 0)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding that all experts share."""
        self.model.set_input_embeddings(value)

    def enable_input_require_grads(self) -> None:
        """For adapters with gradient checkpointing; every expert's own embedding begins a residual stream."""
        super().enable_input_require_grads()
        others = list(self.model.embed_tokens)[1:]
        self._require_grads_hooks += [other.register_forward_hook(_require_grads) for other in others]

    def set_routing(self, kind: str, **options: Any) -> None:
        """Route in another way from now on; the options are those of `MoergeConfig.routing`."""
        routing = check_routing({"kind": kind, **options}, self.config.expert_names, self.config.separate)
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
    ) -> Routing:
        """How these prompts are routed: weights and scores of every expert, and what they are based on."""
        return self._route(self.model.make_prompt(input_ids, attention_mask, position_ids, inputs_embeds))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoergeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> MoergeOutputWithPast:
        """Logits of the chosen experts' mixture, and the loss if `labels` are given.

        Without `routing` the sequences are routed by themselves; a filled cache goes on with the routing it was filled with.
        """
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise ValueError("a moerge model returns neither attentions nor hidden states: chosen experts have different ones")
        prompt, cache = self.model.begin(input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, use_cache)
        parts = None
        if cache is not None and cache.is_initialized:
            routing = cache.routing
        elif routing is None:
            routing, parts = self._route_and_run(prompt, cache)
        else:
            routing = routing.to(prompt.position_ids_BT.device)
        if parts is None:
            parts = self.model.states(prompt, routing, cache, apart=self.config.mix != "layer")
        logits = self._logits(parts, len(prompt.position_ids_BT), logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoergeOutputWithPast(loss=loss, logits=logits, past_key_values=cache, routing=routing)

    def _logits(self, parts: Parts, batch: int, logits_to_keep: int | Tensor) -> Tensor:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        parts = [(share, states_RTH[:, keep]) for share, states_RTH in parts]
        if self.config.mix != "logits" and len(self.lm_head) == 1:
            shared: Tensor = pick(self.lm_head, 0)(combine(parts, batch))
            return shared
        logits = [(share, pick(self.lm_head, share.expert)(states_RTH)) for share, states_RTH in parts]
        return log_mixture(logits, batch) if self.config.mix == "logits" else combine(logits, batch)

    def path_nll(self, expert: int, prompt: Prompt, lane: DynamicCache | None = None) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of each sequence under one expert's path, and that path's final states."""
        states_BTH = self.model.path(expert, prompt, lane)
        return sequence_nll(states_BTH, pick(self.lm_head, expert), prompt, self.config.vocab_size), states_BTH

    def _route(self, prompt: Prompt) -> Routing:
        return self._route_and_run(prompt, None, route_only=True)[0]

    def _route_and_run(
        self, prompt: Prompt, cache: MoergeCache | None, *, route_only: bool = False
    ) -> tuple[Routing, Parts | None]:
        """The routing, and where scoring has already run the chosen experts as `mix` wants them, their final states.

        With a single expert per sequence one residual stream is as good as several, so its pass is kept whatever `mix` is.
        """
        options = self.config.routing
        kind = options["kind"]
        routing = self.model.route_by_input(prompt)
        if kind == "learned":
            embeds_BTH = prompt.embeds_BTH
            if embeds_BTH is None:
                embeds_BTH = self.get_input_embeddings()(prompt.ids_BT)
            routing = learned(embeds_BTH, prompt, self.router, options)
        elif kind == "task_vector":
            with self._evaluating():
                routing = by_scores(cosines(self, prompt), BASED_ON, options)
        if routing is not None:
            return routing, None
        keep = not route_only and not torch.is_grad_enabled() and (self.config.mix != "layer" or options["top_k"] == 1)
        return self._by_perplexity(prompt, cache if keep else None, keep=keep)

    def _by_perplexity(self, prompt: Prompt, cache: MoergeCache | None, *, keep: bool) -> tuple[Routing, Parts | None]:
        nll, states, lanes = [], {}, {}
        with torch.no_grad(), self._evaluating():
            for expert in range(self.config.num_experts):
                lane = cache.new_lane() if cache is not None else None
                nll_B, states_BTH = self.path_nll(expert, prompt, lane)
                nll.append(nll_B.to(prompt.position_ids_BT.device))
                if keep:
                    states[expert] = states_BTH
                if lane is not None:
                    lanes[expert] = lane
            routing = perplexity(torch.stack(nll, -1), self.config.routing)
        if not keep:
            return routing, None
        shares = routing.shares() if cache is None else cache.begin(routing, apart=True, filled=lanes)
        return routing, [(share, share.take(states[share.expert])) for share in shares]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout, so that the same prompt is always routed the same way."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
