"""Objectives of a search: bits per byte of text, divergence from the experts, bytes on disk.

Each objective measures documents and gives sums by domain, so that a poor trial can be told from a part of them.
Shapes: T tokens, V vocabulary, K tokens that are told apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moerge.errors import InputError
from moerge.evaluation.likelihood import document_losses
from moerge.evaluation.texts import read_texts
from moerge.planning.plan import Plan
from moerge.runtime.loading import Loaded, context_length, load
from moerge.searching.settings import SearchFile
from moerge.texts import Document, document_hash

if TYPE_CHECKING:
    import torch

WINDOW = 512
"""Tokens that are read at once unless the search says otherwise: trials should be short."""
_BATCH = 8
_LARGEST = 256
"""An expert's likeliest tokens, which are told apart; the others count as one."""

Documents = Mapping[str, Sequence[Document]]


@dataclass(frozen=True)
class Sums:
    """A total over documents and the amount that it is over: the figure is their ratio."""

    total: float = 0.0
    count: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.total + other.total, self.count + other.count)

    @property
    def figure(self) -> float:
        """The ratio; infinite where nothing was counted."""
        return self.total / self.count if self.count else math.inf


class Objective(Protocol):
    """A figure of merit; less is better."""

    @property
    def metric(self) -> str:
        """Its name."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The texts that it reads."""

    def rows(self, loaded: Loaded, plan: Plan, documents: Documents) -> dict[str, list[Sums]]:
        """The sums of each document by domain."""

    def combine(self, figures: Mapping[str, float]) -> float:
        """One number of the domains' figures."""


@dataclass(frozen=True)
class Over:
    """One number of several domains: their mean, the worst of them, or a mean with weights."""

    how: str | Mapping[str, float]

    def __call__(self, figures: Mapping[str, float]) -> float:
        """The number."""
        if self.how == "worst":
            return max(figures.values())
        weights = dict.fromkeys(figures, 1.0) if self.how == "mean" else dict(self.how)  # type: ignore[arg-type]
        return sum(weights[name] * figure for name, figure in figures.items()) / sum(weights.values())


@dataclass(frozen=True)
class BitsPerByte:
    """Negative log-likelihood of text in bits per byte of it."""

    domains: tuple[str, ...]
    combine: Over
    window: int | None
    given: int
    metric: str = "bits_per_byte"

    def rows(self, loaded: Loaded, plan: Plan, documents: Documents) -> dict[str, list[Sums]]:
        """Bits and bytes of each document."""
        window = min(self.window or WINDOW, context_length(loaded) or WINDOW)
        found = {}
        for domain in self.domains:
            losses = document_losses(loaded, documents[domain], window=window, given=self.given, batch_size=_BATCH)
            found[domain] = [Sums(loss.nats / math.log(2), loss.bytes) for loss in losses]
        return found


@dataclass(frozen=True)
class Divergence:
    """The Kullback-Leibler divergence of the model from each expert on its own text, in nats per token.

    Each expert's `_LARGEST` likeliest tokens are told apart and all others count as one, so that the figure is a lower bound,
    close where the rest has little probability.
    """

    domains: tuple[str, ...]
    combine: Over
    window: int | None
    experts: Mapping[str, str]
    cache: dict[str, dict[Document, Any]]
    device: str | None = None
    dtype: str | None = None
    metric: str = "kl"

    def rows(self, loaded: Loaded, plan: Plan, documents: Documents) -> dict[str, list[Sums]]:
        """Nats and tokens of each document. The experts' predictions are computed when they are first needed."""
        self._remember(documents)
        return {domain: [self._divergence(loaded, domain, text) for text in documents[domain]] for domain in self.domains}

    def _remember(self, documents: Documents) -> None:
        for domain in self.domains:
            known = self.cache.setdefault(domain, {})
            missing = [text for text in documents[domain] if text not in known]
            if missing:
                expert = load(self.experts[domain], device=self.device, dtype=self.dtype)
                known |= {text: self._predict(expert, text) for text in missing}

    def _predict(self, expert: Loaded, text: Document) -> tuple[list[int], Any, Any]:
        ids_T, log_TV = self._log_probabilities(expert, text)
        top = log_TV.topk(min(_LARGEST, log_TV.shape[-1]), dim=-1)
        return ids_T, top.values, top.indices

    def _log_probabilities(self, loaded: Loaded, text: Document) -> tuple[list[int], torch.Tensor]:
        import torch

        ids_1T = loaded.encode(text, self.window or WINDOW)
        with torch.inference_mode():
            logits_TV = loaded.model(input_ids=ids_1T, use_cache=False).logits[0]
        return ids_1T[0].tolist(), logits_TV.float().log_softmax(-1)

    def _divergence(self, loaded: Loaded, domain: str, text: Document) -> Sums:
        ids_T, expert_TK, indices_TK = self.cache[domain][text]
        own_T, log_TV = self._log_probabilities(loaded, text)
        if own_T != ids_T:
            raise InputError(f"kl: {domain} makes other tokens of its text than the merged model: use bits_per_byte")
        model_TK = log_TV.gather(-1, indices_TK)
        inner_T = (expert_TK.exp() * (expert_TK - model_TK)).sum(-1)
        left_T = (1 - expert_TK.exp().sum(-1)).clamp_min(1e-9)
        rest_T = left_T * (left_T.log() - (1 - model_TK.exp().sum(-1)).clamp_min(1e-9).log())
        return Sums(float((inner_T + rest_T).double().sum()), len(ids_T))


@dataclass(frozen=True)
class Size:
    """Bytes of the checkpoint's tensors."""

    domains: tuple[str, ...] = ()
    metric: str = "bytes"

    def rows(self, loaded: Loaded, plan: Plan, documents: Documents) -> dict[str, list[Sums]]:
        """No document is read."""
        return {"bytes": [Sums(plan.output_bytes, 1)]}

    def combine(self, figures: Mapping[str, float]) -> float:
        """The figure itself."""
        return figures["bytes"]


@dataclass(frozen=True)
class Texts:
    """Documents that are searched on, and those that judge the winner, by domain; no document is in both."""

    searched: Documents
    judged: Documents


def objectives(file: SearchFile, experts: Mapping[str, str], given: int) -> tuple[Objective, ...]:
    """The objectives of a search.

    `experts` are the recipe's experts and their places, for `kl`; `given` characters of a document are read and not predicted.
    """
    settings = file.settings
    made: list[Objective] = []
    for asked in settings.objective:
        domains, over = tuple(asked.texts if asked.texts is not None else settings.texts), Over(asked.over)
        if asked.metric == "bytes":
            made.append(Size())
        elif asked.metric == "kl":
            unknown = [name for name in domains if name not in experts]
            if unknown:
                raise file.document.error(
                    ("objective",), f": kl: {unknown[0]!r} is no expert: name texts by {', '.join(experts)}"
                )
            made.append(Divergence(domains, over, settings.window, experts, {}, settings.device, settings.dtype))
        else:
            made.append(BitsPerByte(domains, over, settings.window, given))
    return tuple(made)


def read_search_texts(file: SearchFile, given: int) -> Texts:
    """The documents of all objectives. Raises InputError for a text without documents, and for one that searches and judges."""
    settings = file.settings
    places: dict[str, str] = {}
    for objective in settings.objective:
        for domain, place in (objective.texts if objective.texts is not None else settings.texts).items():
            if places.setdefault(domain, place) != place:
                raise file.document.error(("objective",), f": the text {domain!r} is {places[domain]} and {place}: name it once")
    found = _documents(file, places, given)
    if isinstance(settings.heldout, dict):
        judged = _documents(file, settings.heldout, given)
        _check_apart(file, found, judged)
        return Texts({name: texts[: settings.documents] for name, texts in found.items()}, judged)
    parted = {name: _part(file, name, texts, settings.heldout) for name, texts in found.items()}
    return Texts({name: both[0] for name, both in parted.items()}, {name: both[1] for name, both in parted.items()})


def _documents(file: SearchFile, places: Mapping[str, str], given: int) -> dict[str, tuple[Document, ...]]:
    try:
        texts = read_texts({name: file.place(place) for name, place in places.items()}, limit=None, given=given)
    except InputError as error:
        raise InputError(str(error).replace("--perplexity ", "text ").replace("--given", "'given'"), code=error.code) from None
    return {text.domain: tuple(dict.fromkeys(text.documents)) for text in texts}


def _part(
    file: SearchFile, name: str, texts: Sequence[Document], share: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Documents to search on and to judge by, drawn by their content, so that more text changes the parts little."""
    ordered = sorted(texts, key=document_hash)
    judged = round(share * len(ordered))
    if not 0 < judged < len(ordered):
        raise file.document.error(
            ("heldout",),
            f": {share:g} of the {len(ordered)} documents of {name!r} leaves nothing to search on or to judge by: "
            "give more text, or files in 'heldout'",
        )
    kept = ordered[judged:][: file.settings.documents]
    return tuple(kept), tuple(ordered[:judged][: 4 * file.settings.documents])


def _check_apart(file: SearchFile, searched: Documents, judged: Documents) -> None:
    hashes = {document_hash(text): name for name, texts in searched.items() for text in texts}
    for name, texts in judged.items():
        shared = [hashes[digest] for text in texts if (digest := document_hash(text)) in hashes]
        if shared:
            raise file.document.error(
                ("heldout", name), f": {len(shared)} of its documents are searched on as {shared[0]!r}: judge by other text"
            )


def check_calibration(file: SearchFile, plan: Plan, texts: Texts) -> None:
    """InputError where the recipe's calibration text is what the search judges by."""
    calibrated = {digest for used in plan.calibration for digest in used.hashes}
    for part in (texts.searched, texts.judged):
        for name, documents in part.items():
            shared = sum(document_hash(text) in calibrated for text in documents)
            if shared:
                raise file.document.error(
                    ("recipe",),
                    f": {shared} documents of the text {name!r} calibrate the recipe: a text cannot do that and judge",
                )


def summed(rows: Mapping[str, Iterable[Sums]]) -> dict[str, Sums]:
    """The sums of all documents by domain."""
    totals: dict[str, Sums] = defaultdict(Sums)
    for name, sums in rows.items():
        for one in sums:
            totals[name] = totals[name] + one
    return dict(totals)
