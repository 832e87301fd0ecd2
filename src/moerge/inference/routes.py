"""Which expert gets which text: MergeME's table 2 for sequence-routed models, its figure 5 for token-routed ones.

Shapes: D documents, E experts, L layers, T tokens, H hidden.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moerge.analysis import figures
from moerge.calibration import check_disjoint, read_documents
from moerge.checkpoint.manifest import to_json, weights_digest
from moerge.errors import InputError
from moerge.inference import figure
from moerge.inference.loading import Loaded, load
from moerge.inference.weighing import Weighed, Weigher, weigher

TOKENS = 512


@dataclass(frozen=True)
class Oracle:
    """Which experts predict a text best when each expert gets whole documents alone, over the documents of two tokens or more.

    `best_E` is how often each expert has the lowest loss, `loss_E` their mean loss in nats a token. `accuracy` is how often the
    expert with the largest weight is the one with the lowest loss on the document.
    """

    best_E: tuple[float, ...]
    loss_E: tuple[float, ...]
    accuracy: float


@dataclass(frozen=True)
class TextRoute:
    """How one text is routed, averaged over its documents (and, in a token-routed model, over layers and tokens).

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
        """That of the oracle, if there is one."""
        return self.oracle.accuracy if self.oracle else None


@dataclass(frozen=True)
class Routes:
    """How texts are routed. `level` is "sequence" or "token".

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
        return _mean([text.alpha_E for text in self.texts])

    @property
    def balance(self) -> float:
        """E * sum_i first_i * alpha_i over all texts: 1 where every expert gets the same, E where one gets everything."""
        first_E = _mean([text.first_E for text in self.texts])
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

    def write(self, folder: Path) -> None:
        """Write `route.json` and `route.csv`, of token-routed models also `route-layers.csv`, and figures of both as SVG and PNG
        where matplotlib is installed; the folder is made if need be. Raises InputError if it cannot be.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "route.json").write_bytes(to_json(self.to_json()))
            (folder / "route.csv").write_text(self.to_csv(), encoding="utf-8")
            if any(text.alpha_LE for text in self.texts):
                (folder / "route-layers.csv").write_text(self.layers_csv(), encoding="utf-8")
            if figures.available():
                figure.write(self, folder)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None


def route(
    checkpoint: str | Path | Loaded,
    texts: Mapping[str, str],
    *,
    limit: int = 100,
    tokens: int = TOKENS,
    oracle: bool = True,
    allow_calibration_text: bool = False,
    trust_remote_code: bool = False,
) -> Routes:
    """How a MoE routes the first `limit` documents, up to `tokens` tokens of each, of files (txt, jsonl, parquet) by name.

    A text that has an expert's name is taken to be of that expert's domain. `oracle` also runs every document through each expert
    alone, as many more passes as there are experts, except where the routing has computed the same losses (`perplexity`).
    Raises InputError if a text cannot be read, the checkpoint is no MoE, or it was calibrated on one of the documents, unless
    `allow_calibration_text`.
    """
    documents = {name: _documents(name, location, limit) for name, location in texts.items()}
    if not documents:
        raise InputError("no text to route: name at least one with --text NAME=FILE")
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, trust_remote_code=trust_remote_code)
    warnings = check_disjoint(documents, texts, loaded.manifest, loaded.name, allow=allow_calibration_text)
    chosen = weigher(loaded)
    found = []
    for name, listed in documents.items():
        weighed = [chosen.weigh(loaded.encode(document, tokens), oracle) for document in listed]
        found.append(_summary(name, weighed, chosen))
    digest = weights_digest(loaded.manifest) if loaded.manifest else None
    return Routes(loaded.name, chosen.level, chosen.experts, tuple(found), warnings, digest)


def _summary(name: str, weighed: Sequence[Weighed], chosen: Weigher) -> TextRoute:
    first_E = _mean([document.first_E for document in weighed])
    return TextRoute(
        name=name,
        documents=len(weighed),
        alpha_E=_mean([document.alpha_E for document in weighed]),
        first_E=first_E,
        entropy=sum(document.entropy for document in weighed) / len(weighed),
        accuracy=first_E[chosen.experts.index(name)] if name in chosen.experts else None,
        oracle=_oracle([document for document in weighed if document.loss_E]),
        alpha_LE=tuple(map(_mean, zip(*(document.alpha_LE for document in weighed), strict=True))),
    )


def _oracle(weighed: Sequence[Weighed]) -> Oracle | None:
    if not weighed:
        return None
    best = [min(range(len(document.loss_E)), key=document.loss_E.__getitem__) for document in weighed]
    best_E = _mean([[float(expert == index) for expert in range(len(weighed[0].loss_E))] for index in best])
    accuracy = sum(document.first_E[index] for document, index in zip(weighed, best, strict=True)) / len(weighed)
    return Oracle(best_E, _mean([document.loss_E for document in weighed]), accuracy)


def parse_texts(given: Sequence[str]) -> dict[str, str]:
    """Files by name from `NAME=FILE` each; InputError for anything else."""
    texts: dict[str, str] = {}
    for entry in given:
        name, equals, location = entry.partition("=")
        if not (name and equals and location):
            raise InputError(f"--text {entry!r} should be NAME=FILE, such as math=math.jsonl")
        if name in texts:
            raise InputError(f"--text {name!r} is given twice: put several files in a folder, or use a pattern")
        texts[name] = location
    return texts


def _documents(name: str, location: str, limit: int) -> list[str]:
    try:
        found = list(islice(read_documents(location), limit))
    except InputError as error:
        raise InputError(f"text {name!r}: {error}") from None
    if not found:
        raise InputError(f"text {name!r}: {location} holds no text: name a file with some")
    return found


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
