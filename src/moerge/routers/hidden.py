"""Gates from mean router inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from moerge.errors import InputError
from moerge.operations.fitter import FitContext
from moerge.routers.base import Temperature
from moerge.routers.calibrated import MomentRouter, gates_by_name
from moerge.routers.prompts import Prompts, direction, prompt_texts
from moerge.routers.regression import normalize_gate
from moerge.texts import TextRequest, Texts

if TYPE_CHECKING:
    import torch

    from moerge.runtime.forced_routing import ForcedRoutingModel


class HiddenRouter(MomentRouter):
    """Row i of a gate is the mean router input over expert i's calibration text, minus the mean over the other experts' text.

    mergekit-moe's `hidden` gates, with two differences: the states are what Mixtral's router sees, after the norm behind
    attention, where mergekit takes the residual before attention; and unless `negative: none` the other experts' texts are the
    negative prompts. Positive means alone are close to parallel, since hidden states share a large common part. Rows get unit
    norm; logits are divided by `temperature`. A few prompts an expert suffice, but `ridge` uses the same text better.

    `prompts` stand in the recipe instead of calibration text: each counts as one, by the mean over its tokens or, with
    `pool: last` (as mergekit), by its last token; negative ones are subtracted.
    """

    kind: ClassVar[str] = "hidden"
    negative: Literal["others", "none"] = "others"
    temperature: Temperature = 1.0
    prompts: dict[str, Prompts] | None = None
    pool: Literal["mean", "last"] = "mean"

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The prompts, else the calibration text."""
        if self.prompts is None:
            return super().inputs(request)
        if self.statistics is not None:
            raise InputError(f"{request.source}: moe.router: prompts are few and have no 'statistics': remove one of the two")
        return prompt_texts(self.prompts, request.experts, request.source)

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """Means by layer and expert."""
        if self.prompts is None:
            means_ELH = np.stack([moments.mean_LH for moments in self.moments(context)])
        else:
            means_ELH = self._prompt_means(context, self.prompts)
        if self.negative == "others":
            experts = len(means_ELH)
            others_ELH = (means_ELH.sum(axis=0) - means_ELH) / max(1, experts - 1)
            means_ELH = means_ELH - others_ELH
        return gates_by_name(context, lambda layer: normalize_gate(means_ELH[:, layer], "columns", self.temperature))

    def _prompt_means(self, context: FitContext, prompts: Mapping[str, Prompts]) -> np.ndarray:
        rows = []
        with self.replicas(context) as replicas:
            for index, name in enumerate(context.experts):
                own, seen = prompts[name], partial(_router_inputs, path=self.path_of(index))
                ids = [replicas.model.encode(text, self.tokens) for text in own.documents]
                states = []
                for batch in replicas.run(seen, ids):
                    states += [self._pooled(inputs_LTH) for inputs_LTH in batch]
                    context.advance(len(batch))
                rows.append(direction(states[: len(own.positive)], states[len(own.positive) :]))
        return np.stack(rows)

    def _pooled(self, inputs_LTH: Sequence[torch.Tensor]) -> np.ndarray:
        """One text's state in each layer, [L, H]."""
        states = [state_TH[-1] if self.pool == "last" else state_TH.double().mean(dim=0) for state_TH in inputs_LTH]
        return np.stack([state_H.cpu().double().numpy() for state_H in states])


def _router_inputs(model: ForcedRoutingModel, ids_1T: torch.Tensor, path: int | None) -> list[torch.Tensor]:
    return model.router_inputs(ids_1T, path)
