"""Statistics that are in memory already, for merging state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.operations import Merge
from moerge.planning.statistics import averaged, check_weights
from moerge.statistics.facts import Facts, Gram, ModelFacts, Settings
from moerge.statistics.files import Statistics, Used, stored_name, totals
from moerge.tensors.dtypes import F32
from moerge.tensors.source import Source
from moerge.tensors.tensor import ArrayTensor


def from_arrays(method: StatisticsMethod, model: str, arrays: Mapping[str, Any]) -> Used:
    """Statistics of one model: a mean Fisher information for each tensor by name, or a mean Gram matrix [I, I]."""
    sums: dict[str, tuple[float, float]] = {}
    grams: dict[str, Gram] = {}
    stored: dict[str, ArrayTensor] = {}
    for name, value in arrays.items():
        array = np.ascontiguousarray(value.detach().cpu().float() if hasattr(value, "detach") else value, np.float32)
        key = stored_name(method.kind, name)
        if method.kind == "fisher":
            sums[name] = totals(array)
        else:
            if array.ndim != 2 or array.shape[0] != array.shape[1]:
                raise InputError(f"{model}: the Gram matrix of {name!r} has shape {list(array.shape)}: it should be square")
            grams[name] = Gram(stored=key)
            array = array[np.triu_indices(len(array))]
        stored[key] = ArrayTensor(name, F32, array.shape, array.reshape(-1))
    nowhere = ModelFacts(location="", folder="", revision=None, stamps=(), digests={})
    settings = Settings(tokens=2, dtype="float32")
    facts = Facts(expert=model, model=nowhere, settings=settings, texts=(), sequences=1, tokens=1, predicted=1)
    return Used(model, Statistics(Path(), facts.model_copy(update={"fisher": sums, "grams": grams}), stored))


def bind_arrays(merge: Merge, statistics: Sequence[Used]) -> Merge:
    """The operation with its statistics, or a plain mean where no model has one for this tensor.

    Raises InputError where only some have, or one does not fit.
    """
    method, name = merge.method, merge.experts[0].tensor.name
    assert isinstance(method, StatisticsMethod)
    check_weights(merge, "merge_state_dicts")
    prepared = [method.prepared(used.statistics, name) for used in statistics]
    if all(tensor is None for tensor in prepared):
        return averaged(merge)
    extras = []
    for used, tensor in zip(statistics, prepared, strict=True):
        if tensor is None:
            raise InputError(f"{used.model} has no statistic for tensor {name!r}, but other experts have one")
        if not method.fits(tensor, merge.experts[0].tensor.shape):
            raise InputError(
                f"{used.model}: the statistic does not fit tensor {name!r}, whose shape is {merge.experts[0].tensor.shape}"
            )
        extras.append(Source(used.label, tensor))
    return replace(merge, extras=tuple(extras))
