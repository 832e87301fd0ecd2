"""From a recipe to a plan, reading configs and headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moerge.architecture import Family
from moerge.architecture.stored import stored_family
from moerge.checkpoint.companions import model_companions
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.methods.statistical import StatisticsMethod
from moerge.modeling import code_files
from moerge.operations.operations import FitJob, fit_jobs
from moerge.planning.assemble.common import Assembled, Assembly
from moerge.planning.assemble.dense import assemble_dense, check_alone
from moerge.planning.assemble.experts import tokenizer_source
from moerge.planning.assemble.heterogeneous import assemble_heterogeneous, is_heterogeneous, settle
from moerge.planning.assemble.sequence_routed import assemble_sequence_routed
from moerge.planning.assemble.token_routed import assemble_token_routed
from moerge.planning.checks import check_configs, check_models, merge_candidates, with_alike_names, with_canonical_names
from moerge.planning.heads import settle_head, untie_alike
from moerge.planning.models import Commits, locate_models
from moerge.planning.plan import Plan
from moerge.planning.precision import main_dtype
from moerge.planning.statistics import Binder
from moerge.planning.vocab.checks import listed, tokens_without_rows
from moerge.planning.vocab.match import ResolvedVocabulary, resolve_vocabulary
from moerge.recipe.schema import Recipe
from moerge.tensors.dtypes import FLOATS, DType
from moerge.texts import Texts
from moerge.tokenizer import COMPANION_FILES, VOCABULARY_FILES
from moerge.tokenizer.portable import portable_tokenizer


def build_plan(
    recipe: Recipe, *, weights: bool = False, commits: Mapping[str, str | None] | None = None, bind: bool = True
) -> Plan:
    """Plan the recipe, with every check that needs no tensor data.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched. Without `bind` methods do not get the statistics that they need: such a plan cannot be carried out.
    Raises InputError if the models cannot be merged as asked.
    """
    models = located(recipe, weights=weights, commits=commits)
    if is_heterogeneous(recipe, models):
        return _plan_whole_models(recipe, models)
    check_models(models)
    source = recipe.config or models[0].name
    family = family_as_stored(models, source)
    models, untied = untie_alike(models, family)
    named, stacked = recipe.config is not None, bool(recipe.slices)
    warnings = check_configs(models, family, source=source, named=named, stacked=stacked)
    vocabulary = resolve_vocabulary(models, family, recipe, source)
    alike = vocabulary.models
    tokenizer = next(model for model in alike if model.name == vocabulary.source)
    warnings += (*vocabulary.warnings, *tokens_without_rows(tokenizer, family))
    candidates = check_alone(alike, family, recipe) if stacked else merge_candidates(alike, family, recipe, source)
    by_name = {model.name: model for model in models}
    binder = Binder(recipe, by_name) if bind else None
    dtype = _dtype(recipe, by_name[source])
    by_alike = {model.name: model for model in alike}
    alignment, owners = vocabulary.alignment, candidates.owners
    assembly = Assembly(recipe, by_alike, family, dtype, candidates.tensors, source, binder, alignment, owners)
    made = _assemble(assembly)
    made = replace(made, notes=(*made.notes, *untied, *assembly.precision.notes(made.outputs)))
    if recipe.learned:
        recipe.learned.check({tensor.name: tensor.shape for tensor in (candidates.tensors or made.outputs)})
    made, own, lacking = _with_companions(recipe, made, by_name[source])
    remarks = (*warnings, *candidates.warnings, *lacking)
    planned = _planned(recipe, models, made, vocabulary, own, config_from=f"config from {source}, ", warnings=remarks)
    if binder is None:
        return planned
    used = tuple(binder.used.values())
    return replace(planned, statistics=used, warnings=(*planned.warnings, *binder.remarks()))


def located(recipe: Recipe, *, weights: bool = False, commits: Mapping[str, str | None] | None = None) -> tuple[Checkpoint, ...]:
    """The recipe's models, with names that are alike and heads as tied as they are stored; arguments as in `build_plan`."""

    def build(inner: Recipe, inner_commits: Commits) -> Plan:
        return build_plan(inner, weights=weights, commits=inner_commits)

    models = tuple(map(with_canonical_names, locate_models(recipe, weights=weights, commits=commits or {}, build=build)))
    models = with_alike_names(models, recipe.config or models[0].name)
    return tuple(settle_head(model, stored_family(model.config, model.tensors)) for model in models)


def family_as_stored(models: Sequence[Checkpoint], source: str) -> Family | None:
    """The family of the config's model, with the names and the head that it has."""
    leader = next(model for model in models if model.name == source)
    return stored_family(leader.config, leader.tensors)


def _plan_whole_models(recipe: Recipe, models: tuple[Checkpoint, ...]) -> Plan:
    """The plan of a model whose experts stay whole models."""
    recipe = settle(recipe)
    source = tokenizer_source(models, recipe.tokenizer)
    by_name = {model.name: model for model in models}
    dtype = _dtype(recipe, by_name["base" if "base" in by_name else recipe.expert_names[0]])
    made, vocabulary = assemble_heterogeneous(recipe, models, dtype, tokenizer=source)
    return _planned(recipe, models, made, vocabulary)


def _with_companions(recipe: Recipe, made: Assembled, model: Checkpoint) -> tuple[Assembled, Mapping[str, bytes], list[str]]:
    """Add what a dense result has of its config's model beside tensors and tokenizer: files, code and all; and warnings."""
    own = model_companions(model.folders[-1], model.config, others=COMPANION_FILES)
    if recipe.moe is not None:
        lacking = [name for name in (*own.files, *own.left_out) if "/" not in name]
        return made, {}, _left_out(model, lacking)
    warnings = _left_out(model, own.left_out)
    weights = [name for name in own.files if name.endswith(".safetensors")]
    if weights:
        warnings.append(f"{', '.join(weights)}: copied from {model.name}, not merged")
    if own.code:
        warnings.append(
            f"{model.name} runs by code of its own, which the result has too: {', '.join(own.code)}; read it before use"
        )
    elif model.config.get("auto_map") and not own.auto_map:
        warnings.append(f"{model.name}: 'auto_map' in config.json names code that its folder lacks, so it is left out")
    config = {**made.config, "auto_map": own.auto_map} if own.auto_map else made.config
    return replace(made, config=config), own.files, warnings


def _left_out(model: Checkpoint, names: Sequence[str]) -> list[str]:
    return [f"files of {model.name} that the result lacks: {listed(names, len(names))}"] if names else []


def _planned(
    recipe: Recipe,
    models: tuple[Checkpoint, ...],
    made: Assembled,
    vocabulary: ResolvedVocabulary,
    own: Mapping[str, bytes] | None = None,
    *,
    config_from: str = "",
    warnings: Sequence[str] = (),
) -> Plan:
    """The plan of what was assembled, with its files, texts and remarks."""
    calibration = calibration_texts(recipe, made.experts, fit_jobs(made.outputs))
    files = portable_tokenizer(vocabulary.files)
    if calibration and not set(files) & set(VOCABULARY_FILES):
        raise InputError(f"calibration needs a tokenizer, and {vocabulary.source} has none: name another with 'tokenizer'")
    files = {**(own or {}), **files, **(recipe.learned.files if recipe.learned else {})}
    if recipe.moe is not None and made.config.get("auto_map"):
        files |= {name: path.read_bytes() for name, path in code_files(made.config["auto_map"]).items()}
    planned = Plan(
        recipe=recipe,
        models=models,
        outputs=tuple(made.outputs),
        config=made.config,
        files=files,
        experts=made.experts,
        vocabulary=_vocabulary_facts(vocabulary),
        calibration=calibration,
        warnings=(
            *_model_warnings(recipe, models),
            *warnings,
            *made.warnings,
            *_router_warnings(recipe),
            *_calibration_warnings(recipe, calibration),
        ),
        notes=(
            *recipe.notes,
            *made.notes,
            f"{config_from}{vocabulary.origin}",
            *vocabulary.notes,
        ),
    )
    return replace(planned, notes=(*planned.notes, *_fit_notes(planned)))


def calibration_texts(recipe: Recipe, experts: Sequence[str], needed: Sequence[FitJob]) -> tuple[Texts, ...]:
    """The text of each expert that something is fitted to: where fitters want more and fewer documents, the more."""
    request = recipe.text_request(experts)
    found: dict[str, Texts] = {}
    for fitting in needed:
        for texts in fitting.fitter.inputs(request):
            if texts.expert not in found or len(found[texts.expert].hashes) < len(texts.hashes):
                found[texts.expert] = texts
    return tuple(found.values())


def _vocabulary_facts(vocabulary: ResolvedVocabulary) -> dict[str, Any]:
    return {**vocabulary.facts, **({"digest": vocabulary.alignment.digest} if vocabulary.alignment else {})}


def _assemble(assembly: Assembly) -> Assembled:
    moe = assembly.recipe.moe
    if moe is None:
        return assemble_dense(assembly)
    return assemble_sequence_routed(assembly) if moe.by_sequence else assemble_token_routed(assembly)


def _model_warnings(recipe: Recipe, models: Sequence[Checkpoint]) -> list[str]:
    return [*recipe.warnings, *(text for model in models for text in model.warnings)]


def _fit_notes(plan: Plan) -> list[str]:
    every = sum(len(texts.documents) for texts in plan.calibration)
    notes = []
    for title, fitter in {fitting.fitter.title: fitting.fitter for fitting in plan.fit_jobs}.items():
        model = "one expert after the other" if fitter.runs_one_expert else "the whole merged model"
        holds = f"with {model if fitter.runs_model else 'a few tensors'}"
        size = f"about {plan.fitting_bytes(title=title) / 1e9:.1f} GB{' with torch itself' if fitter.needs_torch else ''}"
        texts = fitter.steps(plan.calibration) if fitter.counts == "texts" else every
        verb, source = "are" if title.endswith("s") else "is", f", from {texts} texts" if texts else ""
        notes.append(f"{title} {verb} computed after merging {holds} in memory, {size}{source}")
    return notes


def _router_warnings(recipe: Recipe) -> list[str]:
    if recipe.moe is None or not recipe.moe.router.needs_training:
        return []
    return [f"the {recipe.moe.router.kind} router is untrained: the MoE mixes its experts blindly until it is fine-tuned"]


def _calibration_warnings(recipe: Recipe, calibration: Sequence[Texts]) -> list[str]:
    if recipe.learn:
        return ["'learn' is for `moerge learn`, which finds the coefficients; a plain merge does not use it"]
    unused = recipe.calibration and not calibration and not recipe.learned
    if unused and not any(isinstance(method, StatisticsMethod) for method in recipe.methods):
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
    return main_dtype(model)
