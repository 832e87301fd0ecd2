"""What computes tensors of the result once all others are there: routers fitted to text, projectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from moerge.calibration import Texts
    from moerge.moe.context import FitContext
    from moerge.moe.router import MoESize
    from moerge.recipe.schema import Recipe

Unit = Literal["texts", "tokens"]
"""What is counted while something is computed."""


class Fitter:
    """Computes the outputs whose operation is `Fit` with this very object.

    A subclass says in `fit` what they are, in `inputs` what text that takes, and in `memory_bytes` and `operations` what it
    costs. `title` is how the plan calls what is computed, `counts` what progress counts: see `steps`.
    """

    kind: ClassVar[str]
    counts: ClassVar[Unit] = "texts"

    @property
    def title(self) -> str:
        """What is computed, as in "the ridge router"."""
        raise NotImplementedError

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the values beside the tensors and texts that are read; shown by the plan."""
        return {}

    @property
    def runs_model(self) -> bool:
        """Whether the merged model is loaded for it, or an expert of it."""
        return False

    @property
    def runs_one_expert(self) -> bool:
        """Whether of experts that are whole models only one is loaded at a time."""
        return False

    @property
    def needs_torch(self) -> bool:
        """Whether torch and transformers are in memory while it works."""
        return True

    def inputs(self, recipe: Recipe, experts: Sequence[str]) -> tuple[Texts, ...]:
        """The calibration text of the experts, read while planning; InputError if something is missing."""
        return ()

    def require(self) -> None:
        """InputError if a package is not installed that this needs; asked before anything is written."""

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """What it holds in memory. `size` is that of the model and of the tensors that are computed."""
        return 0

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Floating-point operations that it takes, roughly."""
        return 0.0

    def steps(self, calibration: Sequence[Texts]) -> int:
        """How many texts or tokens (whichever it `counts`) `fit` goes through, which tells `context.advance` of those done."""
        return 0

    def fit(self, context: FitContext) -> Mapping[str, np.ndarray]:
        """float32 arrays of their shapes for all of `context.outputs` by name."""
        raise NotImplementedError

    def remarks(self, context: FitContext) -> tuple[str, ...]:
        """Warnings about what was computed, the same whether `fit` ran now or before an interruption."""
        return ()
