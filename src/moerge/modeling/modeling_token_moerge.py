"""A dense family's model whose feed-forward modules are mixtures, routed token by token (Branch-Train-Mix for any family)."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from .configuration_token_moerge import MoergeTokenConfig
from .stacked_moerge import MoergeTopKRouter, RoutedFeedForward, StackedLinear
from .versions_moerge import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

_OF_FAMILY = ("_is_stateful", "_no_split_modules", "_can_compile_fullgraph", "main_input_name")
"""What generation and placement ask a class, and the dense family's answers."""


class MoergeTokenForCausalLM(PreTrainedModel, GenerationMixin):
    """The dense family's own model with routed feed-forward modules; everything else, masks and caches too, is the family's."""

    config_class = MoergeTokenConfig
    base_model_prefix = "dense"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MoergeTokenConfig) -> None:
        super().__init__(config)
        self.dense = AutoModelForCausalLM.from_config(config.expert_config, dtype=config.dtype)
        for layer in config.moe_layers or ():
            self._route(config, config.feed_forward.format(layer=layer))
        for name in _OF_FAMILY:
            if hasattr(self.dense, name):
                setattr(self, name, getattr(self.dense, name))
        self._takes = frozenset(signature(self.dense.forward).parameters)
        self._routers = [module for module in self.modules() if isinstance(module, MoergeTopKRouter)]
        self.post_init()

    def _route(self, config: MoergeTokenConfig, name: str) -> None:
        """Replace a feed-forward module of the dense model. ValueError if it has none of this name."""
        parent, _, last = name.rpartition(".")
        try:
            holder = self.dense.get_submodule(parent)
            module = holder.get_submodule(last)
        except AttributeError:
            raise ValueError(f"feed_forward: models of type {config.expert_config.model_type!r} have no {name}") from None
        sizes = (config.num_experts, config.hidden_size, config.num_experts_per_tok)
        setattr(holder, last, RoutedFeedForward(module, *sizes, config.shared_weight).to(next(module.parameters()).dtype))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StackedLinear | MoergeTopKRouter):
            nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> Any:
        """The dense model's."""
        return self.dense.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the dense model's."""
        self.dense.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The dense model's head."""
        return self.dense.get_output_embeddings()

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the dense model's head."""
        self.dense.set_output_embeddings(value)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare them in the dense family's way."""
        return self.dense.prepare_inputs_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense._update_model_kwargs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The dense family's output; `output_router_logits` adds each mixture's logits [T, E] as `router_logits`.

        `position_ids` and `logits_to_keep` are what `generate` computes for models whose signature has them.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        given = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        kwargs |= {name: value for name, value in given.items() if name in self._takes}
        with self._recorded(wanted) as logits:
            output = self.dense(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if wanted and not isinstance(output, tuple):
            output["router_logits"] = tuple(logits)
        return output

    @contextmanager
    def _recorded(self, wanted: bool) -> Iterator[list[Tensor]]:
        logits: list[Tensor] = []
        routers = self._routers if wanted else []
        handles = [router.register_forward_hook(lambda module, inputs, output: logits.append(output[0])) for router in routers]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()
