"""mergekit's merge methods and what they are here, with the parameters and defaults of mergekit 0.1.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moerge.recipe.mergekit.parameters import Kind, Value

Values = Mapping[str, Value | None]
_NUMBER: Kind = "number"
_TRUTH: Kind = "truth"
REQUIRED = object()
"""Stands where a parameter has no default."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: what it holds, and its default. One that is `each` has a value for every model that is merged.

    `fixed` says why it may only have its default value here.
    """

    kind: Kind
    default: Any = REQUIRED
    each: bool = False
    fixed: str = ""


@dataclass(frozen=True)
class Target:
    """One of our methods by name, its settings, and the models' weights in their order."""

    method: str
    settings: dict[str, Any]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Foreign:
    """A method of mergekit's.

    `target(shared, each)` is the same here, from the values of the shared parameters and, for every model, of the others.
    `task_vectors`: the base is what the others are compared with, otherwise one of the models. `count` is how many models it
    takes at least and at most, the base included. `differs` says where ours differs on purpose, by the parameter that must be
    set for it to matter, or "" if it always does.
    """

    parameters: Mapping[str, Parameter]
    target: Callable[[Values, Sequence[Values]], Target]
    task_vectors: bool = False
    needs_base: bool = False
    count: tuple[int, int | None] = (1, None)
    differs: Mapping[str, str] = field(default_factory=dict)


_WEIGHT = Parameter(_NUMBER, each=True)
_INT8 = Parameter(_TRUTH, False)
_GAMMA = Parameter(_NUMBER, 0.01, each=True)
_EPSILON = Parameter(_NUMBER, 0.15, each=True)
_CHANGE = Parameter(_NUMBER, 1e-5)


def _weights(each: Sequence[Values]) -> tuple[float, ...]:
    return tuple(float(values["weight"] or 0) for values in each)


def _linear(shared: Values, each: Sequence[Values]) -> Target:
    return Target("linear", {"normalize": shared["normalize"]}, _weights(each))


def _slerp(shared: Values, each: Sequence[Values]) -> Target:
    return Target("slerp", {"t": shared["t"]}, (1.0,) * len(each))


def _passthrough(shared: Values, each: Sequence[Values]) -> Target:
    scale = each[0]["scale"]
    if scale is None or scale == 1:
        return Target("passthrough", {}, (1.0,))
    return Target("linear", {"normalize": False}, (float(scale),))


def _thinned(shared: Values, each: Sequence[Values], *keys: str) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Settings that all methods on task vectors share, with `keys` by model where they differ; and the weights.

    A model of density 0 takes no part: its weight is 0.
    """
    weights = [0.0 if "density" in keys and _density(values) <= 0 else w for w, values in zip(_weights(each), each, strict=True)]
    settings: dict[str, Any] = {"scale": shared["lambda"]}
    for key in keys:
        chosen = [_density(values) or 1.0 if key == "density" else float(values[key] or 0) for values in each]
        settings[key] = chosen[0] if len(set(chosen)) == 1 else chosen
    return settings, tuple(weights)


def _density(values: Values) -> float:
    return min(1.0, max(0.0, float(values["density"] or 0)))


def _divides(shared: Values, weights: Sequence[float]) -> bool:
    """mergekit divides by a sum of weights only where it is not about zero."""
    return bool(shared["normalize"]) and abs(sum(weights)) >= 1e-8


def _task_arithmetic(shared: Values, each: Sequence[Values]) -> Target:
    settings, weights = _thinned(shared, each)
    return Target("task_arithmetic", {**settings, "normalize": _divides(shared, weights)}, weights)


def _ties(shared: Values, each: Sequence[Values]) -> Target:
    settings, weights = _thinned(shared, each, "density")
    return Target("ties", {**settings, "aggregate": "mean" if shared["normalize"] else "sum"}, weights)


def _elective(method: str, elect: str, *keys: str, rescales: bool = True) -> Callable[[Values, Sequence[Values]], Target]:
    """A method of ours that adds up what it left of task vectors, all of it or what an election chooses."""

    def target(shared: Values, each: Sequence[Values]) -> Target:
        settings, weights = _thinned(shared, each, *keys)
        mean = shared["normalize"] if elect == "sign" else _divides(shared, weights)
        rescale = {"rescale": shared["rescale"]} if rescales else {}
        return Target(method, {**settings, "elect": elect, "aggregate": "mean" if mean else "sum", **rescale}, weights)

    return target


def _model_stock(shared: Values, each: Sequence[Values]) -> Target:
    return Target("model_stock", {"filter_wise": shared["filter_wise"]}, (1.0,) * len(each))


def _nuslerp(shared: Values, each: Sequence[Values]) -> Target:
    weights = _weights(each)
    along = "column" if shared["nuslerp_row_wise"] else "row"  # theirs is the axis that is summed over
    vectors = "tensor" if shared["nuslerp_flatten"] else along
    return Target("nuslerp", {"vectors": vectors}, (1.0,) * len(each) if abs(sum(weights)) < 1e-6 else weights)


def _multislerp(shared: Values, each: Sequence[Values]) -> Target:
    return Target("multislerp", {"normalize": shared["normalize_weights"]}, _weights(each) if len(each) > 1 else (1.0,))


def _unweighted(method: str, **names: str) -> Callable[[Values, Sequence[Values]], Target]:
    """A method of ours without weights, its settings by mergekit's names."""

    def target(shared: Values, each: Sequence[Values]) -> Target:
        return Target(method, {ours: shared[theirs] for ours, theirs in names.items()}, (1.0,) * len(each))

    return target


def _karcher(shared: Values, each: Sequence[Values]) -> Target:
    steps = max(0, int(shared["max_iter"] or 0))
    return Target("karcher", {"max_iter": steps, "tol": shared["tol"], "origin": "zero"}, (1.0,) * len(each))


def _sce(shared: Values, each: Sequence[Values]) -> Target:
    return Target("sce", {"select_topk": min(1.0, float(shared["select_topk"] or 0))}, (1.0,) * len(each))


def _generalized(
    target: Callable[[Values, Sequence[Values]], Target],
    *,
    normalize: bool = False,
    rescale: bool = False,
    trims: bool = False,
    differs: Mapping[str, str] | None = None,
    **more: Parameter,
) -> Foreign:
    parameters = {
        "weight": _WEIGHT,
        "density": Parameter(_NUMBER, 1.0, each=True),
        "normalize": Parameter(_TRUTH, normalize),
        "rescale": Parameter(_TRUTH, rescale, fixed=_NO_RESCALING if trims else ""),
        "lambda": Parameter(_NUMBER, 1.0),
        "int8_mask": _INT8,
        **more,
    }
    trimmed = {"density": _TRIMMED} if trims else {}
    return Foreign(parameters, target, task_vectors=True, needs_base=True, differs={**trimmed, **(differs or {})})


def _on_base(
    parameters: Mapping[str, Parameter],
    target: Callable[[Values, Sequence[Values]], Target],
    differs: str = "",
    count: tuple[int, int | None] = (1, None),
) -> Foreign:
    return Foreign(parameters, target, task_vectors=True, needs_base=True, count=count, differs={"": differs} if differs else {})


_TRIMMED = (
    "{method} keeps ceil(density * n) entries of a task vector and all that equal the smallest of them; mergekit keeps "
    "int(density * n) and chooses among equals by sort order"
)
_MASKS = (
    "{method} draws other random masks and divides what it keeps by the probability of that, as the paper does; mergekit "
    "restores each tensor's L1 norm instead, which is biased"
)
_BASE_KEPT = "model_stock takes the base where task vectors point apart; mergekit goes on to the other side of it"
_SMALL = "sce weighs task vectors by their size however small they are; mergekit weighs those below about 0.001 equally"
_SAMPLED = "arcee_fusion takes the quartiles of all entries; mergekit takes those of a random million of larger tensors"
_NO_RESCALING = "moerge does not restore the L1 norm after trimming: remove it"

METHODS: dict[str, Foreign] = {
    "linear": Foreign({"weight": _WEIGHT, "normalize": Parameter(_TRUTH, True)}, _linear),
    "slerp": Foreign({"t": Parameter(_NUMBER)}, _slerp, needs_base=True, count=(2, 2)),
    "passthrough": Foreign({"scale": Parameter(_NUMBER, None, each=True)}, _passthrough, count=(1, 1)),
    "task_arithmetic": _generalized(_task_arithmetic),
    "ties": _generalized(_ties, normalize=True, trims=True),
    "dare_linear": _generalized(_elective("dare", "none", "density"), rescale=True, differs={"density": _MASKS}),
    "dare_ties": _generalized(_elective("dare", "sign", "density"), rescale=True, differs={"density": _MASKS}),
    "breadcrumbs": _generalized(_elective("breadcrumbs", "none", "density", "gamma", rescales=False), trims=True, gamma=_GAMMA),
    "breadcrumbs_ties": _generalized(
        _elective("breadcrumbs", "sign", "density", "gamma", rescales=False), trims=True, gamma=_GAMMA
    ),
    "della": _generalized(
        _elective("della", "sign", "density", "epsilon"),
        normalize=True,
        rescale=True,
        differs={"density": _MASKS},
        epsilon=_EPSILON,
    ),
    "della_linear": _generalized(
        _elective("della", "none", "density", "epsilon"), rescale=True, differs={"density": _MASKS}, epsilon=_EPSILON
    ),
    "model_stock": _on_base({"filter_wise": Parameter(_TRUTH, False)}, _model_stock, _BASE_KEPT, count=(3, None)),
    "sce": _on_base({"select_topk": Parameter(_NUMBER, 1.0), "int8_mask": _INT8}, _sce, _SMALL),
    "nuslerp": Foreign(
        {"weight": _WEIGHT, "nuslerp_row_wise": Parameter(_TRUTH, False), "nuslerp_flatten": Parameter(_TRUTH, True)},
        _nuslerp,
        task_vectors=True,
        count=(2, 3),
    ),
    "multislerp": Foreign(
        {"weight": _WEIGHT, "normalize_weights": Parameter(_TRUTH, True), "eps": Parameter(_NUMBER, 1e-8)},
        _multislerp,
        task_vectors=True,
    ),
    "karcher": Foreign({"max_iter": Parameter(_NUMBER, 10.0), "tol": Parameter(_NUMBER, 1e-5)}, _karcher),
    "nearswap": _on_base({"t": Parameter(_NUMBER)}, _unweighted("nearswap", t="t"), count=(2, 2)),
    "arcee_fusion": _on_base({}, _unweighted("arcee_fusion"), _SAMPLED, count=(2, 2)),
    "ram": _on_base({"epsilon": _CHANGE}, _unweighted("ram", epsilon="epsilon")),
    "ramplus_tl": _on_base(
        {"r": Parameter(_NUMBER, 0.1), "alpha": Parameter(_NUMBER, 0.2), "epsilon": _CHANGE},
        _unweighted("ramplus_tl", r="r", alpha="alpha", epsilon="epsilon"),
    ),
}
"""By mergekit's names. What mergekit has and this lacks is refused."""
