"""A router to start training from: every expert's row is at right angles to the others'."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moerge.plugins import FitContext, FittedRouter


class OrthogonalRouter(FittedRouter):
    """Rows of length `norm` at right angles to each other, drawn from `seed`, so that no two experts are chosen alike.

    Not for more experts than the model is wide.
    """

    kind: ClassVar[str] = "orthogonal"
    needs_training: ClassVar[bool] = True
    seed: int = 0
    norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def fit(self, context: FitContext) -> Mapping[str, np.ndarray]:
        """float32 [experts, hidden] for each layer's gate by name; `context` also has the merged model and calibration texts."""
        return {gate.name: self._gate(layer, *gate.shape) for layer, gate in enumerate(context.outputs)}

    def _gate(self, layer: int, experts: int, hidden: int) -> np.ndarray:
        drawn_HE = np.random.default_rng([self.seed, layer]).standard_normal((hidden, experts))
        basis_HE, _ = np.linalg.qr(drawn_HE)
        return (self.norm * basis_HE.T).astype(np.float32)
