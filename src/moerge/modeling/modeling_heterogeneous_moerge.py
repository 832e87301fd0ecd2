"""The model that holds experts of different architectures: MergeME, section 3.2. Shapes as in routing_moerge.

model = AutoModelForCausalLM.from_pretrained(folder)
model.route(input_ids)                   # alpha and scores of every expert, and what they are based on
model.generate(input_ids)                # routed by the prompt; the routing stays while it generates
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .configuration_heterogeneous_moerge import MoergeHeterogeneousConfig
from .experts_moerge import (
    ExpertLane,
    Experts,
    MoergeHeterogeneousCache,
    body,
    build_expert,
    expert_logits,
    keeps_cache,
    run_expert,
)
from .projectors_moerge import Projector, draw_as_torch
from .routed_moerge import MoergeOutputWithPast, Parts, RoutedForCausalLM, RoutedModel, RoutedPreTrainedModel
from .routing_moerge import Prompt, Routing, combine, log_mixture, sequence_nll
from .versions_moerge import BaseModelOutputWithPast

if TYPE_CHECKING:  # transformers 5.5 to 5.9 copies the files that this one names, and not those that they import
    from .adapters_moerge import adapted as adapted
    from .cache_moerge import MoergeCache as MoergeCache
    from .configuration_moerge import MoergeConfig as MoergeConfig
    from .generation_moerge import MoergeGenerationMixin as MoergeGenerationMixin
    from .naming_moerge import FAMILIES as FAMILIES

_ALL = slice(None)
_OWN = "every expert has its own embedding and head"


class MoergeHeterogeneousPreTrainedModel(RoutedPreTrainedModel):
    """The base of the models with and without a head."""

    config_class = MoergeHeterogeneousConfig
    _no_split_modules = ["Projector"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            draw_as_torch(module)
        else:
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        """Initialize what was not loaded; the experts as if each were alone, since code of ours would skip what they compute."""
        for module in self.modules():
            for expert in module if isinstance(module, Experts) else ():
                expert.initialize_weights()
        super().initialize_weights()


class MoergeHeterogeneousModel(RoutedModel, MoergeHeterogeneousPreTrainedModel):
    """The experts between the shared embedding and the shared head.

    alpha is given by the routing, r_i = proj_out_i(expert_i(proj_in_i(embedding))) and the result is sum_i alpha_i r_i. With
    separate embeddings the experts have no common states, only the causal LM has a result.
    """

    experts: Any
    embed_tokens: Any

    def __init__(self, config: MoergeHeterogeneousConfig) -> None:
        super().__init__(config)
        self.experts = Experts(build_expert(config, number) for number in range(config.num_experts))
        self.shared = config.embedding == "shared"
        if self.shared:
            inner = [expert.get_input_embeddings().width for expert in self.experts]
            outer = [expert.get_output_embeddings().width for expert in self.experts]
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.projectors_in = nn.ModuleList(Projector(config.hidden_size, d, **config.projectors) for d in inner)
            self.projectors_out = nn.ModuleList(Projector(d, config.hidden_size, **config.projectors) for d in outer)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The shared embedding, else that of the first expert."""
        found: nn.Module = self.embed_tokens if self.shared else self.experts[0].get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the shared embedding."""
        if not self.shared:
            raise ValueError(f"{_OWN}: they cannot be replaced by one")
        self.embed_tokens = value

    def new_cache(self) -> MoergeHeterogeneousCache | None:
        """An empty cache; None if an expert can keep none."""
        return MoergeHeterogeneousCache(self.experts) if all(map(keeps_cache, self.experts)) else None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Final states in the width of the shared head, summed with alpha."""
        if not self.shared:
            raise ValueError(f"{_OWN}, so there are no common states: use the causal LM")
        out: BaseModelOutputWithPast = super().forward(*args, **kwargs)
        return out

    def scope(self, prompt: Prompt, prompt_mask: Tensor | None) -> Prompt:
        """The prompt with what routing reads of it: the prompt mask, or the first tokens, or everything."""
        options = self.config.routing
        if options["kind"] in ("uniform", "fixed") or options["on"] == "sequence":
            return prompt
        real_BT = prompt.real_BT
        read_BT = real_BT & (real_BT.cumsum(-1) <= options["prefix_tokens"])
        if prompt_mask is not None:
            if prompt_mask.shape != real_BT.shape:
                raise ValueError(f"prompt_mask should be of shape {list(real_BT.shape)}, not {list(prompt_mask.shape)}")
            named_BT = prompt_mask.to(real_BT.device).bool() & real_BT
            read_BT = torch.where(named_BT.any(-1, keepdim=True), named_BT, read_BT)
        return replace(prompt, read_BT=read_BT)

    def path(self, expert: int, prompt: Prompt, lane: ExpertLane | None = None, keep: slice | Tensor = _ALL) -> Tensor:
        """Run one expert over the prompt: return its states in the width of the shared head, or its own logits, some of them."""
        model = self.experts[expert]
        if not self.shared:
            if prompt.input_ids_BT is None:
                raise ValueError(f"{_OWN}: pass input_ids, not inputs_embeds")
            return expert_logits(model, prompt, lane, keep)
        embeds_BTH = prompt.embeds_BTH if prompt.input_ids_BT is None else self.embed_tokens(prompt.input_ids_BT)
        embeds_BTD = self.projectors_in[expert](embeds_BTH)
        inner_BTD = run_expert(body(model), "last_hidden_state", prompt, lane, inputs_embeds=embeds_BTD)
        states_BTH: Tensor = self.projectors_out[expert](inner_BTD)
        return states_BTH[:, keep]


class MoergeHeterogeneousForCausalLM(RoutedForCausalLM, MoergeHeterogeneousPreTrainedModel):
    """The language model: head(sum_i alpha_i r_i), or log sum_i alpha_i p_i where every expert has a head of its own."""

    def __init__(self, config: MoergeHeterogeneousConfig) -> None:
        super().__init__(config)
        self.model = MoergeHeterogeneousModel(config)
        self.vocab_size = config.vocab_size
        if self.model.shared:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.routing["kind"] == "learned":
            own = [expert.get_input_embeddings().embedding_dim for expert in self.model.experts if not self.model.shared]
            self.router = nn.Linear(sum(own) or config.hidden_size, config.num_experts, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The shared head, else that of the first expert."""
        found: nn.Module = self.lm_head if self.model.shared else self.model.experts[0].get_output_embeddings()
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the shared head."""
        if not self.model.shared:
            raise ValueError(f"{_OWN}: they cannot be replaced by one")
        self.lm_head = new_embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The shared embedding, else that of the first expert."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the shared embedding."""
        self.model.set_input_embeddings(value)

    def check_routing(self, routing: dict[str, Any]) -> dict[str, Any]:
        """The routing with its defaults filled in, what it reads as it is now; ValueError says what is wrong with it."""
        now = {option: self.config.routing[option] for option in ("on", "prefix_tokens")}
        checked: dict[str, Any] = self.config.check_routing({**now, **routing})
        return checked

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MoergeHeterogeneousCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routing: Routing | None = None,
        past_key_values: MoergeHeterogeneousCache | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MoergeOutputWithPast:
        """Logits of the chosen experts' mixture, and the loss if `labels` are given.

        Without `routing` the sequences are routed by themselves: `prompt_mask` [B, T] says which tokens are the prompt. A filled
        cache goes on with the routing it was filled with.
        """
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, use_cache, logits_to_keep, routing)
        out: MoergeOutputWithPast = super().forward(*given, past_key_values, prompt_mask=prompt_mask, **kwargs)
        return out

    def embeddings(self, prompt: Prompt) -> Tensor:
        """The embeddings whose mean the gate reads: the shared ones, or those of all experts side by side."""
        if self.model.shared:
            return super().embeddings(prompt)
        if prompt.input_ids_BT is None:
            raise ValueError(f"{_OWN}: pass input_ids, not inputs_embeds")
        found = [expert.get_input_embeddings()(prompt.ids_BT) for expert in self.model.experts]
        return torch.cat([embeds_BTX.to(found[0].device) for embeds_BTX in found], -1)

    def path_nll(self, expert: int, prompt: Prompt, lane: ExpertLane | None = None) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of each sequence under one expert's path, and its states or logits."""
        found_BTX = self.model.path(expert, prompt, lane)
        head = self.lm_head if self.model.shared else nn.Identity()
        return sequence_nll(found_BTX, head, prompt, self.config.vocab_size), found_BTX

    def run(self, prompt: Prompt, routing: Routing | None, cache: Any, keep: slice | Tensor) -> Parts:
        """Run the chosen experts over the prompt, and return their outputs at the positions to keep."""
        parts: Parts = self.model.states(prompt, routing, cache, keep=keep)
        return parts

    def mix(self, parts: Parts, batch: int) -> Tensor:
        """Logits of the mixture."""
        if not self.model.shared:
            return log_mixture(parts, batch)
        logits: Tensor = self.lm_head(combine(parts, batch))
        return logits
