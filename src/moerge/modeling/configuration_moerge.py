"""Configuration of the sequence-routed model."""

# mypy: allow-untyped-calls

from __future__ import annotations

import copy
from dataclasses import is_dataclass
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PretrainedConfig

from .adapters_moerge import check_adapters
from .naming_moerge import FAMILIES, ROLES

if not is_dataclass(PretrainedConfig):
    raise ImportError(f"the sequence-routed model needs transformers 5.5 or newer, and this is {transformers.__version__}")

MIXES = ("layer", "output", "logits")

ROUTING_OPTIONS: dict[str, dict[str, Any]] = {
    "perplexity": {"top_k": 2, "temperature": 1.0},
    "task_vector": {"top_k": 2, "temperature": 1.0, "roles": None, "layers": None},
    "random": {"top_k": 2, "temperature": 1.0, "seed": 0},
    "uniform": {},
    "fixed": {"expert": None},
    "learned": {"top_k": 2, "temperature": 1.0},
}
"""The kinds of routing with their options and defaults."""


def _of_expert(name: str) -> Any:
    """A property that reads and writes the attribute of the experts' own configuration."""

    def read(self: MoergeConfig) -> Any:
        return getattr(self.expert_config, name)

    def write(self: MoergeConfig, value: Any) -> None:
        setattr(self.expert_config, name, value)

    return property(read, write, doc=f"`{name}` of the experts.")


class MoergeConfig(PretrainedConfig):
    """A model that holds several experts of one dense family and routes whole sequences to some of them.

    `expert_config`: configuration of the dense family, a dict with its `model_type` or a config object; one for all experts.
    `expert_names`: their names, in the order of their numbers.
    `separate`: the roles (ffn, attention, norm, embedding, head) of which every expert has its own; the others are shared.
    `adapters`: for experts that are low-rank adapters: then the separate roles are stored once, and each expert adds its own
    factors to them (see adapters_moerge).
    `mix`: "layer" sums the chosen experts' attention and FFN outputs on one residual stream (the paper's figure 1), "output"
    gives each chosen expert its own stream and sums the final states, "logits" mixes the probabilities (Branch-Train-Merge).
    `routing`: {"kind": ..., options}. Kinds: perplexity, task_vector, random, uniform, fixed, learned. Options: `top_k` (2),
    `temperature` (1.0, divides the scores; 1 is the paper's), `seed` of random, `expert` of fixed, `roles` and `layers` that take
    part in task_vector (default: every separate role, every layer). `top_k` lives here and not at the top level, where
    transformers would take it for a parameter of sampling.
    """

    model_type = "moerge"
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference = ["cache", "past_key_values", "routing"]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embed_tokens.*": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm.*": "keep_full_weight",
    }

    expert_config: Any = None
    expert_names: list[str] | None = None
    separate: list[str] | None = None
    mix: str = "layer"
    routing: Any = None
    adapters: Any = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    vocab_size = _of_expert("vocab_size")
    hidden_size = _of_expert("hidden_size")
    intermediate_size = _of_expert("intermediate_size")
    num_hidden_layers = _of_expert("num_hidden_layers")
    num_attention_heads = _of_expert("num_attention_heads")
    num_key_value_heads = _of_expert("num_key_value_heads")
    max_position_embeddings = _of_expert("max_position_embeddings")
    initializer_range = _of_expert("initializer_range")
    tie_word_embeddings = _of_expert("tie_word_embeddings")

    def __post_init__(self, **kwargs: Any) -> None:
        if "top_k" in kwargs:
            raise ValueError("top_k belongs inside `routing`: at the top level transformers takes it for one of sampling")
        self.expert_config = _expert_config(self.expert_config)
        self.expert_names = check_names(self.expert_names)
        self.separate = _separate(self.separate, tied=bool(self.expert_config.tie_word_embeddings))
        if self.mix not in MIXES:
            raise ValueError(f"mix should be one of {', '.join(MIXES)}, not {self.mix!r}")
        self.routing = check_routing(self.routing, self.expert_names, self.separate)
        self.adapters = check_adapters(self.adapters, self.expert_names, self.separate, self.num_hidden_layers)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.expert_config, name, None))
        if self.dtype is None:
            self.dtype = self.expert_config.dtype
        super().__post_init__(**kwargs)

    @property
    def num_experts(self) -> int:
        """Return the number of experts."""
        return len(self.expert_names or ())

    @property
    def streams_apart(self) -> bool:
        """Return whether every chosen expert has a residual stream of its own."""
        return self.mix != "layer"

    def modules_of(self, role: str) -> int:
        """Return the number of modules of a role: one when it is shared or the experts are adapters on it, else one per
        expert.
        """
        return self.num_experts if role in (self.separate or ()) and self.adapters is None else 1


def _expert_config(value: Any) -> Any:
    if isinstance(value, dict):
        values = copy.deepcopy(value)
        model_type = values.pop("model_type", None)
        value = AutoConfig.for_model(model_type, **values) if model_type in FAMILIES else model_type
    if isinstance(value, str):
        raise ValueError(f"experts of type {value!r} cannot be routed by sequence; types that can: {', '.join(FAMILIES)}")
    if not isinstance(value, PretrainedConfig):
        raise ValueError("expert_config should be the configuration of the experts, with its model_type")
    return value if value.model_type in FAMILIES else _expert_config({"model_type": value.model_type})


def check_names(given: Any) -> list[str]:
    """The experts' names; ValueError says what is wrong with them."""
    names: list[str] = list(given or ())
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expert_names should be one or more different names, not {names!r}")
    return names


def _separate(roles: Any, *, tied: bool) -> list[str]:
    roles = ["ffn"] if roles is None else list(roles)
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ValueError(f"separate names {unknown[0]!r}, which is no role; roles: {', '.join(ROLES)}")
    if tied and ("embedding" in roles) != ("head" in roles):
        raise ValueError("embedding and head are tied: keep both separate or neither")
    return [role for role in ROLES if role in roles]


def check_routing(routing: Any, expert_names: list[str], separate: list[str]) -> dict[str, Any]:
    """The routing with its defaults filled in; ValueError says what is wrong with it."""
    filled = fill_routing(routing, ROUTING_OPTIONS, expert_names)
    if filled["kind"] == "task_vector":
        _check_task_vector(filled, expert_names, separate)
    return filled


def fill_routing(routing: Any, options: dict[str, dict[str, Any]], expert_names: list[str]) -> dict[str, Any]:
    """Check what all kinds of routing have in common and fill in defaults; `options` are those of each kind."""
    given = dict(routing or {})
    kind = given.pop("kind", "perplexity")
    if kind not in options:
        raise ValueError(f"routing kind should be one of {', '.join(options)}, not {kind!r}")
    defaults = options[kind]
    unknown = [option for option in given if option not in defaults]
    if unknown:
        known = f"its options: {', '.join(defaults)}" if defaults else "it has no options"
        raise ValueError(f"routing kind {kind!r} has no option {unknown[0]!r}; {known}")
    filled = {"kind": kind, **defaults, **given}
    if "top_k" in filled and not (isinstance(filled["top_k"], int) and filled["top_k"] >= 1):
        raise ValueError(f"routing top_k should be a whole number of at least 1, not {filled['top_k']!r}")
    if "temperature" in filled and not (isinstance(filled["temperature"], int | float) and filled["temperature"] > 0):
        raise ValueError(f"routing temperature should be a number above 0, not {filled['temperature']!r}")
    if kind == "fixed" and filled["expert"] not in expert_names:
        raise ValueError(f"routing to the fixed expert {filled['expert']!r}: the experts are {', '.join(expert_names)}")
    return filled


def _check_task_vector(routing: dict[str, Any], expert_names: list[str], separate: list[str]) -> None:
    if "base" not in expert_names:
        raise ValueError(
            "task-vector routing needs the base as one of the experts, under the name 'base': "
            f"the experts are {', '.join(expert_names)}"
        )
    if not separate:
        raise ValueError("task-vector routing needs a role that is kept separate: with all shared the experts are equal")
    for role in routing["roles"] or ():
        if role not in separate:
            raise ValueError(f"task-vector routing over {role!r}, which is not separate; separate: {', '.join(separate)}")
