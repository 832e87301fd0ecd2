"""`moerge reduce`: read `reduce` first.

recipe -> open_mixture -> statistics (stored, or one pass over text) -> choose -> plan -> merge
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.files import scratch_folder, target_of
from moerge.formatting import Displayed
from moerge.merging.pipeline import SHARD_BYTES, MergeResult, merge, start_of
from moerge.methods.average import Average
from moerge.planning.plan import Account, Plan
from moerge.planning.precision import result_dtype
from moerge.progress import Progress, reporter
from moerge.recipe.schema import Expert, Recipe
from moerge.reduction.choice import Choice, choose
from moerge.reduction.mixture import NAME, Assembler, Mixture, base_matrices, left_out, names_of, open_mixture
from moerge.reduction.passing import TextPass, gather_sums, spread, tokenized
from moerge.reduction.settings import Fold, MethodFold, ReductionRecipe, load_reduction
from moerge.reduction.sums import Sums, load_sums, save_sums
from moerge.runtime.layerwise import LayerwiseModel
from moerge.tensors.threads import default_threads, single_threaded_blas
from moerge.texts import Texts, read_texts
from moerge.tokenizer import VOCABULARY_FILES, companion_files
from moerge.tokenizer.portable import portable_tokenizer

_SHOWN = 6
_EVEN = 8
"""Engines that spread experts over processes want numbers that divide by theirs."""


@dataclass(frozen=True, repr=False)
class ReduceResult(Displayed):
    """A finished reduction. `routers` are the mean divergences before and after fitting by layer; none where none was fitted."""

    merged: MergeResult
    choice: Choice
    statistics: Path
    gathered: tuple[str, ...]
    tokens: Mapping[str, int]
    routers: Mapping[int, tuple[float, float]]

    def headline(self) -> str:
        """The folder, and what is in it."""
        return self.merged.headline()

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            **self.merged.to_json(),
            "statistics": str(self.statistics),
            "gathered": list(self.gathered),
            "tokens": dict(self.tokens),
            "layers": [layer.to_json() for layer in self.choice.layers],
            "never_routed": [list(pair) for pair in self.choice.never_routed],
            "protected": [list(pair) for pair in self.choice.protected],
            "router_divergence": {str(layer): list(pair) for layer, pair in self.routers.items()},
        }


def reduce(
    recipe: str | Path | Mapping[str, Any] | ReductionRecipe,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    threads: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | bool = False,
    clients: Sequence[str] = (),
) -> ReduceResult:
    """Write a mixture with fewer experts to the folder `out`.

    The statistics that decide are kept in `OUT.statistics`, or where the recipe says: another reduction by them runs no text.

    Args:
        recipe: A recipe's path, the same structure as a dict, or a `ReductionRecipe`.
        out: The folder to write.
        resume: Continue an interrupted reduction, or be content with a complete one.
        force: Replace a checkpoint that moerge made there before.
        threads: Texts that run at once; the result does not depend on it. Default: the cores available.
        max_shard_bytes: Largest file of weights.
        progress: A `Progress`, or True for a display on standard error.
        clients: Programs that are to run the result, as in `plan`.

    Returns:
        What was written, and which experts are left.

    Raises:
        InputError: The recipe, the mixture or a text is at fault, or `out` exists.
    """
    recipe = load_reduction(recipe)
    target, threads = target_of(out), threads or default_threads()
    mixture = open_mixture(recipe)
    if not resume:  # before any text runs
        start_of(target, [(NAME, mixture.model.folder)], resume=False, force=force)
    folder = recipe.folder / recipe.reduction.statistics if recipe.reduction.statistics else Path(f"{target}.statistics")
    texts = _texts(recipe, mixture)
    with reporter(progress) as report:
        domains, gathered = _statistics(recipe, mixture, texts, folder, threads, report)
        choice = choose(domains, mixture.layers, recipe.reduction)
        plan, assembler = _plan(recipe, mixture, choice, texts)
        merged = merge(
            plan,
            target,
            resume=resume,
            force=force,
            threads=threads,
            max_shard_bytes=max_shard_bytes,
            progress=report,
            clients=clients,
        )
    tokens = {domain: int(sums["tokens_L"].max()) for domain, sums in domains.items()}
    routers = {layer: (fit.before, fit.after) for layer, fit in assembler.fitter.routers.items()}
    return ReduceResult(merged, choice, folder, gathered, tokens, routers)


def _texts(recipe: ReductionRecipe, mixture: Mixture) -> tuple[Texts, ...]:
    reduction = recipe.reduction
    texts = tuple(
        read_texts(domain, location, relative_to=recipe.folder, limit=reduction.texts)
        for domain, location in recipe.calibration.items()
    )
    if not texts and (reduction.needs_text or not reduction.statistics):
        what = "fitting to text" if reduction.needs_text else "choosing experts"
        raise InputError(f"{recipe.source}: {what} needs text: add 'calibration: {{DOMAIN: FILE}}'")
    if texts and not any((mixture.model.folder / name).is_file() for name in VOCABULARY_FILES):
        raise InputError(f"{recipe.source}: calibration needs a tokenizer, and {mixture.model.folder} has none: copy it there")
    return texts


def _statistics(
    recipe: ReductionRecipe, mixture: Mixture, texts: Sequence[Texts], folder: Path, threads: int, progress: Progress
) -> tuple[dict[str, Sums], tuple[str, ...]]:
    """The sums of every domain: those that are stored, and of others those of a pass. And the domains that ran."""
    if not texts:
        return _stored(recipe, mixture, folder), ()
    facts = {own.expert: _facts(recipe, mixture, own) for own in texts}
    found = {domain: _reused(recipe, mixture, _file(folder, domain), own) for domain, own in facts.items()}
    missing = [own for own in texts if found[own.expert] is None]
    if missing:
        for domain, sums in _gather(recipe, mixture, missing, threads, progress).items():
            found[domain] = Sums(sums.arrays, facts[domain])
            save_sums(_file(folder, domain), found[domain] or sums)
    return {domain: sums for domain, sums in found.items() if sums is not None}, tuple(own.expert for own in missing)


def _file(folder: Path, domain: str) -> Path:
    return folder / f"{domain}.safetensors"


def _facts(recipe: ReductionRecipe, mixture: Mixture, texts: Texts) -> dict[str, Any]:
    reduction = recipe.reduction
    settings = {"tokens": reduction.tokens, "similarity_tokens": reduction.similarity_tokens, "dtype": reduction.dtype}
    return {
        "model": mixture.digest,
        "text": texts.digest,
        "location": texts.location,
        "documents": list(texts.hashes),
        **settings,
    }


def _load(mixture: Mixture, file: Path) -> Sums:
    experts, width = mixture.tensors.routers[mixture.layers[0]].shape
    return load_sums(file, len(mixture.layers), experts, width)


def _reused(recipe: ReductionRecipe, mixture: Mixture, file: Path, facts: Mapping[str, Any]) -> Sums | None:
    """Sums in a file, if they are of this very model, text and setting and have what is needed."""
    if not file.is_file():
        return None
    sums = _load(mixture, file)
    return sums if sums.facts == facts and (sums.similar or recipe.reduction.merge is None) else None


def _stored(recipe: ReductionRecipe, mixture: Mixture, folder: Path) -> dict[str, Sums]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{recipe.source}: reduce.statistics: {folder} holds none: add 'calibration', so that they are gathered")
    found = {file.stem: _load(mixture, file) for file in files}
    other = next((name for name, sums in found.items() if sums.facts.get("model") != mixture.digest), None)
    if other:
        raise InputError(f"{_file(folder, other)} holds statistics of another model than {recipe.model}: gather them again")
    lacking = next((name for name, sums in found.items() if recipe.reduction.merge is not None and not sums.similar), None)
    if lacking:
        raise InputError(f"{_file(folder, lacking)} lacks what groups are made of: add 'calibration', so that it is gathered")
    return found


def _gather(
    recipe: ReductionRecipe, mixture: Mixture, texts: Sequence[Texts], threads: int, progress: Progress
) -> dict[str, Sums]:
    reduction = recipe.reduction
    with single_threaded_blas(), scratch_folder("moerge-reduce-") as folder:
        model = LayerwiseModel(mixture.model.written, mixture.tensors, name=NAME, dtype=reduction.dtype, device=reduction.device)
        every = [
            text
            for own in texts
            for text in tokenized(mixture.model.folder, own.expert, own.documents, reduction.tokens, model.vocabulary)
        ]
        totals = {own.expert: sum(len(text.ids) for text in every if text.domain == own.expert) for own in texts}
        sampled = {n: spread(len(t.ids), totals[t.domain], reduction.similarity_tokens) for n, t in enumerate(every)}
        advance = progress.phase("running the mixture", model.layers * sum(totals.values()), "tokens")
        with single_threaded_blas(), TextPass(model, every, folder, threads) as passing:  # torch is imported by now
            return gather_sums(passing, sampled if reduction.merge is not None else {}, advance)


def _plan(recipe: ReductionRecipe, mixture: Mixture, choice: Choice, texts: tuple[Texts, ...]) -> tuple[Plan, Assembler]:
    base, other = base_matrices(recipe, mixture)
    assembler = Assembler(mixture, choice, recipe.reduction, base)
    standing = Recipe(
        experts={NAME: Expert(model=recipe.model)},
        method=Average(),
        calibration=recipe.calibration,
        folder=recipe.folder,
        source=recipe.source,
        written=recipe.written,
    )
    checkpoint = mixture.model.checkpoint
    models = (checkpoint, *([other.checkpoint] if other else []))
    plan = Plan(
        recipe=standing,
        models=models,
        outputs=tuple(assembler.outputs()),
        config=assembler.config(str(result_dtype(standing, checkpoint).torch_name)),
        files=portable_tokenizer(companion_files(mixture.model.folder)),
        experts=names_of(mixture, choice),
        calibration=texts,
        warnings=(*checkpoint.warnings, *left_out(mixture), *_warnings(recipe, choice)),
        notes=_notes(recipe, choice),
        family=mixture.model.family,
        account=_account(recipe, mixture, choice),
    )
    return plan, assembler


def _warnings(recipe: ReductionRecipe, choice: Choice) -> list[str]:
    found = []
    if choice.never_routed:
        found.append(f"no token of the text goes to {len(choice.never_routed)} experts: {_places(choice.never_routed)}")
    if recipe.reduction.inverse:
        found.append("'inverse' keeps the worst experts")
    return found


def _notes(recipe: ReductionRecipe, choice: Choice) -> tuple[str, ...]:
    notes = []
    if choice.protected:
        notes.append(f"protected for their massive activations: {_places(choice.protected)}")
    if recipe.reduction.experts % _EVEN and recipe.reduction.experts > _EVEN:
        notes.append(f"engines that spread experts over processes may want a multiple of {_EVEN} of them")
    return tuple(notes)


def _places(pairs: Sequence[tuple[int, int]]) -> str:
    more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    return ", ".join(f"{expert} of layer {layer}" for layer, expert in pairs[:_SHOWN]) + more


def _account(recipe: ReductionRecipe, mixture: Mixture, choice: Choice) -> Account:
    reduction = recipe.reduction
    count = len(mixture.labels)
    score = reduction.score if isinstance(reduction.score, str) else ", ".join(map(str, reduction.score))
    folded = "dropped" if reduction.merge is None else f"folded ({_named(reduction.merge)}; groups {reduction.groups})"
    router = "the rows of what stays" if reduction.router == "slice" else "fitted to the choice of the old one"
    facts = {
        "experts_before": count,
        "experts": reduction.experts,
        "layers": [layer.to_json() for layer in choice.layers],
        "never_routed": [list(pair) for pair in choice.never_routed],
        "protected": [list(pair) for pair in choice.protected],
    }
    text = (
        f"Of {count} experts {reduction.experts} are left in each layer, by the score {score} ({reduction.domains}). The others "
        f"are {folded}. Router: {router}. Experts that were not folded are those of the source, byte for byte."
    )
    return Account(f"A mixture of experts reduced from {count} to {reduction.experts} experts", (text,), "reduction", facts)


def _named(fold: Fold) -> str:
    return fold.method.name if isinstance(fold, MethodFold) else fold.kind
