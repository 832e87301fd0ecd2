"""adapter_config.json as peft writes it: what is read of it, and what makes an adapter unusable as a merged model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moerge.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from moerge.errors import InputError

_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"}
_MERGE = "merge it into its base with peft (merge_and_unload) and name the resulting folder"
_REFUSED = {
    "layer_replication": f"repeats layers of the base, so its tensors are not those of the base: {_MERGE}",
    "megatron_config": "was trained on Megatron's parallel layers, whose tensors are not those of the base",
    "use_qalora": "pools its inputs (QALoRA), which is no change of the base's weights",
    "alora_invocation_tokens": "acts on some tokens only (aLoRA), which no merged weight can do",
    "use_bdlora": "is block-diagonal (BD-LoRA), which moerge does not read",
    "arrow_config": "routes between other adapters (Arrow), so it has no weights of its own to merge",
    "kasa_config": "truncates the base's weights (KaSA) before it adds to them",
    "monteclora_config": "samples its weights (MonteCLoRA)",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract something from the base's weights before training."""
_HARMLESS = frozenset(
    {
        *("auto_mapping", "bias", "corda_config", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights"),
        *(
            "layers_pattern",
            "layers_to_transform",
            "loftq_config",
            "lora_bias",
            "lora_dropout",
            "lora_ga_config",
            "megatron_core",
        ),
        *("parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
        *("velora_config", "lora_alpha_pattern", "merge_weights", "enable_lora"),
    }
)
"""Keys that matter to training or to where tensors were put, not to what they are worth."""


class AdapterConfig(BaseModel):
    """The settings that decide the values of merged tensors; names are peft's."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: list[str] = Field(default_factory=list)
    ensure_weight_tying: bool = False
    target_parameters: list[str] = Field(default_factory=list)
    peft_version: str = ""
    auto_mapping: dict[str, Any] = Field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] = Field(default_factory=list)

    @field_validator("*", mode="before")
    @classmethod
    def _absent(cls, value: Any, info: Any) -> Any:
        """Null means the default."""
        return cls.model_fields[info.field_name].get_default(call_default_factory=True) if value is None else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            try:
                re.compile(pattern)
            except (re.error, RecursionError):
                raise ValueError(f"{pattern!r} is not a regular expression") from None
        return value

    @property
    def base(self) -> str:
        """The model that the adapter was trained on, "" where it does not say."""
        return self.base_model_name_or_path or ""

    @property
    def by_unsloth(self) -> bool:
        """True if Unsloth has written it, of whose versions some pack the B of fused experts otherwise than peft reads it."""
        return bool(self.auto_mapping.get("unsloth_fixed"))

    @property
    def knows_layouts(self) -> bool:
        """True if a peft has written it that lets factors follow the layout of fused experts (0.19 and later)."""
        match = re.match(r"(\d+)\.(\d+)", self.peft_version)
        return match is not None and (int(match[1]), int(match[2])) >= (0, 19)

    def key_of(self, module: str) -> str:
        """The name that patterns of ranks mean a module by: a parameter's, where that was the target."""
        parameter = f"{module}.weight"
        return parameter if any(f".{parameter}".endswith(f".{target}") for target in self.target_parameters) else module

    def rank(self, module: str) -> int:
        """The rank of a module's factors: that of the first pattern that ends its name, else `r`."""
        return int(_matched(self.rank_pattern, self.key_of(module), self.r))

    def scale(self, module: str) -> float:
        """Return the factor of B @ A: alpha / r, with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023)."""
        rank, alpha = self.rank(module), _matched(self.alpha_pattern, self.key_of(module), self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Return whether a module was trained completely."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def trained_rows(self, module: str) -> tuple[int, ...]:
        """The numbers of the single rows of a module that were trained, in the order in which they are stored."""
        if isinstance(self.trainable_token_indices, list):
            return tuple(self.trainable_token_indices)
        return next((tuple(rows) for key, rows in self.trainable_token_indices.items() if f".{module}".endswith(f".{key}")), ())

    def remarks(self, name: str) -> list[str]:
        """A warning about keys of which nothing is known."""
        unknown = [key for key, value in (self.model_extra or {}).items() if value and key not in _HARMLESS]
        label = f"{name}: " if name else ""
        return [f"{label}{ADAPTER_CONFIG} has {key!r}, which moerge does not know and ignores" for key in unknown]


def _matched(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Match as peft's `get_pattern_key`: a pattern means the end of a module's name, from a dot or its beginning on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_adapter_config(adapter: Checkpoint) -> AdapterConfig:
    """The settings of an adapter; InputError if it is not a LoRA that amounts to changed weights of its base."""
    written = adapter.config
    where = f"{adapter.name}: " if adapter.name else ""
    path = adapter.folder / ADAPTER_CONFIG
    kind = str(written.get("peft_type")).upper()
    if kind in _PROMPTS:
        raise InputError(f"{where}{path}: a {kind} adapter adds virtual tokens or layers, no weights that could be merged")
    if kind != "LORA":
        raise InputError(f"{where}{path}: the adapter is of type {kind}, moerge reads LORA: {_MERGE}")
    for key, reason in _REFUSED.items():
        if written.get(key):
            raise InputError(f"{where}{path}: the adapter has {key!r}: it {reason}")
    start = str(written.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}{path}: the adapter was initialised by {start!r}, which changes the base's weights first: convert it with "
            "peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        return AdapterConfig.model_validate({**written, "peft_type": kind})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None


def describe_adapter(adapter: Checkpoint) -> dict[str, Any]:
    """Describe an adapter for people, also one that cannot be merged, with the `problem`."""
    written = adapter.config
    modules = {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0]: tensor.shape[0]
        for name, tensor in adapter.tensors.items()
        if re.search(r"\.lora_(A\.weight|embedding_A)$", name)
    }
    problem = None
    try:
        read_adapter_config(adapter)
    except InputError as error:
        problem = str(error)
    return {
        "type": str(written.get("peft_type")),
        "variants": [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if written.get(key)],
        "base": written.get("base_model_name_or_path"),
        "ranks": sorted(set(modules.values())),
        "alpha": written.get("lora_alpha"),
        "modules": sorted({name.rpartition(".")[2] for name in modules}),
        "modules_to_save": list(written.get("modules_to_save") or ()),
        "problem": problem,
    }
