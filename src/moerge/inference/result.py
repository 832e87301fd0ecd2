"""The routing of texts by a MoE, as values. Shapes: E experts, L layers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moerge import figures
from moerge.formatting import Displayed


@dataclass(frozen=True)
class Oracle:
    """The experts that predict a text best when each gets whole documents alone, over the documents of two tokens or more.

    `best_E` is how often each expert has the lowest loss, `loss_E` their mean loss in nats a token. `accuracy` is how often the
    expert with the largest weight is the one with the lowest loss on the document.
    """

    best_E: tuple[float, ...]
    loss_E: tuple[float, ...]
    accuracy: float


@dataclass(frozen=True)
class TextRoute:
    """The routing of one text, averaged over its documents (and, in a token-routed model, over layers and tokens).

    `alpha_E` is the weight of each expert, `first_E` how often it is the one with the largest weight, `entropy` that of the
    weights in nats. `accuracy` is `first_E` of the expert of the same name, None if there is no such expert. `alpha_LE` are the
    weights in each layer of a token-routed model.
    """

    name: str
    documents: int
    alpha_E: tuple[float, ...]
    first_E: tuple[float, ...]
    entropy: float
    accuracy: float | None
    oracle: Oracle | None = None
    alpha_LE: tuple[tuple[float, ...], ...] = ()

    @property
    def oracle_accuracy(self) -> float | None:
        """Return the oracle's accuracy, if there is one."""
        return self.oracle.accuracy if self.oracle else None


@dataclass(frozen=True, repr=False)
class Routes(Displayed):
    """The routing of texts. `level` is "sequence" or "token".

    `digest` is that of the model's tensors, None where moerge did not merge them.
    """

    checkpoint: str
    level: str
    experts: tuple[str, ...]
    texts: tuple[TextRoute, ...]
    warnings: tuple[str, ...] = ()
    digest: str | None = None

    @property
    def accuracy(self) -> float | None:
        """The mean over the texts that have an expert of their name."""
        return _mean_of([text.accuracy for text in self.texts])

    @property
    def oracle_accuracy(self) -> float | None:
        """The mean over the texts, None where no losses were computed."""
        return _mean_of([text.oracle_accuracy for text in self.texts])

    @property
    def load_E(self) -> tuple[float, ...]:
        """Mean weight of each expert, every text counting the same."""
        return mean_of_rows([text.alpha_E for text in self.texts])

    @property
    def balance(self) -> float:
        """E * sum_i first_i * alpha_i over all texts: 1 where every expert gets the same, E where one gets everything."""
        first_E = mean_of_rows([text.first_E for text in self.texts])
        return len(self.experts) * sum(first * alpha for first, alpha in zip(first_E, self.load_E, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        return {
            "checkpoint": self.checkpoint,
            "digest": self.digest,
            "level": self.level,
            "experts": list(self.experts),
            "texts": {text.name: self._text_json(text) for text in self.texts},
            "accuracy": self.accuracy,
            "oracle_accuracy": self.oracle_accuracy,
            "load": self._by_name(self.load_E),
            "balance": self.balance,
            "warnings": list(self.warnings),
        }

    def _text_json(self, text: TextRoute) -> dict[str, Any]:
        return {
            "documents": text.documents,
            "alpha": self._by_name(text.alpha_E),
            "first": self._by_name(text.first_E),
            "entropy": text.entropy,
            "accuracy": text.accuracy,
            "oracle_accuracy": text.oracle_accuracy,
            "best": text.oracle and self._by_name(text.oracle.best_E),
            "loss": text.oracle and self._by_name(text.oracle.loss_E),
            "layers": [self._by_name(alpha_E) for alpha_E in text.alpha_LE] or None,
        }

    def _by_name(self, values_E: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.experts, values_E, strict=True))

    def to_csv(self) -> str:
        """A row for each text and expert."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["text", "documents", "expert", "alpha", "first", "best", "loss"])
        for text in self.texts:
            columns = [text.alpha_E, text.first_E, *((text.oracle.best_E, text.oracle.loss_E) if text.oracle else ())]
            for expert, *values in zip(self.experts, *columns, strict=True):
                cells = [f"{value:.6f}" for value in values]
                table.writerow([text.name, text.documents, expert, *cells, *[""] * (4 - len(cells))])
        return out.getvalue()

    def layers_csv(self) -> str:
        """A row for each text, layer and expert of a token-routed model."""
        rows = [
            {"text": text.name, "documents": text.documents, "layer": layer, "expert": expert, "alpha": f"{alpha:.6f}"}
            for text in self.texts
            for layer, alpha_E in enumerate(text.alpha_LE)
            for expert, alpha in zip(self.experts, alpha_E, strict=True)
        ]
        return figures.as_csv(rows)


def mean_of_rows(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of rows of equal length, column by column."""
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
