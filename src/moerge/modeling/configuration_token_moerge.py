"""Configuration of a dense family's model whose feed-forward modules are mixtures, routed token by token."""

# mypy: allow-untyped-calls

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig


def _of_expert(name: str) -> Any:
    """A property that reads and writes the attribute of the experts' own configuration."""

    def read(self: MoergeTokenConfig) -> Any:
        return getattr(self.expert_config.get_text_config(), name)

    def write(self: MoergeTokenConfig, value: Any) -> None:
        setattr(self.expert_config.get_text_config(), name, value)

    return property(read, write, doc=f"`{name}` of the experts.")


class MoergeTokenConfig(PretrainedConfig):
    """A model of a dense family of transformers, whose feed-forward modules are mixtures of experts in some layers or all.

    `expert_config`: configuration of the dense family, a dict with its `model_type` or a config object.
    `expert_names`: the experts' names, in the order of their numbers.
    `feed_forward`: the name of the feed-forward module of a layer, such as `model.layers.{layer}.mlp`.
    `moe_layers`: the layers that are mixtures; all by default.
    `num_experts_per_tok`: how many experts a token goes to. Their weights are a softmax over their router logits.
    `shared_weight`: the share of a mixture's output that comes from an expert that every token goes through, None without one.
    """

    model_type = "moerge_token"
    has_no_defaults_at_init: ClassVar[bool] = True
    sub_configs: ClassVar[dict[str, Any]] = {"expert_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values", "router_logits"]

    expert_config: Any = None
    expert_names: list[str] | None = None
    feed_forward: str = "model.layers.{layer}.mlp"
    moe_layers: list[int] | None = None
    num_experts_per_tok: int = 2
    shared_weight: float | None = None
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    vocab_size = _of_expert("vocab_size")
    hidden_size = _of_expert("hidden_size")
    num_hidden_layers = _of_expert("num_hidden_layers")
    initializer_range = _of_expert("initializer_range")
    tie_word_embeddings = _of_expert("tie_word_embeddings")

    def __post_init__(self, **kwargs: Any) -> None:
        self.expert_config = _family_config(self.expert_config)
        self.expert_names = _names(self.expert_names)
        layers = self.num_hidden_layers
        self.moe_layers = list(range(layers)) if self.moe_layers is None else list(self.moe_layers)
        if not self.moe_layers or not all(type(layer) is int and 0 <= layer < layers for layer in self.moe_layers):
            raise ValueError(f"moe_layers should be numbers of some of the {layers} layers, not {self.moe_layers!r}")
        if type(self.num_experts_per_tok) is not int or not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok should be from 1 to {self.num_experts}, not {self.num_experts_per_tok!r}")
        if self.shared_weight is not None and not 0 < self.shared_weight < 1:
            raise ValueError(f"shared_weight should be between 0 and 1, not {self.shared_weight!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.expert_config.get_text_config(), name, None))
        if self.dtype is None:
            self.dtype = self.expert_config.dtype
        super().__post_init__(**kwargs)

    @property
    def num_experts(self) -> int:
        """Return the number of experts."""
        return len(self.expert_names or ())

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the dense family's, of which caches and masks are made."""
        return self.expert_config.get_text_config(decoder=decoder, encoder=encoder)


def _family_config(value: Any) -> Any:
    if isinstance(value, dict):
        values = copy.deepcopy(value)
        model_type = values.pop("model_type", None)
        if not isinstance(model_type, str):
            raise ValueError("expert_config should have the model_type of the experts")
        value = AutoConfig.for_model(model_type, **values)
    if not isinstance(value, PretrainedConfig):
        raise ValueError("expert_config should be the configuration of the experts, with its model_type")
    return value


def _names(given: Any) -> list[str]:
    names: list[str] = list(given or ())
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expert_names should be one or more different names, not {names!r}")
    return names
