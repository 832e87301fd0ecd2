"""Quantised checkpoints, by whatever says so: config.json, names of tensors, or matrices of codes beside their scales."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError

_KEYS = ("quantization_config", "compression_config", "quantization")
_NAMES = re.compile(
    r"(.*[._])?(weight_(scales?|scale_inv|scale_2|packed|zero_point|qdata)|scale_weight|qweight|qzeros|absmax|quant_map|SCB|W_q)"
)
"""Names that GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and torchao give what they store beside or instead of weights."""
_SCALE = re.compile(r"(?P<owner>.+)[._](scales?|scale_inv|zeros?|zero_point|biases)")
_CODES = re.compile(r"(?P<owner>.+)[._](weight|blocks|codes|data)")


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """InputError for a checkpoint whose tensors are codes: merged as numbers they would be worth nothing."""
    evidence = next(_evidence(checkpoint), None)
    if evidence:
        label = f"{checkpoint.name}: " if checkpoint.name else ""
        raise InputError(
            f"{label}{checkpoint.folder} is quantised: merge the unquantised checkpoint it was made from ({evidence})",
            code="quantised-model",
        )


def _evidence(checkpoint: Checkpoint) -> Iterator[str]:
    yield from (f"config.json has {key!r}" for key in _settings(checkpoint.config))
    yield from (f"it has a tensor {name!r}" for name in checkpoint.tensors if _NAMES.fullmatch(name))
    owners = {match["owner"] for name in checkpoint.tensors if (match := _SCALE.fullmatch(name))}
    for name, tensor in checkpoint.tensors.items():
        match, kind = _CODES.fullmatch(name), tensor.dtype
        if match is None or kind.is_float or kind.name in ("F64", "BOOL", "I64") or len(tensor.shape) < 2:
            continue
        if match["owner"] in owners or not kind.name.startswith("F"):
            yield f"tensor {name!r} is stored as {kind.name}"


def _settings(config: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The keys that speak of quantisation, also inside the configs of parts."""
    for key, value in config.items():
        if key in _KEYS and value:
            yield f"{where}{key}"
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{where}{key}.")
