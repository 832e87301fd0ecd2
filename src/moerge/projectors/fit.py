"""Projectors in closed form, from the shared tables and the experts' own.

Shapes: V tokens, M the shared width, D the expert's, N the width of the MLP, R rows of a block. A fitted projector is the
identity on the coordinates that both widths have, plus a correction that is the solution of a regression over the vocabulary:
where nothing is to be corrected, the correction is exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moerge.checkpoint.reader import open_folder
from moerge.operations.fitter import FitContext, Fitter, Unit
from moerge.projectors.token_weights import TokenWeights
from moerge.tensors.tables import Table, blocks
from moerge.tensors.tensor import Tensor
from moerge.texts import TextRequest, Texts

if TYPE_CHECKING:
    from moerge.operations.fitter import MoESize

ROWS = 512
"""Tokens of a block."""
PENALTY = 1e-6
"""What independent errors of a thousandth in each feature do, about those of rounding to bfloat16. There is nothing else to guard
against: the vocabulary is not a sample of something larger."""


class ProjectorFit(Fitter):
    """Either projector of an expert; `table` is the expert's own embedding or head on the shared vocabulary."""

    counts: ClassVar[Unit] = "tokens"

    def __init__(self, expert: str, table: Tensor, weights: TokenWeights, features: int) -> None:
        self.expert, self.table, self.weights, self.features = expert, table, weights, features

    @property
    def title(self) -> str:
        """Return the name of all experts' projectors together."""
        return "the projectors"

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The text that tokens are counted in, if the recipe names any."""
        return self.weights.inputs(request)

    @property
    def needs_torch(self) -> bool:
        """For the tokenizer, if there is text, and to run the expert."""
        return self.weights.have_text

    def require(self) -> None:
        """A tokenizer, if there is text."""
        self.weights.require()

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """The normal equations, once more while they are solved, and a few blocks."""
        return 8 * (2 * self.features**2 + 3 * self.features * self.table.shape[1] + 6 * ROWS * self.features)

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Sums of products over the vocabulary, in float64, and one solution."""
        rows, columns = self.table.shape
        return 2 * rows * self.features * (self.features + 2 * columns) + 4 / 3 * self.features**3

    def steps(self, calibration: Sequence[Texts]) -> int:
        """The rows of the table."""
        return self.table.shape[0]

    def pairs(self, context: FitContext, name: str) -> RowPairs:
        """The shared table of this name, which has been written already, beside the expert's own."""
        return RowPairs(Table(open_folder(context.folder, name="merged").tensors[name], "merged"), Table(self.table, self.expert))


class RowPairs:
    """The shared table [V, M] and an expert's own [V, D]."""

    def __init__(self, shared: Table, own: Table) -> None:
        assert shared.rows == own.rows and shared.columns >= own.columns
        self.shared, self.own = shared, own

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Some rows, the shared table's [R, M], and by how much the expert's own differ from their first columns [R, D]."""
        for start, stop in blocks(self.own.rows, ROWS):
            shared_RM = self.shared.read(start, stop).astype(np.float64)
            yield slice(start, stop), shared_RM, self.own.read(start, stop) - shared_RM[:, : self.own.columns]

    def mean(self, weights_V: np.ndarray) -> tuple[np.ndarray, bool]:
        """The weighted mean of the shared rows, float64 [M], and whether the expert's rows differ from them at all."""
        mean_M, differ = np.zeros(self.shared.columns), False
        for rows, shared_RM, residual_RD in self:
            mean_M += weights_V[rows] @ shared_RM
            differ = differ or bool(residual_RD.any())
        return mean_M, differ


def named(context: FitContext, **layers: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """Weight and bias of each layer, by the outputs' names."""
    values = {f"{layer}.{part}": pair[part == "bias"] for layer, pair in layers.items() for part in ("weight", "bias")}
    short = {output.name: ".".join(output.name.split(".")[-2:]) for output in context.outputs}
    return {name: values[key].astype(np.float32) for name, key in short.items()}
