"""The model card: a README.md that says how a checkpoint came about and how to load it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import yaml

from moerge.methods.method import MergeMethod
from moerge.planning.plan import Plan

_USE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```"""

_BY_SEQUENCE_USE = """The architecture is moerge's own, for transformers 5.5 or newer, and its code lies beside the weights:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

Where moerge is installed, its own code can be used instead:

```python
import moerge.modeling
from transformers import AutoModelForCausalLM

moerge.modeling.register()
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```"""


def model_card(plan: Plan) -> str:
    """Markdown with the Hub's metadata block in front."""
    by_sequence = plan.recipe.moe is not None and plan.recipe.moe.by_sequence
    kind = "sequence-routed mixture of experts" if by_sequence else "mixture of experts" if plan.experts else "dense model"
    parts = [
        "---\n" + _yaml(_metadata(plan)) + "---",
        f"# A {kind} merged from {len(plan.recipe.experts)} experts",
        f"Made by moerge {version('moerge')}: {plan.parameters:,} parameters, "
        f"`{plan.config['dtype']}`, architecture `{_architecture(plan)}`.",
        "## How",
        "\n\n".join(_method(method) for method in dict.fromkeys(plan.recipe.methods)),
        *(_moe(plan) if plan.experts else ()),
        "## Sources",
        _sources(plan),
        "## Recipe",
        "```yaml\n" + _yaml(plan.recipe.written) + "```",
        *(["## Warnings", "\n".join(f"- {warning}" for warning in plan.warnings)] if plan.warnings else ()),
        "## Use",
        _BY_SEQUENCE_USE if by_sequence else _USE,
        "`moerge verify path/to/this/folder` checks every tensor against the manifest `moerge.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _metadata(plan: Plan) -> dict[str, Any]:
    on_hub = [model.location.partition("@")[0] for model in plan.models if model.revision]
    tags = ["merge", "moerge", *(["moe"] if plan.experts else [])]
    return {"library_name": "transformers", "tags": tags, **({"base_model": on_hub} if on_hub else {})}


def _architecture(plan: Plan) -> str:
    return str((plan.config.get("architectures") or [plan.config.get("model_type")])[0])


def _method(method: MergeMethod) -> str:
    formula = " ".join((type(method).__doc__ or "").split("\n\n")[0].split())
    parameters = ", ".join(f"{key} = {value}" for key, value in method.model_dump().items())
    return f"**{method.name}**{f' ({parameters})' if parameters else ''}: {formula}"


def _moe(plan: Plan) -> list[str]:
    assert plan.recipe.moe is not None
    moe = plan.recipe.moe
    order = ", ".join(f"{index} {name}" for index, name in enumerate(plan.experts))
    if moe.by_sequence:
        options = ", ".join(f"{key} {value}" for key, value in plan.config["routing"].items() if key != "kind")
        return [
            f"Kept separate for each expert: {', '.join(moe.separate)}; everything else is merged as above (MergeME, section "
            f"3.1.3). Experts by index: {order}. Each sequence is routed as a whole, by its prompt: {moe.router.kind}"
            f"{f' ({options})' if options else ''}{', untrained' if moe.router.needs_training else ''}, mixed by {moe.mix}.",
        ]
    router = "untrained: fine-tune it before use" if moe.router.needs_training else "computed, not trained"
    return [
        "Feed-forward layers are kept separate, everything else is merged as above (Branch-Train-Mix; MergeME, section 3.1.1). "
        f"Experts by index: {order}. Each token goes to {moe.top_k} of {len(plan.experts)}. Router: {moe.router.kind}, {router}.",
        *_calibration(plan),
    ]


def _calibration(plan: Plan) -> list[str]:
    if not plan.calibration:
        return []
    described = ", ".join(f"{texts.expert} {len(texts.hashes)} from `{texts.location}`" for texts in plan.calibration)
    return [f"Calibration texts of the router: {described}. Do not evaluate on them; the manifest has their hashes."]


def _sources(plan: Plan) -> str:
    rows = ["| name | model | revision | weight |", "|---|---|---|---|"]
    for model in plan.models:
        expert = plan.recipe.experts.get(model.name)
        weight = f"{expert.weight:g}" if expert else "base"
        rows.append(f"| {model.name} | `{model.location}` | {model.revision or 'local'} | {weight} |")
    return "\n".join(rows)
