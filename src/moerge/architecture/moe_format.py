"""Native token-routed MoEs that dense experts can be assembled into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moerge.architecture.family import Family

_CARRIED_OVER = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("max_position_embeddings", "tie_word_embeddings", "initializer_range", "attention_dropout"),
)
GROUPED_BYTES = 16
"""What torch's grouped matrix product, which transformers 5 runs experts by, wants rows to be multiples of."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SharedSlot:
    """A format's place for an expert that every token goes through, beside the routed ones: the roles `ffn.shared.*`.

    `keys(config)` are those of the MoE's config, made of a dense normalized one, that give it the width of an expert. Where it
    is `gated`, its output is multiplied by the sigmoid of what `ffn.shared_gate` says.
    """

    keys: Callable[[Mapping[str, Any]], dict[str, Any]]
    gated: bool = False
    weighs: bool = False


@dataclass(frozen=True)
class MoEFormat:
    """A native token-routed MoE that dense experts can be assembled into.

    `sources` are the model types that map exactly. `convert(config, experts, top_k)` makes the MoE's config from a dense
    normalized one; `unsupported_reason(config)` says what of a dense config the format cannot express, or None. `zero_roles`
    are the beginnings of roles, without their layer, that no dense model has and that are zero, `random_roles` those whose
    values do not matter but must not be zero. `fallback_for` are those of the sources that map to another format as well,
    which is preferred where it can be. `warning(config)` says which readers of the result get something else than the dense
    config says, or None.

    `shared` is the place for a shared expert. `layers(chosen)` are the config's keys that say which layers are mixtures, None
    where the format cannot say just these; without it a format has experts in every layer. `gate` is what makes weights of the
    router's logits, before they are made to add up to 1. `dense_module` begins the roles of the dense feed-forward module.

    A `family` without tensors has the table that transformers says for the MoE's config; `convert` then gives the keys that
    differ from the dense config as it is written, and is given the width of the feed-forward matrices as `intermediate_size`.
    """

    name: str
    family: Family
    sources: frozenset[str]
    convert: Callable[[Mapping[str, Any], int, int], dict[str, Any]]
    unsupported_reason: Callable[[Mapping[str, Any]], str | None]
    zero_roles: tuple[str, ...] = ()
    random_roles: tuple[str, ...] = ()
    fallback_for: frozenset[str] = frozenset()
    warning: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    shared: SharedSlot | None = None
    layers: Callable[[Sequence[bool]], dict[str, Any] | None] = lambda chosen: None
    gate: Literal["softmax", "sigmoid"] = "softmax"
    dense_module: str = "ffn"


def native_config(family: Family, config: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """config.json of a MoE of this family: what a dense normalized config has in common with it, and its `own` keys.

    Token ids are written even where there are none, since families assume different ones when they are missing.
    """
    carried = {key: config[key] for key in _CARRIED_OVER if key in config}
    tokens = {key: config.get(key) for key in _TOKENS}
    shared = {"output_router_logits": False, "use_cache": True}
    return {"architectures": [family.architecture], "model_type": family.model_type, **carried, **tokens, **own, **shared}
