"""Routing of texts to experts: MergeME's table 2 for sequence-routed models, its figure 5 for token-routed ones.

Shapes: D documents, E experts, L layers, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from moerge.checkpoint.manifest import weights_digest
from moerge.errors import InputError
from moerge.inference.result import Oracle, Routes, TextRoute, mean_of_rows
from moerge.inference.weighing import Weighed, Weigher, weigher
from moerge.runtime.loading import Loaded, load
from moerge.texts import check_disjoint, read_documents

TOKENS = 512


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
    """Route the first `limit` documents, up to `tokens` tokens of each, of files (txt, jsonl, parquet) by name.

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
    first_E = mean_of_rows([document.first_E for document in weighed])
    return TextRoute(
        name=name,
        documents=len(weighed),
        alpha_E=mean_of_rows([document.alpha_E for document in weighed]),
        first_E=first_E,
        entropy=sum(document.entropy for document in weighed) / len(weighed),
        accuracy=first_E[chosen.experts.index(name)] if name in chosen.experts else None,
        oracle=_oracle([document for document in weighed if document.loss_E]),
        alpha_LE=tuple(map(mean_of_rows, zip(*(document.alpha_LE for document in weighed), strict=True))),
    )


def _oracle(weighed: Sequence[Weighed]) -> Oracle | None:
    if not weighed:
        return None
    best = [min(range(len(document.loss_E)), key=document.loss_E.__getitem__) for document in weighed]
    best_E = mean_of_rows([[float(expert == index) for expert in range(len(weighed[0].loss_E))] for index in best])
    accuracy = sum(document.first_E[index] for document, index in zip(weighed, best, strict=True)) / len(weighed)
    return Oracle(best_E, mean_of_rows([document.loss_E for document in weighed]), accuracy)


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
        raise InputError(f"text {name!r}: {error}", code=error.code) from None
    if not found:
        raise InputError(f"text {name!r}: {location} holds no text: name a file with some")
    return found
