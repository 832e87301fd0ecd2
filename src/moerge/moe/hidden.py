"""Gates from mean router inputs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from moerge.moe.calibrated import MomentRouter, gates_of
from moerge.moe.context import FitContext
from moerge.moe.regression import logit_scale
from moerge.moe.router import Positive


class HiddenRouter(MomentRouter):
    """Row i of a gate is the mean router input over expert i's calibration text, minus the mean over the other experts' text.

    mergekit-moe's `hidden` gates, with two differences: the states are what Mixtral's router sees, after the norm behind
    attention, where mergekit takes the residual before attention; and unless `negative: none` the other experts' texts are the
    negative prompts. Positive means alone are close to parallel, since hidden states share a large common part. Rows get unit
    norm; logits are divided by `temperature`. A few prompts an expert suffice, but `ridge` uses the same text better.
    """

    kind: ClassVar[str] = "hidden"
    negative: Literal["others", "none"] = "others"
    temperature: Positive = 1.0

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """Means by layer and expert."""
        means_ELH = np.stack([moments.mean_LH for moments in self.moments(context)])
        if self.negative == "others":
            experts = len(means_ELH)
            others_ELH = (means_ELH.sum(axis=0) - means_ELH) / max(1, experts - 1)
            means_ELH = means_ELH - others_ELH
        return gates_of(context, lambda layer: logit_scale(means_ELH[:, layer], "columns", self.temperature))
