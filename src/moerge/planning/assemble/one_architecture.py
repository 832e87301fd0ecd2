"""Models of one architecture: checked and matched, merged tensor by tensor, and what the result has beside its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moerge.checkpoint.companions import model_companions
from moerge.checkpoint.reader import Checkpoint
from moerge.planning.assemble.common import Assembled, Assembly, Draft
from moerge.planning.assemble.dense import stacked_candidates
from moerge.planning.checks import check_configs, check_models, merge_candidates
from moerge.planning.heads import untie_alike
from moerge.planning.models import SourceModel
from moerge.planning.precision import result_dtype
from moerge.planning.statistics import Binder
from moerge.planning.vocab.checks import listed, tokens_without_rows
from moerge.planning.vocab.match import ResolvedVocabulary, resolve_vocabulary
from moerge.recipe.schema import Recipe
from moerge.tokenizer import COMPANION_FILES


@dataclass(frozen=True)
class _Matched:
    """The models, and what they are assembled from once their vocabularies are one."""

    models: tuple[SourceModel, ...]
    vocabulary: ResolvedVocabulary
    assembly: Assembly
    warnings: Sequence[str]
    notes: Sequence[str]


def draft_of_one_architecture(
    assemble: Callable[[Assembly], Assembled], recipe: Recipe, models: Sequence[SourceModel], *, bind: bool
) -> Draft:
    """Match the models and `assemble` them. Without `bind` methods do not get the statistics that they need.

    Raises InputError if the models cannot be merged tensor by tensor.
    """
    matched = _matched(recipe, models, bind=bind)
    assembly, vocabulary, binder = matched.assembly, matched.vocabulary, matched.assembly.binder
    assembled = assemble(assembly)
    if recipe.learned:
        recipe.learned.check({tensor.name: tensor.shape for tensor in (assembly.candidates or assembled.outputs)})
    leader = next(model for model in matched.models if model.name == assembly.source)
    notes = (*assembled.notes, *matched.notes, *assembly.precision.notes(assembled.outputs))
    assembled, files, lacking = _with_companions(recipe, assembled, leader.checkpoint)
    return Draft(
        assembled,
        matched.models,
        vocabulary,
        warnings=(*matched.warnings, *lacking, *assembled.warnings, *(binder.remarks() if binder else ())),
        notes=(*notes, f"config from {assembly.source}, {vocabulary.origin}", *vocabulary.notes),
        files=files,
        statistics=tuple(binder.used.values()) if binder else (),
    )


def _matched(recipe: Recipe, models: Sequence[SourceModel], *, bind: bool) -> _Matched:
    check_models(models)
    source = recipe.config or models[0].name
    leader = next(model for model in models if model.name == source)
    models, untied = untie_alike([_read_by(leader, model) for model in models])
    stacked = bool(recipe.slices)
    warnings = check_configs(models, source=source, named=recipe.config is not None, stacked=stacked)
    vocabulary = resolve_vocabulary(models, recipe, source)
    alike = {model.name: model for model in vocabulary.models}
    warnings += (*vocabulary.warnings, *tokens_without_rows(alike[vocabulary.source]))
    every = vocabulary.models
    candidates = stacked_candidates(every, recipe) if stacked else merge_candidates(every, recipe, source)
    checkpoints = {model.name: model.checkpoint for model in models}
    assembly = Assembly(
        recipe,
        alike,
        result_dtype(recipe, checkpoints[source]),
        candidates.tensors,
        source,
        Binder(recipe, checkpoints) if bind else None,
        vocabulary.alignment,
        candidates.owners,
    )
    return _Matched(models, vocabulary, assembly, (*warnings, *candidates.warnings), untied)


def _read_by(leader: SourceModel, model: SourceModel) -> SourceModel:
    """The model with the leader's table; where that is derived from a config, the model's own config counts nevertheless."""
    family = leader.family
    if family is not None and family.source and model.family is not None:
        family = replace(family, derive=model.family.derive)
    return replace(model, family=family)


def _with_companions(
    recipe: Recipe, assembled: Assembled, model: Checkpoint
) -> tuple[Assembled, Mapping[str, bytes], Sequence[str]]:
    """Add what a dense result has of its config's model beside tensors and tokenizer: files, code and all; and warnings."""
    own = model_companions(model.folders[-1], model.config, others=COMPANION_FILES)
    if recipe.moe is not None:
        lacking = [name for name in (*own.files, *own.left_out) if "/" not in name]
        return assembled, {}, _left_out(model, lacking)
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
    config = {**assembled.config, "auto_map": own.auto_map} if own.auto_map else assembled.config
    return replace(assembled, config=config), own.files, warnings


def _left_out(model: Checkpoint, names: Sequence[str]) -> list[str]:
    return [f"files of {model.name} that the result lacks: {listed(names, len(names))}"] if names else []
