"""Perplexity routing written into gates: which expert predicts the next token best, by ridge regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from moerge.errors import InputError
from moerge.moe.calibrated import Accumulator, CalibratedRouter, gates_of
from moerge.moe.context import FitContext
from moerge.moe.regression import Normalize, logit_scale, ridge
from moerge.moe.router import Positive

if TYPE_CHECKING:
    import torch


class PerplexityRouter(CalibratedRouter):
    """`ridge` with another target: not whose text a token is from, but which expert predicts what follows best.

    Every text runs once through each expert. -log P is taken of each next token (`level: token`) or averaged over the text
    (`level: sequence`, as in MergeME's perplexity routing, section 3.1.3). The target is the expert with the least (`target:
    best`) or softmax(-loss / `softness`) over the experts (`target: softmax`). It takes as many passes as there are experts.
    Targets compare all experts, so there are no statistics to keep for later: a new expert means running all text again.
    """

    kind: ClassVar[str] = "perplexity"
    level: Literal["token", "sequence"] = "sequence"
    target: Literal["best", "softmax"] = "best"
    softness: Positive = 1.0
    penalty: Positive = 0.01
    normalize: Normalize = "columns"
    temperature: Positive = 0.1
    balance: bool = True

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """Regressions on the targets' share of every expert's text."""
        model = self.running(context)
        layers, hidden = len(context.gates), context.gates[0].shape[1]
        moment_LHH = np.zeros((layers, hidden, hidden))
        targets_LHE = np.zeros((layers, hidden, len(context.experts)))
        for index, expert in enumerate(context.experts):
            totals, products = Accumulator(), np.zeros_like(targets_LHE)
            for document in context.texts[expert].documents:
                ids_1T = model.encode(document, self.tokens)
                if ids_1T.shape[1] < 2:
                    continue
                target_TE = self.targets([model.losses(ids_1T, path) for path in range(len(context.experts))])
                # the last token's successor is unknown
                inputs_LTH = [state_TH[:-1] for state_TH in model.router_inputs(ids_1T, self.path_of(index))]
                totals.add(inputs_LTH)
                products += np.stack([(state_TH.T @ target_TE).double().cpu().numpy() for state_TH in inputs_LTH])
            if totals.tokens == 0:
                raise InputError(f"calibration.{expert}: no text has two tokens or more, which the perplexity router needs")
            share = 1 / totals.tokens if self.balance else 1.0
            moment_LHH += share * totals.moments({}).moment_LHH
            targets_LHE += share * products

        def gate(layer: int) -> np.ndarray:
            weights_EH = ridge(moment_LHH[layer], targets_LHE[layer], self.penalty)
            return logit_scale(weights_EH, self.normalize, self.temperature)

        return gates_of(context, gate)

    def targets(self, losses_E: list[torch.Tensor]) -> torch.Tensor:
        """What each expert should get for each token of a text, [T - 1, E], rows adding up to 1."""
        import torch

        losses_TE = torch.stack(losses_E, dim=1)
        if self.level == "sequence":
            losses_TE = losses_TE.mean(dim=0, keepdim=True).expand_as(losses_TE)
        if self.target == "softmax":
            return torch.softmax(-losses_TE / self.softness, dim=1)
        return torch.nn.functional.one_hot(losses_TE.argmin(dim=1), losses_TE.shape[1]).to(losses_TE.dtype)
