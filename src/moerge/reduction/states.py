"""Hidden states of texts between layers, in memory or, past a limit, in a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moerge.checkpoint.workspace import machine_errors

if TYPE_CHECKING:
    import torch

LIMIT = 1_000_000_000
"""Bytes of states that are held in memory; more lie in a file."""


class States:
    """One array [tokens, D] for all texts, in the type that the model computes in: float32, or bfloat16 by its bits.

    A text's states are replaced one by one, so there is one copy. `folder` is where the file lies if there is one.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: Any, folder: Path, *, limit: int = LIMIT) -> None:
        import torch

        self._half = dtype is torch.bfloat16
        self._ends = list(accumulate(lengths))
        kind, shape = np.dtype(np.int16 if self._half else np.float32), (sum(lengths), width)
        self.spilled = kind.itemsize * shape[0] * width > limit
        self._array: Any
        if self.spilled:
            with machine_errors(folder):
                self._array = np.memmap(folder / f"states-{id(self)}", kind, "w+", shape=shape)
        else:
            self._array = np.empty(shape, kind)

    def __len__(self) -> int:
        return len(self._ends)

    def _rows(self, text: int) -> slice:
        return slice(self._ends[text - 1] if text else 0, self._ends[text])

    def read(self, text: int) -> torch.Tensor:
        """A copy of a text's states, [T, D]."""
        import torch

        rows_TD = torch.from_numpy(np.array(self._array[self._rows(text)]))
        return rows_TD.view(torch.bfloat16) if self._half else rows_TD

    def write(self, text: int, state_TD: torch.Tensor) -> None:
        """Replace a text's states."""
        import torch

        values_TD = state_TD.cpu().contiguous()
        self._array[self._rows(text)] = (values_TD.view(torch.int16) if self._half else values_TD.float()).numpy()
