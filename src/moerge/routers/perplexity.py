"""Perplexity routing written into gates: which expert predicts the next token best, by ridge regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from moerge.errors import InputError
from moerge.operations.fitter import FitContext
from moerge.routers.base import Temperature
from moerge.routers.calibrated import Accumulator, gates_by_name
from moerge.routers.regression import RegressionRouter
from moerge.runtime.forced_routing import ForcedRoutingModel
from moerge.runtime.replicas import ModelReplicas

if TYPE_CHECKING:
    import torch


class PerplexityRouter(RegressionRouter):
    """`ridge` with another target: not whose text a token is from, but which expert predicts what follows best.

    Every text runs once through each expert. -log P is taken of each next token (`level: token`) or averaged over the text
    (`level: sequence`, as in MergeME's perplexity routing, section 3.1.3). The target is the expert with the least (`target:
    best`) or softmax(-loss / `softness`) over the experts (`target: softmax`). It takes as many passes as there are experts.
    Targets compare all experts, so there are no statistics to keep for later: a new expert means running all text again.
    """

    kind: ClassVar[str] = "perplexity"
    level: Literal["token", "sequence"] = "sequence"
    target: Literal["best", "softmax"] = "best"
    softness: Temperature = 1.0

    def passes(self, experts: int) -> int:
        """Through every expert for the losses, and once for what the routers see."""
        return experts + 1

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """Regressions on the targets' share of every expert's text."""
        with self.replicas(context) as replicas:
            totals = [self._collect(replicas, context, index) for index in range(len(context.experts))]
        shares = [self.share(total.tokens) for total in totals]
        gram_LHH = sum(share * total.gram_LHH for share, total in zip(shares, totals, strict=True))
        targets_LHE = sum(share * total.product_LHC for share, total in zip(shares, totals, strict=True))
        return gates_by_name(context, lambda layer: self.solve(np.asarray(gram_LHH)[layer], np.asarray(targets_LHE)[layer]))

    def _collect(self, replicas: ModelReplicas, context: FitContext, index: int) -> Accumulator:
        experts, expert = range(len(context.experts)), context.experts[index]

        def look(model: ForcedRoutingModel, ids_1T: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
            target_TE = self.targets([model.losses(ids_1T, path) for path in experts])
            # the last token's successor is unknown
            return [state_TH[:-1] for state_TH in model.router_inputs(ids_1T, self.path_of(index))], target_TE

        totals = Accumulator(replicas)
        documents = context.texts[expert].documents
        ids = [ids_1T for document in documents if (ids_1T := replicas.model.encode(document, self.tokens)).shape[1] > 1]
        context.advance(len(documents) - len(ids))
        for batch in replicas.run(look, ids):
            totals.add([inputs for inputs, _ in batch], [targets for _, targets in batch])
            context.advance(len(batch))
        if totals.tokens == 0:
            raise InputError(f"calibration.{expert}: no text has two tokens or more, which the perplexity router needs")
        return totals

    def targets(self, losses_E: list[torch.Tensor]) -> torch.Tensor:
        """Return each expert's target for each token of a text, [T - 1, E], rows adding up to 1."""
        import torch

        losses_TE = torch.stack(losses_E, dim=1)
        if self.level == "sequence":
            losses_TE = losses_TE.mean(dim=0, keepdim=True).expand_as(losses_TE)
        if self.target == "softmax":
            return torch.softmax(-losses_TE / self.softness, dim=1)
        return torch.nn.functional.one_hot(losses_TE.argmin(dim=1), losses_TE.shape[1]).to(losses_TE.dtype)
