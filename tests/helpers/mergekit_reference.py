"""What a mergekit file means, after mergekit's documentation, slow and obvious: `merged(file)` gives every tensor of the result.

For Llamas, the methods below, and all that can be said about parameters: filters, gradients, scopes, slices. mergekit is not
imported; `tests/clients/mergekit_agreement.py` compares with itself. Everything is computed in float64.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.helpers import reference, tiny

Tensors = dict[str, np.ndarray]


def evaluated(written: Any, name: str, t: float) -> Any:
    """The value for a tensor at `t` of the way through its slice's layers; None if no filter fits."""
    if isinstance(written, dict):
        return evaluated([written], name, t)
    if not isinstance(written, list):
        return written
    if any(isinstance(item, dict) for item in written):
        for item in written:
            if item.get("filter") in (None, "*") or item["filter"] in name:
                return evaluated(item["value"], name, t)
        return None
    if len(written) < 2:
        return written[0] if written else None
    return float(np.interp(t, np.linspace(0, 1, len(written)), written))


def merged(file: Path, folder: Path) -> Tensors:
    """The result of a file whose models' paths start from `folder`."""
    data = yaml.safe_load(file.read_text())
    models: dict[str, Tensors] = {}
    slices = data.get("slices") or [{"sources": [dict(model) for model in data["models"]]}]
    for source in (source for part in slices for source in part["sources"]):
        models[source["model"]] = load(folder / source["model"])
        source.setdefault("layer_range", [0, depth(models[source["model"]])])
    base = data.get("base_model")
    if "models" in data and base is not None and base not in models:
        models[base] = load(folder / base)
        slices[0]["sources"].append({"model": base, "layer_range": [0, depth(models[base])]})
    outside = [name for name in models[slices[0]["sources"][0]["model"]] if ".layers." not in name]
    result: Tensors = {}
    for name in outside:
        part = slices[0 if "embed_tokens" in name else -1]
        result[name] = tensor(data, part, models, name, {source["model"]: name for source in part["sources"]}, 0.0)
    layer = 0
    for part in slices:
        first, stop = part["sources"][0]["layer_range"]
        for offset in range(stop - first):
            t = offset / (stop - first - 1) if stop - first > 1 else 1.0
            for rest in [name.partition(".layers.0.")[2] for name in models[part["sources"][0]["model"]] if ".layers.0." in name]:
                names = {s["model"]: f"model.layers.{s['layer_range'][0] + offset}.{rest}" for s in part["sources"]}
                name = f"model.layers.{layer}.{rest}"
                result[name] = tensor(data, part, models, name, names, t)
            layer += 1
    return result


def load(folder: Path) -> Tensors:
    return {name: value.astype(np.float64) for name, value in tiny.read_values(folder).items()}


def depth(tensors: Tensors) -> int:
    return 1 + max(int(found[1]) for name in tensors if (found := re.search(r"\.layers\.(\d+)\.", name)))


def tensor(data: Any, part: Any, models: dict[str, Tensors], name: str, names: dict[str, str], t: float) -> np.ndarray:
    """One tensor of the result."""
    method, base = data["merge_method"], part.get("base_model", data.get("base_model"))

    def value(key: str, default: Any = None, source: Any = None) -> Any:
        own = (source.get("parameters"),) if source else ()
        for scope in (*own, part.get("parameters"), data.get("parameters")):
            if scope and key in scope:
                found = evaluated(scope[key], names[source["model"]] if source else name, t)
                if found is not None:
                    return found
        return default

    values = {model: models[model][names[model]] for model in names}
    shape = next(iter(values.values())).shape
    sources = [source for source in part["sources"] if source["model"] != base or method in ("linear", "passthrough")]
    theta_EN = np.stack([values[source["model"]].reshape(-1) for source in sources])
    if method == "passthrough":
        return theta_EN[0].reshape(shape) * value("scale", 1.0, sources[0])
    if method == "slerp":
        return reference.slerp(values[base].reshape(-1), theta_EN[0], value("t")).reshape(shape)
    weights = [value("weight", None, source) for source in sources]
    if method == "linear":
        return reference.linear(theta_EN, weights, normalize=value("normalize", True)).reshape(shape)
    base_N, scale = values[base].reshape(-1), value("lambda", 1.0)
    if method == "task_arithmetic":
        normalize = value("normalize", False)
        return reference.task_arithmetic(base_N, theta_EN, weights, scale=scale, normalize=normalize).reshape(shape)
    assert method == "ties"
    tau_EN = reference.task_vectors(base_N, theta_EN)
    densities = [value("density", 1.0, source) for source in sources]
    trimmed_EN = np.stack([reference.pruned(tau_N, density) for tau_N, density in zip(tau_EN, densities, strict=True)])
    aggregate: reference.Aggregate = "mean" if value("normalize", True) else "sum"
    return reference.add_scaled(base_N, reference.disjoint_merge(trimmed_EN, weights, aggregate), scale).reshape(shape)
