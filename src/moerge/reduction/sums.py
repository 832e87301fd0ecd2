"""The sums over a domain's text that reductions are decided by: they add up, and are stored in a file for each domain.

Shapes: L layers with experts, E experts, A and B powers of gates and norms, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from moerge.checkpoint.header import build_header, read_header, read_metadata
from moerge.checkpoint.workspace import machine_errors
from moerge.errors import InputError
from moerge.files import atomic_path
from moerge.reduction.scores import POWERS
from moerge.tensors.dtypes import DTYPES

_FACTS = "moerge.reduction"
PEAK = "peak_LE"
"""The one entry that is a maximum and no sum."""
_ROUTED = {"table_LEAB": "EAB", "output_LED": "ED", PEAK: "E", "mass_LE": "E", "tokens_L": ""}
_COMMON = {"mean_LED": "ED", "cosine_LEE": "EE", "products_LEE": "EE", "logits_LEE": "EE", "sampled_L": ""}


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of some text, float64, for each layer with experts.

    Over tokens that are routed to an expert: the `table` of gate^a * norm^b, its `output`s, their largest entry (`peak`). Over
    all tokens, which `tokens` counts: the `mass` of its probability. Over `sampled` tokens, on which every expert ran: outputs
    (`mean`), the `cosine` and inner `products` of two experts' outputs, the products of their router `logits`; absent if no
    grouping needs them. `facts` say what model and text they are of.
    """

    arrays: Mapping[str, np.ndarray] = field(repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __add__(self, other: Sums) -> Sums:
        """The sums of both texts together."""
        both = self.arrays.keys() & other.arrays.keys()
        joined = {name: (np.maximum if name == PEAK else np.add)(self[name], other[name]) for name in sorted(both)}
        return Sums(joined)

    @property
    def similar(self) -> bool:
        """Return whether there is what groups are made of."""
        return _COMMON.keys() <= self.arrays.keys()

    @classmethod
    def zeros(cls, layers: int, experts: int, width: int, *, similar: bool) -> Sums:
        """Sums over nothing."""
        return cls({name: np.zeros(shape) for name, shape in _shapes(layers, experts, width, similar=similar).items()})


def pooled(domains: Iterable[Sums]) -> Sums:
    """The sums over the text of all domains."""
    return reduce(lambda one, other: one + other, domains)


def _shapes(layers: int, experts: int, width: int, *, similar: bool) -> dict[str, tuple[int, ...]]:
    sizes = {"A": POWERS, "B": POWERS, "E": experts, "D": width}
    wanted = {**_ROUTED, **(_COMMON if similar else {})}
    return {name: (layers, *(sizes[letter] for letter in axes)) for name, axes in wanted.items()}


def save_sums(path: Path, sums: Sums) -> None:
    """Write a safetensors file, complete or not at all."""
    double = DTYPES["F64"]
    entries = [(name, double, array.shape) for name, array in sums.arrays.items()]
    header, _ = build_header(entries, {_FACTS: json.dumps(sums.facts, sort_keys=True)})
    with machine_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside, open(beside, "wb") as file:
            file.write(header)
            for array in sums.arrays.values():
                file.write(np.ascontiguousarray(array, double.storage).tobytes())


def load_sums(path: Path, layers: int, experts: int, width: int) -> Sums:
    """Sums that `save_sums` wrote; InputError if they are damaged or of a model of another shape."""
    stored = read_header(path)
    try:
        facts = json.loads(read_metadata(path)[_FACTS])
        known = isinstance(facts, dict)
    except (KeyError, ValueError):
        known = False
    if not known:
        raise InputError(f"{path} holds no statistics for reducing: remove it, so that they are gathered again")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if shapes not in [_shapes(layers, experts, width, similar=similar) for similar in (True, False)]:
        raise InputError(
            f"{path} holds statistics of another model: this one has {layers} layers of {experts} experts of width {width}"
        )
    arrays = {n: t.open().read(0, np.empty(t.size, t.dtype.storage)).reshape(t.shape) for n, t in stored.items()}
    bad = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if bad:
        raise InputError(f"{path}: {bad!r} holds NaN or infinity: remove the file, so that it is gathered again")
    return Sums(arrays, facts)
