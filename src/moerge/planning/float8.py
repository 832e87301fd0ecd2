"""Results in FP8: which tensors become codes with a scale for each block, and the config that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moerge.errors import InputError
from moerge.execution.float8 import BLOCK, Float8Pair
from moerge.operations.operations import Fit, Output
from moerge.tensors.dtypes import DTYPES, F32
from moerge.tensors.spec import TensorSpec

_LINEAR = re.compile(r"layers\.\d+\.(attention|ffn)\..+")


def float8_pairs(outputs: Sequence[Output]) -> dict[str, Float8Pair]:
    """The codes and scales that replace matrices of layers, by name: all whose sides are multiples of a block's."""
    return {output.name: _pair(output) for output in outputs if _is_linear(output) and not any(n % BLOCK for n in output.shape)}


def _is_linear(output: Output) -> bool:
    is_matrix = len(output.shape) == 2 and output.dtype.is_float and output.name.endswith(".weight")
    return is_matrix and _LINEAR.fullmatch(output.role) is not None


def _pair(output: Output) -> Float8Pair:
    rows, columns = output.shape
    codes = TensorSpec(output.name, output.role, DTYPES["F8_E4M3"], output.shape)
    return Float8Pair(codes, TensorSpec(f"{output.name}_scale_inv", "", F32, (rows // BLOCK, columns // BLOCK)))


def with_float8(config: Mapping[str, Any], outputs: Sequence[Output], source: str) -> dict[str, Any]:
    """The config with what tells programs that the result is FP8. InputError for results that they could not read so."""
    pairs = float8_pairs(outputs)
    fitted = next((output for output in outputs if isinstance(output.operation, Fit)), None)
    if fitted is not None:
        raise InputError(
            f"{source}: dtype float8: tensor {fitted.name!r} is computed from the merged model: merge with another dtype first, "
            "and that result once more with float8"
        )
    if not pairs or str(config.get("model_type", "")).endswith("moerge"):
        raise InputError(
            f"{source}: dtype float8 is for layers of a family that moerge knows, in transformers' own formats, whose sides are "
            f"multiples of {BLOCK}: choose another dtype"
        )
    plain = [output.name.removesuffix(".weight") for output in outputs if len(output.shape) == 2 and output.name not in pairs]
    fused = [
        name.rpartition(".")[0] for name in plain if ".experts." in name
    ]  # transformers converts all experts of a layer or none
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(dict.fromkeys((*plain, *(name.partition(".experts.")[0] + ".experts" for name in fused)))),
    }
    return {**config, "quantization_config": settings}
