"""Routing of texts to experts: MergeME's table 2 for sequence-routed models, its figure 5 for token-routed ones.

Shapes: D documents, E experts, L layers, T tokens, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from moerge.checkpoint.manifest import weights_digest
from moerge.errors import InputError
from moerge.inference.probe import DocumentRouting, router_probe
from moerge.inference.result import Routes, TextRoute, mean_of_rows, routes_of
from moerge.runtime.inputs import Inputs, loaded_inputs
from moerge.runtime.loading import Loaded, load
from moerge.texts import Document, check_disjoint, encode, read_documents

TOKENS = 512
RouteBy = Literal["prompt", "last-turn"]


def route(
    checkpoint: str | Path | Loaded,
    texts: Mapping[str, str],
    *,
    limit: int = 100,
    tokens: int = TOKENS,
    oracle: bool = True,
    route_by: RouteBy = "prompt",
    allow_calibration_text: bool = False,
    trust_remote_code: bool = False,
) -> Routes:
    """Route the first `limit` documents, up to `tokens` tokens of each, of files (txt, jsonl, parquet) by name.

    A text that has an expert's name is taken to be of that expert's domain. `oracle` also runs every document through each expert
    alone, as many more passes as there are experts, except where the routing has computed the same losses (`perplexity`).
    Of a conversation a model that routes sequences reads what stands before the last answer, as when it is to write that, or with
    `route_by: last-turn` the last question alone; one that routes tokens reads all of it.
    Raises InputError if a text cannot be read, the checkpoint is no MoE, or it was calibrated on one of the documents, unless
    `allow_calibration_text`.
    """
    documents = {name: _documents(name, location, limit) for name, location in texts.items()}
    if not documents:
        raise InputError("no text to route: name at least one with --text NAME=FILE")
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, trust_remote_code=trust_remote_code)
    warnings = check_disjoint(documents, texts, loaded.manifest, loaded.name, allow=allow_calibration_text)
    probe = router_probe(loaded)
    if route_by != "prompt" and not loaded.by_sequence:
        raise InputError(f"{loaded.name} does not route sequences: leave out --route-by")
    routed = {
        name: _summary(name, [probe.route(_read(loaded, one, tokens, route_by), oracle) for one in listed], probe.experts)
        for name, listed in documents.items()
    }
    digest = weights_digest(loaded.manifest) if loaded.manifest else None
    return routes_of(loaded.name, probe.level, probe.experts, routed, warnings=warnings, digest=digest)


def _read(loaded: Loaded, document: Document, tokens: int, route_by: RouteBy) -> Inputs:
    """The inputs of a document that is routed."""
    if isinstance(document, str) or not loaded.by_sequence:
        return loaded_inputs(loaded, document, tokens)
    read = document.question if route_by == "prompt" else document.last_turn
    return {"input_ids": loaded.tensor(encode(loaded.tokenizer, read, tokens, ask=True), read.where)}


def _summary(name: str, routings: Sequence[DocumentRouting], experts: Sequence[str]) -> TextRoute:
    if not all(math.isfinite(value) for routing in routings for value in (routing.entropy, *routing.loss_E)):
        raise InputError(f"text {name!r}: the model computes NaN or infinity on it, so there is no routing to show")
    layers = [mean_of_rows(alpha_DE) for alpha_DE in zip(*(routing.alpha_LE for routing in routings), strict=True)]
    first = _by_expert(experts, [routing.first_E for routing in routings])
    return TextRoute(
        documents=len(routings),
        alpha=_by_expert(experts, [routing.alpha_E for routing in routings]),
        first=first,
        entropy=sum(routing.entropy for routing in routings) / len(routings),
        accuracy=first.get(name),
        layers=tuple(dict(zip(experts, alpha_E, strict=True)) for alpha_E in layers) or None,
        **_oracle([routing for routing in routings if routing.loss_E], experts),
    )


def _oracle(routings: Sequence[DocumentRouting], experts: Sequence[str]) -> dict[str, Any]:
    """Compare the routing of documents with the expert that alone has the lowest loss."""
    if not routings:
        return {}
    best = [min(range(len(experts)), key=routing.loss_E.__getitem__) for routing in routings]
    return {
        "oracle_accuracy": sum(routing.first_E[index] for routing, index in zip(routings, best, strict=True)) / len(routings),
        "best": _by_expert(experts, [[float(expert == index) for expert in range(len(experts))] for index in best]),
        "loss": _by_expert(experts, [routing.loss_E for routing in routings]),
    }


def _by_expert(experts: Sequence[str], values_DE: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over documents, by expert."""
    return dict(zip(experts, mean_of_rows(values_DE), strict=True))


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


def _documents(name: str, location: str, limit: int) -> list[Document]:
    try:
        found = list(islice(read_documents(location), limit))
    except InputError as error:
        raise InputError(f"text {name!r}: {error}", code=error.code) from None
    if not found:
        raise InputError(f"text {name!r}: {location} holds no text: name a file with some")
    return found
