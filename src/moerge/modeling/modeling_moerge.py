"""The sequence-routed model: experts of one dense family, whole sequences routed to some of them. Shapes as in routing_moerge.

model = AutoModelForCausalLM.from_pretrained(folder)
model.route(input_ids)                   # alpha and scores of every expert, and what they are based on
model.generate(input_ids)                # routed by the prompt; the routing stays while it generates
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .cache_moerge import MoergeCache
from .configuration_moerge import MoergeConfig, check_routing
from .layers_moerge import MoergeDecoderLayer, dense_parts, heads, make_lane, pick
from .routed_moerge import MoergeOutputWithPast, Parts, RoutedForCausalLM, RoutedModel, RoutedPreTrainedModel
from .routing_moerge import WHOLE, Prompt, Routing, Share, by_scores, combine, log_mixture, sequence_nll
from .task_vector_moerge import BASED_ON, cosines
from .versions_moerge import DynamicCache

if TYPE_CHECKING:  # transformers 5.5 to 5.9 copies the files that this one names, and not those that they import
    from .adapters_moerge import adapted as adapted
    from .generation_moerge import MoergeGenerationMixin as MoergeGenerationMixin
    from .lowrank_moerge import AdaptedLinear as AdaptedLinear
    from .naming_moerge import FAMILIES as FAMILIES

__all__ = ["MoergeForCausalLM", "MoergeModel", "MoergeOutputWithPast"]


def _require_grads(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


class MoergePreTrainedModel(RoutedPreTrainedModel):
    """The base of the models with and without a head."""

    config_class = MoergeConfig
    _no_split_modules = ["MoergeDecoderLayer"]

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


class MoergeModel(RoutedModel, MoergePreTrainedModel):
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

    def new_cache(self) -> MoergeCache:
        """An empty cache."""
        return MoergeCache(self.config)

    def path(self, expert: int, prompt: Prompt, lane: DynamicCache | None = None) -> Tensor:
        """Final hidden states of one expert on a residual stream of its own."""
        return self.together(prompt, [Share(expert)], None if lane is None else [lane])[0][1]

    def together(self, prompt: Prompt, shares: list[Share], caches: list[DynamicCache] | None) -> Parts:
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


class MoergeForCausalLM(RoutedForCausalLM, MoergePreTrainedModel):
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

    def check_routing(self, routing: dict[str, Any]) -> dict[str, Any]:
        """The routing with its defaults filled in; ValueError says what is wrong with it."""
        return check_routing(routing, self.config.expert_names, self.config.separate)

    def mix(self, parts: Parts, batch: int) -> Tensor:
        """Logits of the mixture."""
        if self.config.mix != "logits" and len(self.lm_head) == 1:
            shared: Tensor = pick(self.lm_head, 0)(combine(parts, batch))
            return shared
        logits = [(share, pick(self.lm_head, share.expert)(states_RTH)) for share, states_RTH in parts]
        return log_mixture(logits, batch) if self.config.mix == "logits" else combine(logits, batch)

    def path_nll(self, expert: int, prompt: Prompt, lane: DynamicCache | None = None) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of each sequence under one expert's path, and that path's final states."""
        states_BTH = self.model.path(expert, prompt, lane)
        return sequence_nll(states_BTH, pick(self.lm_head, expert), prompt, self.config.vocab_size), states_BTH

    def route_otherwise(self, prompt: Prompt) -> Routing | None:
        """Task-vector routing."""
        if self.config.routing["kind"] != "task_vector":
            return None
        with self.evaluating():
            return by_scores(cosines(self, prompt), BASED_ON, self.config.routing)
