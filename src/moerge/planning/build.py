"""From a recipe to a plan, reading configs and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moerge.architecture import family_of
from moerge.calibration import Texts
from moerge.checkpoint.dtypes import DTYPES, FLOATS, DType
from moerge.checkpoint.reader import Checkpoint
from moerge.checkpoint.tokenizer import VOCABULARY_FILES, check_same_vocabulary, companion_files
from moerge.errors import InputError
from moerge.modeling import code_files
from moerge.moe.router import FittedRouter
from moerge.planning.assembly import Assembled, Assembly
from moerge.planning.checks import check_configs, check_models, merge_candidates
from moerge.planning.dense import assemble_dense
from moerge.planning.models import locate_models
from moerge.planning.plan import Plan
from moerge.planning.sequence_routed import assemble_sequence_routed
from moerge.planning.token_routed import assemble_token_routed
from moerge.recipe.schema import Recipe


def build_plan(recipe: Recipe, *, weights: bool = False, commits: Mapping[str, str | None] | None = None) -> Plan:
    """What the recipe amounts to, with every check that needs no tensor data.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched.
    Raises InputError if the models cannot be merged as asked.
    """
    models = locate_models(recipe, weights=weights, commits=commits or {})
    check_models(models)
    family = family_of(models[0].config)
    source = recipe.config or models[0].name
    warnings = check_configs(models, family, source=source, named=recipe.config is not None)
    tokenizer_source = recipe.tokenizer or source
    warnings += check_same_vocabulary(models)
    candidates, more = merge_candidates(models, family)
    by_name = {model.name: model for model in models}
    made = _assemble(Assembly(recipe, by_name, family, _dtype(recipe, by_name[source]), candidates, source))
    calibration = recipe.moe.router.inputs(recipe, made.experts) if recipe.moe else ()
    files = companion_files(by_name[tokenizer_source].folder)
    if calibration and not set(files) & set(VOCABULARY_FILES):
        raise InputError(f"calibration needs a tokenizer, and {tokenizer_source} has none: name another with 'tokenizer'")
    if recipe.moe and recipe.moe.by_sequence:
        files |= code_files()
    planned = Plan(
        recipe=recipe,
        models=models,
        outputs=tuple(made.outputs),
        config=made.config,
        files=files,
        experts=made.experts,
        calibration=calibration,
        warnings=(*warnings, *more, *_router_warnings(recipe), *_calibration_warnings(recipe, calibration)),
        notes=(f"config from {source}, tokenizer and generation config from {tokenizer_source}",),
    )
    return replace(planned, notes=(*planned.notes, *_router_notes(planned)))


def _assemble(assembly: Assembly) -> Assembled:
    moe = assembly.recipe.moe
    if moe is None:
        return assemble_dense(assembly)
    return assemble_sequence_routed(assembly) if moe.by_sequence else assemble_token_routed(assembly)


def _router_notes(plan: Plan) -> list[str]:
    router = plan.recipe.moe.router if plan.recipe.moe else None
    if not isinstance(router, FittedRouter):
        return []
    holds = "with the whole merged model" if router.runs_model else "with a few tensors"
    text = f", from {sum(len(texts.documents) for texts in plan.calibration)} texts" if plan.calibration else ""
    gigabytes = plan.router_bytes / 1e9
    return [f"the {router.kind} router is computed after merging {holds} in memory, about {gigabytes:.1f} GB{text}"]


def _router_warnings(recipe: Recipe) -> list[str]:
    if recipe.moe is None or not recipe.moe.router.needs_training:
        return []
    return [f"the {recipe.moe.router.kind} router is untrained: the MoE mixes its experts blindly until it is fine-tuned"]


def _calibration_warnings(recipe: Recipe, calibration: Sequence[Texts]) -> list[str]:
    if recipe.calibration and not calibration:
        return ["'calibration' is not used: nothing in this recipe is fitted to text"]
    owners: dict[str, set[str]] = {}
    for texts in calibration:
        for digest in texts.hashes:
            owners.setdefault(digest, set()).add(texts.expert)
    shared = [names for names in owners.values() if len(names) > 1]
    if not shared:
        return []
    return [f"{len(shared)} calibration texts belong to several experts ({', '.join(sorted(set().union(*shared)))})"]


def _dtype(recipe: Recipe, model: Checkpoint) -> DType:
    """The recipe's dtype, else the float type that most bytes of the config's model are stored in."""
    if recipe.dtype:
        return FLOATS[recipe.dtype]
    counts = Counter({dtype.name: 0 for dtype in FLOATS.values()})
    for tensor in model.tensors.values():
        if tensor.dtype.is_float:
            counts[tensor.dtype.name] += tensor.nbytes
    return DTYPES[counts.most_common(1)[0][0]]
