"""Quantised checkpoints: FP8, MXFP4 and NVFP4 become views of the numbers that their codes stand for; others are refused.

They are known by whatever says so: config.json, names of tensors, or matrices of codes beside their scales. A scale multiplies
its block, whatever it is called: `weight_scale_inv` by DeepSeek, `weight_scale` by compressed-tensors, ModelOpt and FBGEMM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.tensors.dtypes import BF16, F32, F64, FLOATS, DType
from moerge.tensors.minifloat import holds_scales
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.dequantized import Codes, Dequantized
from moerge.tensors.views.rounded import Rounded

_KEYS = ("quantization_config", "compression_config", "quantization")
_METHODS = {"fp8", "fbgemm_fp8", "mxfp4", "modelopt", "modelopt_fp4", "compressed-tensors"}
"""Values of `quant_method` whose tensors may be among those that are read."""
_NAMES = re.compile(
    r"(.*[._])?(weight_(scales?|scale_inv|scale_2|packed|zero_point|qdata|bitmask)|scale_weight|pre_quant_scale"
    r"|qweight|qzeros|absmax|quant_map|SCB|W_q)"
)
"""Names that GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and torchao give what they store beside or instead of weights."""
_SCALE = re.compile(r"(?P<owner>.+)[._](scales?|scale_inv|zeros?|zero_point|biases)")
_CODES = re.compile(r"(?P<owner>.+)[._](weight|blocks|codes|data)")
_ACTIVATIONS = re.compile(r".+[._]((input|activation|output)(_global)?|[qkv]|kv)_scale(_inv|_ub)?")
"""Scales of what is computed with the weights: full precision needs none."""
_FP8 = ("F8_E4M3", "F8_E5M2")


def with_numbers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with numbers that can be merged: instead of codes, of which its config then does not speak, and of float64.

    Raises InputError for codes that moerge does not read: merged as numbers they would be worth nothing.
    """
    checkpoint = _without_float64(checkpoint)
    settings = list(_settings(checkpoint.config))
    if not settings and next(_evidence(checkpoint.tensors), None) is None:
        return checkpoint
    reading = _Reading(checkpoint, settings)
    reading.check_method()
    tensors = {tensor.name: tensor for tensor in reading.tensors()}
    views = [tensor for tensor in tensors.values() if isinstance(tensor, Dequantized)]
    evidence = next(_evidence(tensors), None) or (None if views else f"config.json has {settings[0][0]!r}")
    if evidence:
        raise reading.refusal(evidence)
    note = f"{reading.label}{len(views)} quantised tensors are read as {reading.dtype.torch_name}: code times scale"
    return replace(checkpoint, config=_without_settings(checkpoint.config), tensors=tensors, notes=(*checkpoint.notes, note))


def _without_float64(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with float32 instead of float64; itself where it has none."""
    double = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype is F64]
    if not double:
        return checkpoint
    tensors = {name: Rounded(tensor, F32) if tensor.dtype is F64 else tensor for name, tensor in checkpoint.tensors.items()}
    label = f"{checkpoint.name}: " if checkpoint.name else ""
    note = f"{label}{len(double)} tensors of float64 are read as float32, such as {double[0]!r}"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


class _Reading:
    """A quantised checkpoint being understood, with what its config says about it by place."""

    def __init__(self, checkpoint: Checkpoint, settings: Sequence[tuple[str, Any]]) -> None:
        self.checkpoint, self._stored, self._settings = checkpoint, checkpoint.tensors, settings
        self.label = f"{checkpoint.name}: " if checkpoint.name else ""
        self.dtype = _dtype(checkpoint.config)
        self._block = next((block for _, value in settings if (block := _block_size(value))), None)

    def check_method(self) -> None:
        """InputError for methods of which moerge reads nothing."""
        for where, value in self._settings:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            if where.endswith("quantization") or (method is not None and method not in _METHODS):
                raise self.refusal(f"config.json has {where!r}", f" with {method}" if method else "")

    def refusal(self, evidence: str, method: str = "") -> InputError:
        return InputError(
            f"{self.label}{self.checkpoint.folder} is quantised{method} in a way that moerge does not read: "
            f"merge the unquantised checkpoint it was made from ({evidence})",
            code="quantised-model",
        )

    def tensors(self) -> Iterator[Tensor]:
        """All tensors in order: views instead of codes, and no scales."""
        views = {name: view for name in self._stored if (view := self._view(name))}
        used = {tensor.name for view in views.values() for tensor in (view.stored.scales, view.stored.factor) if tensor}
        for name, tensor in self._stored.items():
            if name in views:
                yield views[name]
            elif name not in used and not (_ACTIVATIONS.fullmatch(name) and tensor.size == 1):
                yield tensor

    def _view(self, name: str) -> Dequantized | None:
        """The numbers that a tensor's codes stand for; None where it is no codes that are read."""
        tensor = self._stored[name]
        if tensor.dtype.name in _FP8:
            scales = self._scales(f"{name}_scale_inv", f"{name}_scale", *_renamed(name, "scale", "qscale_weight", "scale_weight"))
            return self._blocks(name, tensor, scales) if scales else None
        if tensor.dtype.name not in ("U8", "I8") or not tensor.shape:
            return None
        if name.endswith("_blocks") and (scales := self._scales(f"{name.removesuffix('_blocks')}_scales")):
            return self._mxfp4(name.removesuffix("_blocks"), tensor, scales)
        if name.endswith(".weight_packed"):
            plain = name.removesuffix("_packed")
            scales, factor = self._scales(f"{plain}_scale"), self._stored.get(f"{plain}_global_scale")
            return self._blocks(plain, tensor, scales, packed=True, factor=factor, divides=True) if scales else None
        scales, factor = self._scales(f"{name}_scale", *_renamed(name, "scale")), self._stored.get(f"{name}_scale_2")
        if scales is None or scales.dtype.name not in ("F8_E4M3", "F8_E8M0"):  # of FP4; INT8 has scales of floats
            return None
        return self._blocks(name, tensor, scales, packed=True, factor=factor)

    def _scales(self, *names: str) -> Tensor | None:
        """The first of these tensors that is there and holds scales."""
        return next((t for name in names if (t := self._stored.get(name)) and holds_scales(t.dtype)), None)

    def _mxfp4(self, name: str, blocks: Tensor, scales: Tensor) -> Dequantized:
        """Experts as gpt-oss has them: [.., out, groups, bytes], in memory [.., in, out]."""
        if len(blocks.shape) < 3 or scales.shape != blocks.shape[:-1]:
            raise self._wrong(blocks, scales, f"{list(blocks.shape[:-1])}, one for each block")
        *leading, rows, groups, width = blocks.shape
        columns = groups * width * 2
        codes = Codes(blocks, scales, (*leading, rows, columns), (rows, groups), (1, width * 2), packed=True)
        return Dequantized(name, self.dtype, (*leading, columns, rows), codes, transposed=True)

    def _blocks(
        self, name: str, codes: Tensor, scales: Tensor, packed: bool = False, factor: Tensor | None = None, divides: bool = False
    ) -> Dequantized:
        """Matrices with scales of any block: a whole tensor, a row, a tile, a few elements of a row."""
        shape = (*codes.shape[:-1], codes.shape[-1] * (2 if packed else 1))
        matrices = (1, math.prod(shape)) if scales.size == 1 else shape
        grid = _grid(matrices, scales.shape)
        block = grid and self._block_of(matrices[-2:], grid)
        if grid is None or block is None:
            stated = f" of {list(self._block)}" if self._block else ""
            raise self._wrong(codes, scales, f"one for each block{stated}")
        if factor is not None and (factor.size != 1 or not factor.dtype.is_float):
            raise self._wrong(codes, factor, "a single float")
        return Dequantized(name, self.dtype, shape, Codes(codes, scales, matrices, grid, block, packed, factor, divides))

    def _block_of(self, shape: tuple[int, ...], grid: tuple[int, int]) -> tuple[int, int] | None:
        """The size of a block: the config's where that gives such a grid, which may end in smaller ones, else equal parts."""
        sizes = zip(shape, grid, self._block or (0, 0), strict=True)
        if self._block and all(-(-size // block) == count for size, count, block in sizes):
            return self._block
        if any(count == 0 or size % count for size, count in zip(shape, grid, strict=True)):
            return None
        return shape[0] // grid[0], shape[1] // grid[1]

    def _wrong(self, codes: Tensor, scales: Tensor, expected: str) -> InputError:
        return InputError(
            f"{self.label}tensor {scales.name!r} has shape {list(scales.shape)}, which does not fit {codes.name!r} of shape "
            f"{list(codes.shape)} (expected {expected}): fetch or copy the checkpoint again"
        )


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of scales for each matrix; None where there are not as many as matrices."""
    *leading, rows, _ = shape
    if math.prod(scales) == 1:
        return 1, 1
    if len(scales) == len(shape) and list(scales[:-2]) == leading:
        return scales[-2], scales[-1]
    if scales == (rows,) and not leading:
        return rows, 1
    return (1, 1) if list(scales) == leading else None


def _renamed(name: str, *others: str) -> tuple[str, ...]:
    """Names of what stands beside a module's weight; none for a tensor that is no module's."""
    module, _, last = name.rpartition(".")
    return tuple(f"{module}.{other}" for other in others) if last == "weight" else ()


def _dtype(config: Mapping[str, Any]) -> DType:
    """The type that transformers loads the numbers in: the config's, if that is a float, else bfloat16."""
    parts = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    named = (str(part.get(key)) for part in parts for key in ("dtype", "torch_dtype"))
    return next((FLOATS[name] for name in named if name in FLOATS), BF16)


def _block_size(settings: Any) -> tuple[int, int] | None:
    """The rows and columns of a block, as transformers and compressed-tensors write them."""
    if not isinstance(settings, Mapping):
        return None
    for key in ("weight_block_size", "block_structure"):
        match settings.get(key):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
    return next((block for value in settings.values() if (block := _block_size(value))), None)


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the keys that speak of quantisation, also inside the configs of parts."""
    return {
        key: _without_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _evidence(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"it has a tensor {name!r}" for name in tensors if _NAMES.fullmatch(name))
    owners = {match["owner"] for name in tensors if (match := _SCALE.fullmatch(name))}
    for name, tensor in tensors.items():
        match, kind = _CODES.fullmatch(name), tensor.dtype
        if match is None or kind.is_float or kind.name in ("F64", "BOOL", "I64") or len(tensor.shape) < 2:
            continue
        if match["owner"] in owners or not kind.name.startswith("F"):
            yield f"tensor {name!r} is stored as {kind.name}"


def _settings(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that speak of quantisation, also inside the configs of parts, with their values."""
    for key, value in config.items():
        if key in _KEYS and value:
            yield f"{where}{key}", value
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{where}{key}.")
