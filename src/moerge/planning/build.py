"""From a recipe to a plan, reading configs and headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moerge.checkpoint.expert import ExpertCheckpoint
from moerge.errors import InputError
from moerge.methods.statistical import StatisticsMethod
from moerge.modeling import code_files
from moerge.operations.operations import FitJob, fit_jobs
from moerge.planning.alike import with_alike_names
from moerge.planning.assemble.common import Draft
from moerge.planning.assemble.dense import assemble_dense
from moerge.planning.assemble.heterogeneous import draft_heterogeneous
from moerge.planning.assemble.one_architecture import draft_of_one_architecture
from moerge.planning.assemble.sequence_routed import assemble_sequence_routed
from moerge.planning.assemble.token_routed import assemble_token_routed
from moerge.planning.float8 import with_float8
from moerge.planning.heads import settle_head
from moerge.planning.kinds import Kind, kind, resolve
from moerge.planning.models import Commits, SourceModel, locate_models
from moerge.planning.plan import Plan
from moerge.planning.vocab.match import ResolvedVocabulary
from moerge.recipe.schema import FLOAT8, Recipe
from moerge.texts import Texts
from moerge.tokenizer import VOCABULARY_FILES
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
    recipe = resolve(recipe, models)
    return _planned(recipe, _DRAFTS[kind(recipe)](recipe, models, bind=bind))


_DRAFTS: Mapping[Kind, Callable[..., Draft]] = {
    "dense": partial(draft_of_one_architecture, assemble_dense),
    "token_routed": partial(draft_of_one_architecture, assemble_token_routed),
    "sequence_routed": partial(draft_of_one_architecture, assemble_sequence_routed),
    "heterogeneous": draft_heterogeneous,
}
"""What makes a plan's draft of a recipe and its models."""


def located(recipe: Recipe, *, weights: bool = False, commits: Mapping[str, str | None] | None = None) -> tuple[SourceModel, ...]:
    """The recipe's models, with names that are alike and heads as tied as they are stored; arguments as in `build_plan`."""

    def build(inner: Recipe, inner_commits: Commits) -> Plan:
        return build_plan(inner, weights=weights, commits=inner_commits)

    checkpoints = locate_models(recipe, weights=weights, commits=commits or {}, build=build)
    models = tuple(map(SourceModel.of, checkpoints))
    return tuple(map(settle_head, with_alike_names(models, recipe.config or models[0].name, across=recipe.moe is None)))


def _planned(recipe: Recipe, draft: Draft) -> Plan:
    """The plan of a draft, with its files, texts and remarks."""
    assembled, vocabulary = draft.assembled, draft.vocabulary
    sources = [model.checkpoint for model in draft.models]
    statistics = {model.name: model.statistics for model in sources if isinstance(model, ExpertCheckpoint)}
    calibration = calibration_texts(recipe, assembled.experts or tuple(recipe.experts), fit_jobs(assembled.outputs), statistics)
    files = portable_tokenizer(vocabulary.files)
    if calibration and not set(files) & set(VOCABULARY_FILES):
        raise InputError(f"calibration needs a tokenizer, and {vocabulary.source} has none: name another with 'tokenizer'")
    files = {**draft.files, **files, **(recipe.learned.files if recipe.learned else {})}
    if recipe.moe is not None and assembled.config.get("auto_map"):
        files |= {name: path.read_bytes() for name, path in code_files(assembled.config["auto_map"]).items()}
    models = tuple(model.checkpoint for model in draft.models)
    plan = Plan(
        recipe=recipe,
        models=models,
        outputs=tuple(assembled.outputs),
        config=with_float8(assembled.config, assembled.outputs, recipe.source) if recipe.dtype == FLOAT8 else assembled.config,
        files=files,
        experts=assembled.experts,
        vocabulary=_vocabulary_facts(vocabulary),
        calibration=calibration,
        statistics=draft.statistics,
        warnings=(
            *recipe.warnings,
            *(text for model in models for text in model.warnings),
            *draft.warnings,
            *_router_warnings(recipe),
            *_calibration_warnings(recipe, calibration),
        ),
        notes=(*recipe.notes, *(text for model in models for text in model.notes), *draft.notes, *_output_notes(recipe)),
        family=draft.models[0].family,
    )
    return replace(plan, notes=(*plan.notes, *_fit_notes(plan)))


def _output_notes(recipe: Recipe) -> list[str]:
    if recipe.output is None:
        return []
    rank = f"rank {recipe.output.rank}" if recipe.output.rank else "the adapters' largest rank"
    return [f"the result is an adapter: what this changes of the base, as a LoRA of {rank}"]


def calibration_texts(
    recipe: Recipe, experts: Sequence[str], needed: Sequence[FitJob], statistics: Mapping[str, Path] | None = None
) -> tuple[Texts, ...]:
    """The text of each expert that something is fitted to: where fitters want more and fewer documents, the more.

    `statistics` are files that may be there instead of text, by expert.
    """
    request = recipe.text_request(experts, statistics)
    by_expert: dict[str, Texts] = {}
    for fitting in needed:
        for texts in fitting.fitter.inputs(request):
            if texts.expert not in by_expert or len(by_expert[texts.expert].hashes) < len(texts.hashes):
                by_expert[texts.expert] = texts
    return tuple(by_expert.values())


def _vocabulary_facts(vocabulary: ResolvedVocabulary) -> dict[str, Any]:
    return {**vocabulary.facts, **({"digest": vocabulary.alignment.digest} if vocabulary.alignment else {})}


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
