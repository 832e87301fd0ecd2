"""The routing of texts by a MoE, as `route.json` holds it. Mappings are by expert. Shapes: E experts."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from moerge import figures
from moerge.results import Amount, Data, Result, Share


class TextRoute(Data):
    """The routing of one text, averaged over its documents (and, in a token-routed model, over layers and tokens).

    `alpha` is the weight of each expert, `first` how often it is the one with the largest weight, `entropy` that of the weights
    in nats. `accuracy` is `first` of the expert of the same name, None if there is no such expert. `layers` are the weights in
    each layer of a token-routed model.

    The oracle gives each expert whole documents alone, over the documents of two tokens or more: `best` is how often each expert
    has the lowest loss, `loss` their mean loss in nats a token, and `oracle_accuracy` how often the expert with the largest
    weight is the one with the lowest loss on the document.
    """

    documents: int
    alpha: Mapping[str, Share]
    first: Mapping[str, Share]
    entropy: float
    accuracy: Share | None
    oracle_accuracy: Share | None = None
    best: Mapping[str, Share] | None = None
    loss: Mapping[str, float] | None = None
    layers: tuple[Mapping[str, Share], ...] | None = None


class Routes(Result):
    """The routing of texts. `level` is "sequence" or "token".

    `digest` is that of the model's tensors, None where moerge did not merge them. Accuracies and `load`, the mean weight of each
    expert, are means over the texts, every one counting the same. `balance` is E * sum_i first_i * load_i: 1 where every expert
    gets the same, E where one gets everything.
    """

    checkpoint: str
    digest: str | None = None
    level: str
    experts: tuple[str, ...]
    texts: Annotated[Mapping[str, TextRoute], Field(min_length=1)]
    accuracy: Share | None
    oracle_accuracy: Share | None = None
    load: Mapping[str, Share]
    balance: Amount
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _same_experts(self) -> Routes:
        experts = set(self.experts)
        for name, text in self.texts.items():
            by_expert = (text.alpha, text.first, *(text.layers or ()), *(held for held in (text.best, text.loss) if held))
            if any(set(shares) != experts for shares in by_expert):
                raise ValueError(f"text {name!r} has other experts than the rest")
        if not experts or set(self.load) != experts:
            raise ValueError("the load is not that of the experts")
        return self

    def to_csv(self) -> str:
        """A row for each text and expert."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["text", "documents", "expert", "alpha", "first", "best", "loss"])
        for name, text in self.texts.items():
            for expert in self.experts:
                values = [held and f"{held[expert]:.6f}" for held in (text.alpha, text.first, text.best, text.loss)]
                table.writerow([name, text.documents, expert, *values])
        return out.getvalue()

    def layers_csv(self) -> str:
        """A row for each text, layer and expert of a token-routed model."""
        rows = [
            {"text": name, "documents": text.documents, "layer": layer, "expert": expert, "alpha": f"{alpha[expert]:.6f}"}
            for name, text in self.texts.items()
            for layer, alpha in enumerate(text.layers or ())
            for expert in self.experts
        ]
        return figures.as_csv(rows)


def routes_of(
    checkpoint: str,
    level: str,
    experts: Sequence[str],
    texts: Mapping[str, TextRoute],
    *,
    warnings: Sequence[str] = (),
    digest: str | None = None,
) -> Routes:
    """The routing of texts, with the means over them."""
    load_E = mean_of_rows([[text.alpha[expert] for expert in experts] for text in texts.values()])
    first_E = mean_of_rows([[text.first[expert] for expert in experts] for text in texts.values()])
    return Routes(
        checkpoint=checkpoint,
        digest=digest,
        level=level,
        experts=tuple(experts),
        texts=texts,
        accuracy=_known_mean([text.accuracy for text in texts.values()]),
        oracle_accuracy=_known_mean([text.oracle_accuracy for text in texts.values()]),
        load=dict(zip(experts, load_E, strict=True)),
        balance=len(experts) * sum(first * alpha for first, alpha in zip(first_E, load_E, strict=True)),
        warnings=tuple(warnings),
    )


def mean_of_rows(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of rows of equal length, column by column."""
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
