"""Configuration of the model that holds experts of different architectures."""

# mypy: allow-untyped-calls

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .configuration_moerge import ROUTING_OPTIONS, check_names, fill_routing

if TYPE_CHECKING:  # transformers 5.5 to 5.9 copies the files that this one names, and not those that they import
    from .adapters_moerge import adapted as adapted
    from .naming_moerge import FAMILIES as FAMILIES

EMBEDDINGS = ("shared", "separate")
ROUTES_ON = ("prefix", "sequence")
_SCOPE: dict[str, Any] = {"on": "prefix", "prefix_tokens": 64}

HETEROGENEOUS_ROUTING_OPTIONS: dict[str, dict[str, Any]] = {
    kind: {**options, **_SCOPE} for kind, options in ROUTING_OPTIONS.items() if kind != "task_vector"
}
"""The kinds of routing with their options and defaults; there are no task vectors between different architectures."""

_NOT_KEPT = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype")


class MoergeHeterogeneousConfig(PretrainedConfig):
    """A model that holds whole experts of different architectures and routes whole sequences to some of them.

    `expert_configs`: the experts' configurations (dicts with their `model_type`, or config objects), each with its own
    `vocab_size`: that of the checkpoint that it comes from.
    `expert_names`: their names, in the order of their numbers.
    `vocab_size`, `hidden_size`: rows and width of the embedding and head that all experts share. With separate embeddings every
    expert's embedding and head have `vocab_size` rows, and `hidden_size` is the largest width.
    `embedding`: "shared" puts all experts between one embedding and one head, with projectors into and out of each (the paper's
    section 3.2); "separate" gives each expert its own on the common vocabulary, and mixes probabilities.
    `projectors`: {"linear": bool, "width": int}, what a projector is made of; None where the embedding is separate.
    `head_bias`: whether the shared head has a bias.
    `routing`: {"kind": ..., options}. Kinds: perplexity, random, uniform, fixed, learned, with the options of `MoergeConfig`, and
    `on`: "prefix" (default) reads the tokens of `prompt_mask` where forward gets one, else the first `prefix_tokens` (64);
    "sequence" reads all tokens, which is the paper's and in training shows the router the tokens that are to be predicted.
    """

    model_type = "moerge_heterogeneous"
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference = ["cache", "past_key_values", "routing"]

    expert_configs: Any = None
    expert_names: list[str] | None = None
    vocab_size: Any = None
    hidden_size: Any = None
    embedding: str = "shared"
    projectors: Any = None
    head_bias: bool = False
    routing: Any = None
    use_cache: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "top_k" in kwargs:
            raise ValueError("top_k belongs inside `routing`: at the top level transformers takes it for one of sampling")
        self.expert_names = check_names(self.expert_names)
        given = list(self.expert_configs) if isinstance(self.expert_configs, list | tuple) else []
        if len(given) != len(self.expert_names):
            raise ValueError(
                f"expert_configs should be a list of {len(self.expert_names)} configurations, one for each expert name"
            )
        self.expert_configs = [_plain(config) for config in given]
        configs = [self.expert_config(expert) for expert in range(self.num_experts)]
        for name in ("vocab_size", "hidden_size"):
            _check_size(name, getattr(self, name))
        self._check_embedding()
        self.routing = self.check_routing(self.routing)
        lengths = [getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) for config in configs]
        self.max_position_embeddings = min((length for length in lengths if isinstance(length, int)), default=None)
        if self.dtype is None:
            self.dtype = configs[0].dtype
        super().__post_init__(**kwargs)

    def _check_embedding(self) -> None:
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"embedding should be one of {', '.join(EMBEDDINGS)}, not {self.embedding!r}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings should be false: the shared embedding and head are two tensors")
        if self.embedding == "separate":
            if self.projectors is not None or self.head_bias:
                raise ValueError("with separate embeddings there are no projectors and no shared head: leave them out")
            return
        if not isinstance(self.projectors, dict) or set(self.projectors) != {"linear", "width"}:
            raise ValueError(f'projectors should be {{"linear": true or false, "width": number}}, not {self.projectors!r}')
        if not isinstance(self.projectors["linear"], bool):
            raise ValueError(f"projectors linear should be true or false, not {self.projectors['linear']!r}")
        _check_size("projectors width", self.projectors["width"])

    def check_routing(self, routing: Any) -> dict[str, Any]:
        """The routing with its defaults filled in; ValueError says what is wrong with it."""
        assert self.expert_names is not None
        filled = fill_routing(routing, HETEROGENEOUS_ROUTING_OPTIONS, self.expert_names)
        if filled["on"] not in ROUTES_ON:
            raise ValueError(f"routing on should be one of {', '.join(ROUTES_ON)}, not {filled['on']!r}")
        _check_size("routing prefix_tokens", filled["prefix_tokens"])
        return filled

    @property
    def num_experts(self) -> int:
        """Return the number of experts."""
        return len(self.expert_names or ())

    @property
    def streams_apart(self) -> bool:
        """Return whether every chosen expert has a residual stream of its own."""
        return True

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """Return the FSDP2 plan for the modules outside the experts."""
        shared = ("embed_tokens", "projectors_in.*", "projectors_out.*") if self.embedding == "shared" else ()
        return dict.fromkeys(shared, "free_full_weight")

    def expert_config(self, expert: int) -> PretrainedConfig:
        """A new configuration object of an expert, as its own checkpoint has it; ValueError where it cannot be an expert."""
        assert self.expert_names is not None
        values, name = copy.deepcopy(self.expert_configs[expert]), self.expert_names[expert]
        model_type = values.pop("model_type")
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                f"expert {name!r} is of type {model_type!r}, which this transformers has no language model for; "
                "code that comes with a checkpoint is never run"
            )
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
        text = config.get_text_config(decoder=True)
        encodes = model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "xlnet") and not getattr(text, "is_decoder", False)
        if config.is_encoder_decoder or encodes:
            raise ValueError(f"expert {name!r} is of type {model_type!r} and no decoder-only model: it cannot be an expert")
        if getattr(text, "hidden_size_per_layer_input", 0):
            raise ValueError(
                f"expert {name!r} of type {model_type!r} reads the tokens again in every layer: it cannot be an expert"
            )
        return config


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as it stands in config.json."""
    if isinstance(config, PretrainedConfig):
        config = config.to_dict()
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError("expert_configs should be the configurations of the experts, each with its model_type")
    if config.get("quantization_config"):
        raise ValueError(f"an expert of type {config['model_type']!r} is quantized: experts are needed in full precision")
    found = {key: copy.deepcopy(value) for key, value in config.items() if key not in _NOT_KEPT}
    dtype = found.pop("dtype", None) or config.get("torch_dtype")
    return {**found, **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})}


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} should be a whole number of at least 1, not {value!r}")
