"""The model card: a README.md that says how a checkpoint came about and how to load it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from moerge.architecture.sequence import HETEROGENEOUS
from moerge.checkpoint.source_cards import SourceCard, all_of, licence_metadata, source_card
from moerge.errors import one_line, printable
from moerge.methods.method import MergeMethod
from moerge.operations.operations import Merge
from moerge.planning.plan import Plan
from moerge.recipe.schema import MoE

_USE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```"""

_BARE_USE = "These are tensors by name, for the program that the merged ones are from; `safetensors.torch.load_file` reads them."
_OWN_CODE_USE = """The architecture is moerge's own, for transformers 5.5 or newer, and its code lies beside the weights:

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


_ADAPTERS = " Experts are LoRA adapters on one copy of the base."
_NO_LICENCE = "The sources' licences differ or are not known, so this card claims none: each source's own terms hold."


def model_card(plan: Plan) -> str:
    """Markdown with the Hub's metadata block in front."""
    by_sequence = plan.recipe.moe is not None and plan.recipe.moe.by_sequence
    cards = [source_card(model) for model in plan.models]
    kind = "sequence-routed mixture of experts" if by_sequence else "mixture of experts" if plan.experts else "dense model"
    parts = [
        "---\n" + _yaml(_metadata(plan, cards)) + "---",
        f"# {plan.account.title}" if plan.account else f"# A {kind} merged from {len(plan.recipe.experts)} experts",
        f"Made by moerge {version('moerge')}: {plan.parameters:,} parameters, {_stored_as(plan)}.",
        "## How",
        *_how(plan),
        "## Sources",
        _sources(plan, cards),
        *([] if licence_metadata(cards) else [_NO_LICENCE]),
        "## Recipe",
        _block(_yaml(plan.recipe.written)),
        *(["## Tokens", _list(tokens)] if (tokens := plan.vocabulary.get("notes")) else ()),
        *(["## Warnings", _list(plan.warnings)] if plan.warnings else ()),
        "## Use",
        _OWN_CODE_USE if plan.experts and plan.config.get("auto_map") else _USE if plan.config.get("model_type") else _BARE_USE,
        "`moerge verify path/to/this/folder` checks every tensor against the manifest `moerge.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def code(text: str) -> str:
    """Text from a file as Markdown shows it literally, in a table too."""
    plain = printable(" ".join(text.split())).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{fence} {plain} {fence}" if len(fence) > 1 else f"{fence}{plain}{fence}"


def _block(text: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}yaml\n{text}{fence}"


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {html.escape(one_line(sentence), quote=False)}" for sentence in sentences)


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _metadata(plan: Plan, cards: Sequence[SourceCard]) -> dict[str, Any]:
    """The Hub's keys; what is not known is left out. Local sources have no name that others could look up."""
    origins = [origin for model in plan.models for origin in model.origins if origin.revision]
    on_hub = list(dict.fromkeys(origin.location.partition("@")[0] for origin in origins))
    known = {
        "base_model": on_hub,
        "base_model_relation": "merge" if on_hub else "",
        **({"library_name": "transformers"} if plan.config.get("model_type") else {}),
        **licence_metadata(cards),
        "language": all_of(cards, lambda card: card.languages),
        "datasets": all_of(cards, lambda card: card.datasets),
        "tags": ["merge", "moerge", *(["moe"] if plan.experts else [])],
    }
    return {key: value for key, value in known.items() if value}


def _stored_as(plan: Plan) -> str:
    if not plan.config.get("model_type"):
        return ", ".join(sorted({f"`{output.dtype.torch_name}`" for output in plan.outputs}))
    return f"`{plan.config['dtype']}`, architecture {code(_architecture(plan))}"


def _architecture(plan: Plan) -> str:
    return str((plan.config.get("architectures") or [plan.config.get("model_type")])[0])


def _how(plan: Plan) -> list[str]:
    if plan.account is not None:
        return [*plan.account.paragraphs, *_calibration(plan)]
    return ["\n\n".join(_methods(plan)), *(_moe(plan) if plan.experts else ())]


def _methods(plan: Plan) -> list[str]:
    """Each method with its settings; those of another program's file may be others for every tensor."""
    if plan.recipe.moe and plan.recipe.moe.embedding == "separate":
        return ["Nothing is merged."]
    if plan.recipe.settings is None:
        return [_method(method) for method in dict.fromkeys(plan.recipe.methods)]
    merges = [output.operation for output in plan.outputs if isinstance(output.operation, Merge)]
    found: dict[str, dict[MergeMethod, None]] = {}
    for merge in merges:
        found.setdefault(merge.method.name, {})[merge.method] = None
    one = "Tensors are copied from the models that the recipe names for them."
    vary = " The settings of the first tensor; others have others, see the recipe."
    return [_method(next(iter(used))) + (vary if len(used) > 1 else "") for used in found.values()] or [one]


def _method(method: MergeMethod) -> str:
    formula = " ".join((type(method).__doc__ or "").split("\n\n")[0].split())
    parameters = ", ".join(f"{key} = {value}" for key, value in method.described.items())
    return f"**{method.name}**{f' ({parameters})' if parameters else ''}: {formula}"


def _moe(plan: Plan) -> list[str]:
    assert plan.recipe.moe is not None
    moe = plan.recipe.moe
    order = ", ".join(f"{index} {name}" for index, name in enumerate(plan.experts))
    if plan.config["model_type"] == HETEROGENEOUS:
        return [_whole_models(plan, moe, order), *_calibration(plan)]
    if moe.by_sequence:
        options = ", ".join(f"{key} {value}" for key, value in plan.config["routing"].items() if key != "kind")
        return [
            f"Kept separate for each expert: {', '.join(moe.separate)}; everything else is merged as above (MergeME, section "
            f"3.1.3).{_ADAPTERS if moe.adapters == 'keep' else ''} Experts by index: {order}. Each sequence is routed as a "
            f"whole, by its prompt: {moe.router.kind}"
            f"{f' ({options})' if options else ''}{', untrained' if moe.router.needs_training else ''}, mixed by {moe.mix}.",
            *_calibration(plan),
        ]
    router = "untrained: fine-tune it before use" if moe.router.needs_training else "computed, not trained"
    return [
        f"Feed-forward layers are kept separate{f' in the layers {moe.layers}' if moe.layers else ''}, everything else is merged "
        f"as above (Branch-Train-Mix; MergeME, section 3.1.1). Experts by index: {order}. Each token goes to {moe.top_k} of "
        f"{len(plan.experts)}{_shared(moe)}. Router: {moe.router.kind}, {router}.",
        *_calibration(plan),
    ]


def _shared(moe: MoE) -> str:
    return f"; every token also goes through {moe.shared}, which makes up {moe.shared_weight:g} of a layer" if moe.shared else ""


def _whole_models(plan: Plan, moe: MoE, order: str) -> str:
    """Describe experts that stay whole models."""
    types = ", ".join(dict.fromkeys(config["model_type"] for config in plan.config["expert_configs"]))
    routing = plan.config["routing"]
    reads = "the whole sequence" if routing["on"] == "sequence" else f"the prompt, or the first {routing['prefix_tokens']} tokens"
    shared = (
        "each has its own embedding and head on the tokens of one tokenizer, and their probabilities are mixed"
        if moe.embedding == "separate"
        else f"projectors ({moe.projectors}) lead from a shared embedding into each and back to a shared head, which are merged "
        "as above"
    )
    return (
        f"The experts are whole models ({types}), copied: {shared} (MergeME, section 3.2). Experts by index: {order}. Each "
        f"sequence is routed as a whole, by {reads}: {moe.router.kind}{', untrained' if moe.router.needs_training else ''}."
    )


def _calibration(plan: Plan) -> list[str]:
    if not plan.calibration:
        return []
    described = ", ".join(f"{texts.expert} {len(texts.hashes)} from {code(texts.location)}" for texts in plan.calibration)
    return [f"Calibration texts: {described}. Do not evaluate on them; the manifest has their hashes."]


def _sources(plan: Plan, cards: Sequence[SourceCard]) -> str:
    rows = ["| name | model | revision | weight | licence |", "|---|---|---|---|---|"]
    for model, card in zip(plan.models, cards, strict=True):
        expert = plan.recipe.experts.get(model.name)
        weight = "base" if expert is None else f"{expert.weight:g}" if plan.recipe.settings is None else "see the recipe"
        rows.append(f"| {model.name} | {code(model.location)} | {model.revision or 'local'} | {weight} | {card.shown} |")
    return "\n".join(rows)
