"""Element types as safetensors names them, and their names in config.json."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type.

    `storage` is the NumPy type its bits are held in: NumPy has no bfloat16, so that one travels as uint16.
    `torch_name` is what config.json calls it, None for types that no model config names.
    """

    name: str
    storage: np.dtype
    torch_name: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.storage.itemsize

    @property
    def is_float(self) -> bool:
        """Return whether merge arithmetic is defined on it."""
        return self.torch_name is not None


BF16 = DType("BF16", np.dtype("<u2"), "bfloat16")
F16 = DType("F16", np.dtype("<f2"), "float16")
F32 = DType("F32", np.dtype("<f4"), "float32")

_PLAIN = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4"}
_PLAIN |= {"U16": "<u2", "U8": "u1", "BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"}

DTYPES: dict[str, DType] = {t.name: t for t in (BF16, F16, F32)} | {k: DType(k, np.dtype(v)) for k, v in _PLAIN.items()}
F64 = DTYPES["F64"]
"""Read as float32, in which everything is computed."""
FLOATS: dict[str, DType] = {t.torch_name: t for t in (BF16, F16, F32) if t.torch_name}
