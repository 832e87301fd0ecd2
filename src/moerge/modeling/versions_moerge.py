"""The parts of transformers that the models use, under the names of each version.

transformers renames arguments of methods that models override, and an argument under a new name is lost in `**kwargs`: the model
would go on without it. So all that is relied on is looked up here, and what is not there stops the import.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

import transformers

KNOWN = "5.5 to 5.24"


def unknown(found: object) -> ImportError:
    """The error for a transformers that does not have what the models need."""
    return ImportError(
        f"this moerge model's code is for transformers {KNOWN} and this is {transformers.__version__}, which differs ({found}): "
        "run `moerge refresh FOLDER` with a newer moerge, or install one of those"
    )


try:
    from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightTransform
    from transformers.masking_utils import create_masks_for_generate
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.pytorch_utils import Conv1D
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise unknown(error) from error

__all__ = [
    "CACHE",
    "CACHES",
    "AutoModelForCausalLM",
    "BaseModelOutputWithPast",
    "Cache",
    "CausalLMOutputWithPast",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "PreTrainedModel",
    "WeightTransform",
    "can_return_tuple",
    "check_overrides",
    "check_takes",
    "create_masks_for_generate",
    "get_checkpoint_conversion_mapping",
    "given_cache",
    "named",
]

CACHES = ("cache", "past_key_values")
"""Names of the cache: since 5.24, and before."""


def _cache_name() -> str:
    """The name that masks, outputs and `generate` have for the cache."""
    takers = (create_masks_for_generate, GenerationMixin.prepare_inputs_for_generation)
    places: list[Iterable[str]] = [signature(taker).parameters for taker in takers]
    for output in (BaseModelOutputWithPast, CausalLMOutputWithPast):
        places.append({field.name for field in fields(output)})
    for name in CACHES:
        if all(name in place for place in places):
            return name
    raise unknown(f"its cache is not called {' or '.join(CACHES)}")


CACHE = _cache_name()
"""The name of the cache in this transformers."""


def named(cache: Any) -> dict[str, Any]:
    """The cache as an argument."""
    return {CACHE: cache}


def given_cache(cache: Any, past_key_values: Any, others: Mapping[str, Any]) -> Any:
    """The cache that a forward pass got under one of its names; TypeError where it would be lost among the other arguments."""
    for name, value in others.items():
        if isinstance(value, Cache):
            raise TypeError(f"forward takes a cache as {' or '.join(CACHES)}, not as {name}: it would be lost")
    if cache is not None and past_key_values is not None:
        raise TypeError(f"forward got two caches, {' and '.join(CACHES)}: pass one of them")
    return past_key_values if cache is None else cache


def check_takes(function: Any, names: Iterable[str]) -> None:
    """ImportError where a function of transformers does not take these arguments by name."""
    missing = [name for name in names if name not in signature(function).parameters]
    if missing:
        raise unknown(f"{function.__qualname__} takes no {missing[0]}")


def check_overrides(mixin: type, base: type) -> None:
    """ImportError where `base` lacks a method that `mixin` overrides, or takes other arguments first."""
    for name, method in vars(mixin).items():
        if callable(method):
            if not hasattr(base, name):
                raise unknown(f"{base.__name__} has no {name}")
            ours = [one.name for one in signature(method).parameters.values() if one.kind == one.POSITIONAL_OR_KEYWORD]
            theirs = [one for one in signature(getattr(base, name)).parameters if one != "self"]
            if theirs[: len(ours) - 1] != ours[1:]:
                raise unknown(f"{name} takes {', '.join(theirs[: len(ours) - 1])} instead of {', '.join(ours[1:])}")
