"""Growing a mixture: an arriving model becomes an expert of its own, or is merged into the expert that is nearest.

Decisions follow MADE-IT (Qiu et al. 2026, arXiv 2604.22464), of which the threshold's form is public and its details are not:
see `docs/mixtures.md`. What is written is an ordinary recipe over the mixture's experts, which `moerge merge` could run too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np

from moerge.architecture.registry import family_of
from moerge.checkpoint.expert import SEPARATOR, expert_labels
from moerge.checkpoint.locate import locate
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.formatting import Displayed
from moerge.merging.pipeline import MergeResult, merge
from moerge.planning.build import located
from moerge.planning.models import SourceModel
from moerge.progress import Progress
from moerge.recipe import load_recipe
from moerge.tensors.source import Source
from moerge.tensors.streams import read_values
from moerge.tensors.subspaces import SHARE, Subspace, affinity, subspace_of

ARRIVAL, BASE = "arrival", "base"
_MATRIX = re.compile(r"layers\.\d+\.(ffn\.(?:\d+\.)?(?:gate|up|down|gate_up))$")
_SAME = 0.999
"""An affinity above this is the same subspace, however alike the experts there are already."""
_FITTED = ("ridge", "hidden", "projection", "random")
"""Routers that a mixture can be extended with as it was built."""


@dataclass(frozen=True)
class Decision:
    """The affinities of the arrival to each expert, by part and over all, and the threshold from the experts' own."""

    affinities: Mapping[str, float]
    by_part: Mapping[str, Mapping[str, float]]
    threshold: float | None

    @property
    def nearest(self) -> str:
        """The expert with the highest affinity."""
        return max(self.affinities, key=lambda name: self.affinities[name])

    @property
    def merges(self) -> bool:
        """True if the arrival is near enough to an expert to be merged into it."""
        return self.threshold is not None and self.affinities[self.nearest] > self.threshold

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "affinities": dict(self.affinities),
            "by_part": {part: dict(found) for part, found in self.by_part.items()},
            "threshold": self.threshold,
            "nearest": self.nearest,
            "merges": self.merges,
        }


@dataclass(frozen=True, repr=False)
class ExtendResult(Displayed):
    """The mixture that was written, from which recipe; `decision` is None where nothing was to be decided."""

    merged: MergeResult
    recipe: Mapping[str, Any]
    name: str
    decision: Decision | None

    def headline(self) -> str:
        """Say what became of the arrival."""
        merges = self.decision is not None and self.decision.merges
        where = f"merged into {self.decision.nearest}" if self.decision and merges else "added as an expert"
        return f"{self.name} {where}: {self.merged.headline()}"

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        decision = None if self.decision is None else self.decision.to_json()
        return {**self.merged.to_json(), "name": self.name, "decision": decision, "recipe": dict(self.recipe)}


def extend(
    moe: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    decide: Literal["add", "affinity"] = "add",
    base: str | Path | None = None,
    text: str | Path | None = None,
    name: str | None = None,
    router: Mapping[str, Any] | None = None,
    beta: float = 1.0,
    share: float = SHARE,
    progress: Progress | bool = False,
    **options: Any,
) -> ExtendResult:
    """Add a dense model to a native mixture, or merge it into the expert that it resembles.

    Args:
        moe: The mixture, a folder or Hub id.
        expert: The arriving model, of the type that the mixture's experts have.
        out: The folder to write.
        decide: `add` always adds; `affinity` merges where the arrival's subspaces are nearer to an expert's than experts are to
            each other.
        base: The common ancestor, for `affinity`; by default the mixture's expert `base`.
        text: The arrival's text, for the router.
        name: The new expert's name, by default that of its folder.
        router: A `router` section of a recipe, by default the one that the mixture was built with, or `ridge`.
        beta: The threshold is the mean of the experts' pairwise affinities plus this many standard deviations.
        share: The rank of a subspace as a share of a matrix's smaller side.
        progress: A `Progress`, or True for a display on standard error.
        **options: As in `merge`, such as force=True.

    Returns:
        The decision and what was written.

    Raises:
        InputError: A model is at fault, a base or text is missing, or `out` exists.
    """
    place = str(moe)
    mixture = locate(place, weights=False)
    labels = expert_labels(mixture)
    if not labels:
        raise InputError(f"{place} is of type {mixture.model_type!r}, no native mixture that moerge knows: name one")
    name = _name(str(expert), name, labels)
    references = {label: _absolute(place) + SEPARATOR + label for label in labels}
    ancestor = str(base) if base is not None else references.get(BASE)
    decision = None
    if decide == "affinity":
        if ancestor is None:
            raise InputError(f"{place}: affinities are of task vectors: name the model that all were trained from with --base")
        decision = decide_by_affinity(references, _absolute(str(expert)), _absolute(ancestor), beta=beta, share=share)
    recipe = _recipe(mixture, references, name, _absolute(str(expert)), decision, router, text)
    return ExtendResult(merge(load_recipe(recipe), out, progress=progress, **options), recipe, name, decision)


def decide_by_affinity(
    references: Mapping[str, str], arrival: str, base: str, *, beta: float = 1.0, share: float = SHARE
) -> Decision:
    """Compare the arrival's feed-forward task vectors with every expert's, matrix by matrix; the base expert has none."""
    experts = {f"e{number}": reference for number, (label, reference) in enumerate(references.items()) if label != BASE}
    labels = dict(zip(experts, (label for label in references if label != BASE), strict=True))
    recipe = load_recipe({"base": base, "experts": {**experts, ARRIVAL: arrival}, "merge": {"method": "task_arithmetic"}})
    models = {model.name: model for model in located(recipe, weights=True)}
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for role, tensors in _matrices(models):
        subspaces = _subspaces(tensors, share)
        for pair in combinations((*labels, ARRIVAL), 2):
            value = affinity(subspaces[pair[0]], subspaces[pair[1]])
            if value is not None:
                found.setdefault(role, {}).setdefault(pair, []).append(value)
    by_part = {
        role: {label: fmean(values[key, ARRIVAL]) for key, label in labels.items() if (key, ARRIVAL) in values}
        for role, values in found.items()
    }
    overall = {
        pair: fmean([one for values in found.values() for one in values.get(pair, ())])
        for pair in combinations((*labels, ARRIVAL), 2)
        if any(pair in values for values in found.values())
    }
    own = [value for (_, other), value in overall.items() if other != ARRIVAL]
    affinities = {label: overall.get((key, ARRIVAL), 0.0) for key, label in labels.items()}
    return Decision(affinities, by_part, min(_SAME, fmean(own) + beta * pstdev(own)) if own else None)


def _matrices(models: Mapping[str, SourceModel]) -> list[tuple[str, dict[str, Source]]]:
    """The feed-forward matrices that all models have, by role without layer."""
    found = []
    for tensor_name in models[BASE].tensors:
        family = models[BASE].family or family_of(models[BASE].written)
        match = _MATRIX.search((family.role_of(tensor_name) if family else None) or "")
        if match:
            found.append((match[1], {name: Source(name, model.tensors[tensor_name]) for name, model in models.items()}))
    if not found:
        raise InputError(f"{models[BASE].folder}: moerge knows no feed-forward matrices of this model: add without --decide")
    return found


def _subspaces(tensors: Mapping[str, Source], share: float) -> dict[str, Subspace | None]:
    base_OI = _values(tensors[BASE])
    return {name: subspace_of(_values(source) - base_OI, share) for name, source in tensors.items() if name != BASE}


def _values(source: Source) -> np.ndarray:
    shape = source.tensor.shape
    return read_values(source).reshape(-1, shape[-1])


def _recipe(
    mixture: Checkpoint,
    references: Mapping[str, str],
    name: str,
    expert: str,
    decision: Decision | None,
    router: Mapping[str, Any] | None,
    text: str | Path | None,
) -> dict[str, Any]:
    """The recipe of the larger mixture, or of the one whose nearest expert is merged with the arrival."""
    before = (read_manifest(mixture.folder) or {}).get("recipe") or {}
    experts: dict[str, Any] = {label: reference for label, reference in references.items() if label != BASE}
    own: dict[str, Any] = {"base": references[BASE]} if BASE in references else {}
    if decision is not None and decision.merges:
        nearest = decision.nearest
        held = _held(before, nearest)
        both = {nearest: {"model": references[nearest], "weight": held}, name: {"model": expert, "weight": 1.0}}
        experts[nearest] = {"experts": both, "merge": {"method": "linear"}}
        return {**own, "experts": experts, "moe": {"router": {"kind": "keep"}}}
    chosen = dict(router) if router is not None else _router_of(before)
    calibration = {} if text is None else {"calibration": {name: _absolute(str(text))}}
    return {**own, "experts": {**experts, name: expert}, "moe": {"router": chosen}, **calibration}


def _held(recipe: Mapping[str, Any], label: str) -> float:
    """The number of models that an expert is merged from already."""
    expert = (recipe.get("experts") or {}).get(label)
    inner = expert.get("experts") if isinstance(expert, Mapping) else None
    if not isinstance(inner, Mapping):
        return 1.0
    return sum(float(one.get("weight", 1.0)) if isinstance(one, Mapping) else 1.0 for one in inner.values())


def _router_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    router = (recipe.get("moe") or {}).get("router") or {}
    return dict(router) if router.get("kind") in _FITTED else {"kind": "ridge"}


def _name(expert: str, given: str | None, labels: Sequence[str]) -> str:
    name = given or re.sub(r"[^\w.-]", "_", Path(expert.partition("@")[0]).name.replace(SEPARATOR, "_")).lstrip(".-")
    if name in labels or name == BASE:
        raise InputError(
            f"the mixture has an expert {name!r} already: give the new one another name with --name", code="unknown-name"
        )
    return name


def _absolute(location: str) -> str:
    model, separator, expert = location.partition(SEPARATOR)
    path = Path(model).expanduser()
    return f"{path.absolute() if path.exists() else model}{separator}{expert}"
