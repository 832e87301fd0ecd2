"""A model of transformers that has shapes but no values, and the names that its tensors have on disk. Imports torch."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers

_UNREAD = ("auto_map", "quantization_config", "torch_dtype", "dtype", "_attn_implementation", "transformers_version")
"""Keys that change no tensor's name or shape."""


class NoTableError(Exception):
    """The reason, in a few words, why transformers cannot say a model's table."""


def settings_of(config: Mapping[str, Any]) -> Any:
    """The config as transformers reads it. Raises NoTableError."""
    kind = str(config.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise NoTableError(f"transformers {transformers.__version__} does not know this type")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict({k: _numbers(v) for k, v in config.items() if k not in _UNREAD})
    except Exception as error:  # each family's config checks in its own way
        raise NoTableError(f"transformers cannot read config.json: {_short(error)}") from None


def _numbers(value: Any) -> Any:
    """A value with infinity as a number, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(str(value["__float__"])) if set(value) == {"__float__"} else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(entry) for entry in value] if isinstance(value, list) else value


def enlarge(settings: Any, more: int) -> None:
    """Add `more` tokens to the vocabulary, in all places where a config has its size."""
    for part in {id(part): part for part in (settings, settings.get_text_config(decoder=True))}.values():
        for key in [key for key, value in vars(part).items() if key.startswith("vocab_size") and type(value) is int]:
            setattr(part, key, getattr(part, key) + more)


def attribute(settings: Any, key: str) -> Any:
    """A value of a config, None where it has none or one for each layer."""
    try:
        return getattr(settings, key, None)
    except Exception:  # transformers refuses to read one value where layers have their own
        return None


def _class_of(settings: Any, config: Mapping[str, Any]) -> Any:
    """The class that config.json names, or else the one that transformers has for its type."""
    named = config.get("architectures")
    kind = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class is type(settings):
        return kind
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel):
        if type(settings) in auto._model_mapping:
            found = auto._model_mapping[type(settings)]
            return found[0] if isinstance(found, tuple | list) else found
    raise NoTableError(f"transformers {transformers.__version__} has no language model of this type")


@dataclass(frozen=True)
class MetaModel:
    """A model without values, and its tensors by their names on disk and in memory; tied ones once."""

    model: Any
    settings: Any
    files: Mapping[str, Any]
    memory: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Any, config: Mapping[str, Any]) -> MetaModel:
        """The model of a config. Raises NoTableError."""
        kind = _class_of(settings, config)
        try:
            with torch.device("meta"):
                model = kind(settings)
            model.tie_weights()
        except Exception as error:  # whatever a config that fits no model makes its code raise
            raise NoTableError(f"transformers cannot make a {kind.__name__} of config.json: {_short(error)}") from None
        memory = dict(_untied(model))
        return cls(model, settings, as_stored(model, memory), memory)

    @cached_property
    def text(self) -> Any:
        """The config of the language model, or of its decoder."""
        return self.settings.get_text_config(decoder=True)

    def stored_name(self, parameter: Any) -> str:
        """The name on disk of a parameter, "" for None and one that no file has by itself."""
        return next((name for name, value in self.files.items() if value is parameter), "")


def _untied(model: Any) -> Iterator[tuple[str, Any]]:
    """Tensors by name, of tied ones the one that is saved."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict(keep_vars=True)
    owners: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in tied):  # stable: those that are tied to others come last
        owners.setdefault(id(state[name]), name)
    yield from ((name, value) for name, value in state.items() if owners[id(value)] == name)


def as_stored(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by their names on disk, in the layout that they have there."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 stores them as they are in memory
        return dict(values)
    return dict(revert_weight_conversion(model, dict(values)))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
