"""The parts of a batch that are learned, read, or padding. Shapes: B sequences, T tokens, N tokens of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moerge.tuning.packing import CONTEXT, LEARNED, PADDING


@dataclass(frozen=True, eq=False)
class Marks:
    """The marks of a batch's tokens; None where all of them are learned."""

    marks_BT: torch.Tensor | None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Marks:
        """The marks of a batch."""
        return cls(inputs.get("marks"))

    @property
    def learned_BT(self) -> torch.Tensor | None:
        """Return a mask of the tokens that are learned, None for all."""
        return None if self.marks_BT is None else self.marks_BT == LEARNED

    @property
    def count(self) -> int:
        """Return how many of the tokens that have one before them are learned."""
        assert self.learned_BT is not None
        return int(self.learned_BT[:, 1:].sum())

    def behind(self, start: int) -> Marks:
        """The marks from this token on."""
        return Marks(None if self.marks_BT is None else self.marks_BT[:, start:])

    def options(self, *, by_sequence: bool) -> dict[str, torch.Tensor]:
        """A model's mask of padding, and of what is no answer for one that routes `by_sequence`: to generate, it has no more."""
        if self.marks_BT is None:
            return {}
        read = {"prompt_mask": self.marks_BT == CONTEXT} if by_sequence else {}
        return {"attention_mask": (self.marks_BT != PADDING).long(), **read}

    def real(self, values_NX: torch.Tensor) -> torch.Tensor:
        """The rows [N, ...] of tokens that are no padding."""
        return values_NX if self.marks_BT is None else values_NX[(self.marks_BT != PADDING).flatten()]

    def predicting(self, values_BTX: torch.Tensor) -> torch.Tensor:
        """The rows [N, ...] of tokens whose next one is learned, of all tokens where all are."""
        if self.learned_BT is None:
            return values_BTX.flatten(0, 1)
        return values_BTX[F.pad(self.learned_BT[:, 1:], (0, 1), value=False)]
