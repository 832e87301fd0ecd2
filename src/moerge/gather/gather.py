"""Gathering statistics: each expert of a recipe over its own text, one model at a time, in as many passes as memory asks for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moerge.checkpoint.adapter import AdaptedCheckpoint
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError, suggest
from moerge.files import check_unchanged, is_file
from moerge.formatting import Displayed, as_size
from moerge.gather.passes import free_memory, passes_within
from moerge.gather.running import (
    Layout,
    Sequences,
    adapt,
    check_finite,
    enough_memory,
    fisher_sums,
    gram_sums,
    layout_of,
    tokenized,
)
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.operations import Merge
from moerge.planning.build import build_plan, located
from moerge.planning.merged import MergedCheckpoint
from moerge.planning.plan import Plan
from moerge.progress import SILENT, Progress, reporter
from moerge.recipe import Recipe, load_recipe
from moerge.runtime.loading import Loaded, load
from moerge.statistics.facts import KINDS, Facts, Kind, ModelFacts, Settings, TextFacts
from moerge.statistics.files import Statistics, StatisticsWriter, add_up, check_replaceable, open_statistics, statistics_file
from moerge.tensors.digest import CHUNK, TensorDigest
from moerge.tensors.tensor import Tensor
from moerge.texts import read_texts
from moerge.tokenizer import VOCABULARY_FILES

if TYPE_CHECKING:
    import torch

Wanted = Mapping[Kind, frozenset[str]]


@dataclass(frozen=True)
class Options:
    """The options of gathering statistics.

    `kind` is what to gather, by default what the recipe's methods use; `experts` whom of, by default all that it uses.
    `part` (i, n) takes every n-th document from number i on. At most `texts` documents are read, of each at most `tokens`
    tokens. `dtype` is the element type to run in: by default what the model is stored in, float32 for float16. `passes` over
    the text: by default as few as fit into the memory that is free. `batch_size` sequences run together for Gram matrices.
    """

    kind: Literal["fisher", "regmean", "all"] | None = None
    experts: tuple[str, ...] = ()
    part: tuple[int, int] = (1, 1)
    texts: int = 1000
    tokens: int = 512
    batch_size: int = 1
    labels: Literal["text", "sampled"] = "text"
    seed: int = 0
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    device: str | None = None
    passes: int | None = None
    force: bool = False


@dataclass(frozen=True, repr=False)
class Outcome(Displayed):
    """One expert's file. `gathered` is False where it was there already; `memory_bytes` is the model and one pass's sums."""

    file: Path
    facts: Facts
    nbytes: int
    gathered: bool
    passes: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "file": str(self.file),
            "gathered": self.gathered,
            "sequences": self.facts.sequences,
            "tokens": self.facts.tokens,
            "fisher": len(self.facts.fisher),
            "grams": len(self.facts.grams),
            "without": {kind: list(names) for kind, names in self.facts.without.items()},
            "bytes": self.nbytes,
            "passes": self.passes,
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 3),
        }


def _forecast(expert: str, passes: int, tokens: int, memory: int) -> str:
    """A sentence about what a run will take."""
    runs = "one pass" if passes == 1 else f"{passes} passes"
    return f"{expert}: {runs} over {tokens:,} tokens, {as_size(memory)} for the model and sums"


def stats(
    recipe: str | Path | Mapping[str, Any] | Recipe, out: str | Path, *, progress: Progress | bool = False, **options: Any
) -> list[Outcome]:
    """Gather the statistics that the recipe's methods need, and write `out`/EXPERT.safetensors.

    Args:
        recipe: A recipe's path, the same structure as a dict, or a `Recipe`.
        out: The folder to write.
        progress: A `Progress`, or True for a display on standard error.
        **options: Fields of `Options`, such as kind="fisher" or texts=200.

    Returns:
        One outcome for each expert.

    Raises:
        InputError: The recipe, a model or a text is at fault, or a file holds something else and `force` is not set.
    """
    with reporter(progress) as report:
        return list(gather(load_recipe(recipe), Path(out), Options(**options), report))


def gather(recipe: Recipe, out: Path, options: Options, progress: Progress = SILENT) -> Iterator[Outcome]:
    """Write `out`/EXPERT.safetensors for one expert after another, and yield what became of each.

    A file that holds the same already is kept. `progress` receives what each run will take before it starts.
    Raises InputError for a recipe, model or text at fault, and for a file that holds something else unless `force`.
    """
    plan = build_plan(recipe, bind=False)
    wanted = wanted_of(plan, options)
    for expert in wanted:
        if expert not in recipe.calibration:
            raise InputError(f"{recipe.source}: statistics of {expert} need its text: add '{expert}: FILE' to 'calibration'")
    for expert, names in wanted.items():
        yield _Gathering(plan, expert, names, out, options).run(progress)


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) from "i/n"; InputError otherwise."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--part {text!r} should be I/N with I from 1 to N, such as 1/4")
    return int(match[1]), int(match[2])


def add_folders(recipe: Recipe, out: Path, folders: Sequence[Path], options: Options) -> Iterator[Outcome]:
    """Add up the statistics in several folders, expert by expert; InputError if they do not belong together.

    Of the options only `experts` and `force` have a meaning.
    """
    experts, force = options.experts, options.force
    if options != Options(experts=experts, force=force):
        raise InputError("--add only adds up what was gathered: of the other options it takes --expert and --force alone")
    names = _checked(recipe, experts) or (*(("base",) if recipe.base else ()), *recipe.experts)
    files = {name: [path for folder in folders if is_file(path := statistics_file(folder, name))] for name in names}
    missing = next((name for name in experts if not files[name]), None)
    if missing or not any(files.values()):
        where = ", ".join(map(str, folders))
        raise InputError(f"there are no statistics of {missing or 'any expert of this recipe'} in {where}: check the folders")
    for name, paths in files.items():
        if paths:
            yield _sum_of_one(paths, statistics_file(out, name), force=force)


def _sum_of_one(paths: Sequence[Path], target: Path, *, force: bool) -> Outcome:
    """Write the sum of one expert's files, unless `target` holds it already."""
    begun = time.monotonic()
    if target.is_file() and force:
        check_replaceable(target)
    parts = [open_statistics(path) for path in paths]
    if target.is_file() and not force:
        existing = open_statistics(target).facts
        if sorted(existing.texts, key=repr) != sorted((text for part in parts for text in part.facts.texts), key=repr):
            raise InputError(
                f"{target} holds another sum: choose another folder, or replace it with --force", code="target-exists"
            )
        return Outcome(target, existing, target.stat().st_size, gathered=False)
    facts = add_up(parts, target)
    return Outcome(target, facts, target.stat().st_size, gathered=True, seconds=time.monotonic() - begun)


def wanted_of(plan: Plan, options: Options) -> dict[str, Wanted]:
    """The tensors whose statistics are wanted, by model and kind: those that the methods need, or all of `options.kind`."""
    experts = _checked(plan.recipe, options.experts)
    return _needed_by_methods(plan, experts) if options.kind is None else _all_of_kind(plan, experts, options.kind)


def _all_of_kind(plan: Plan, experts: Sequence[str], method: str) -> dict[str, Wanted]:
    recipe, models = plan.recipe, {model.name: model for model in plan.models}
    kinds = [kind for kind, name in KINDS.items() if method in (name, "all")]
    everyone = dict.fromkeys((*(("base",) if recipe.includes_base else ()), *recipe.experts))
    return {
        name: {kind: frozenset(t.name for t in models[name].tensors.values() if t.dtype.is_float) for kind in kinds}
        for name in experts or everyone
    }


def _needed_by_methods(plan: Plan, experts: Sequence[str]) -> dict[str, Wanted]:
    needed: dict[str, dict[Kind, set[str]]] = {}
    for output in plan.outputs:
        operation = output.operation
        if isinstance(operation, Merge) and isinstance(operation.method, StatisticsMethod):
            for source in operation.experts:
                needed.setdefault(source.model, {}).setdefault(operation.method.kind, set()).add(source.tensor.name)
    unused = next((name for name in experts if name not in needed), None)
    if unused or not needed:
        raise InputError(
            f"{plan.recipe.source} uses no statistics{f' of {unused}' if unused else ''}: "
            "choose 'method: fisher' or 'method: regmean', or say which to gather with --kind"
        )
    return {name: {kind: frozenset(names) for kind, names in needed[name].items()} for name in experts or needed}


def _checked(recipe: Recipe, experts: Sequence[str]) -> tuple[str, ...]:
    known = (*(("base",) if recipe.base else ()), *recipe.experts)
    for name in experts:
        if name not in known:
            raise InputError(f"--expert {name!r} is not a model of {recipe.source}, {suggest(name, known)}", code="unknown-name")
    return tuple(experts)


class _Gathering:
    """One expert's statistics on their way."""

    def __init__(self, plan: Plan, expert: str, wanted: Wanted, out: Path, options: Options) -> None:
        recipe = plan.recipe
        self.plan, self.expert, self.wanted, self.options = plan, expert, wanted, options
        self.path = statistics_file(out, expert)
        index, count = options.part
        texts = read_texts(expert, recipe.calibration[expert], relative_to=recipe.folder, limit=options.texts)
        self.documents = texts.documents[index - 1 :: count]
        if not self.documents:
            raise InputError(f"calibration.{expert}: there are only {len(texts.documents)} texts, so part {index} has none")
        self.text = TextFacts(
            location=texts.location, digest=texts.digest, part=options.part, documents=texts.hashes[index - 1 :: count]
        )

    def run(self, progress: Progress) -> Outcome:
        """Gather, unless the file is there already."""
        model = self._model()
        self.tensors = {tensor.name: tensor for tensor in model.tensors.values()}
        self.settings = Settings(
            tokens=self.options.tokens, dtype=self._dtype(model), labels=self.options.labels, seed=self.options.seed
        )
        if self.path.is_file():
            if not self.options.force:
                return self._kept(model)
            check_replaceable(self.path)
        begun = time.monotonic()
        loaded = self._loaded(model)
        sequences = tokenized(loaded.tokenizer, self.documents, self.options.tokens)
        for ids in sequences.ids:
            loaded.check_ids(ids)
        if not sequences.ids:
            raise InputError(f"calibration.{self.expert}: no text has two tokens: name a file with longer ones")
        sample = next((one for one in sequences.documents if one.beside), sequences.documents[0])
        layout = layout_of(loaded.model, self.tensors, self.wanted, sample.ids, sample.beside)
        held = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
        groups = passes_within(layout.bytes, self.options.passes, free_memory(loaded.model.device))
        memory = held + max((sum(layout.bytes[name] for name in group) for group in groups), default=0)
        progress.info(_forecast(self.expert, len(groups), sequences.tokens, memory))
        facts = self._facts(model, layout, sequences)
        with enough_memory(self.expert), StatisticsWriter(self.path, layout.shapes, facts) as writer, progress:
            advance = progress.phase(self.expert, len(groups) * sequences.tokens, "tokens")
            for names in groups:
                for name, total in self._sums(loaded.model, layout, names, sequences, advance).items():
                    check_finite(self.expert, name, total)
                    for stored, part in layout.split(name, total).items():
                        writer.add(stored, part.cpu().numpy())
            check_unchanged(model.files)
            facts = writer.finish()
        seconds = time.monotonic() - begun
        return Outcome(self.path, facts, self.path.stat().st_size, True, len(groups), memory, seconds)

    def _model(self) -> Checkpoint:
        known = {model.name: model for model in self.plan.models}
        found, recipe = known[self.expert], self.plan.recipe
        if isinstance(found, MergedCheckpoint):
            raise InputError(f"{found.name} is a recipe, and statistics need a model that runs: merge it into a folder first")
        base = known.get("base") if isinstance(found, AdaptedCheckpoint) else None
        if found.complete and (base is None or base.complete):
            return found
        experts = {name: expert for name, expert in recipe.experts.items() if name == self.expert}
        alone = recipe.model_copy(update={"experts": experts, "base": recipe.base if self.expert == "base" or base else None})
        models = located(alone, weights=True, commits=self.plan.commits)
        return next(model.checkpoint for model in models if model.name == self.expert)

    def _loaded(self, model: Checkpoint) -> Loaded:
        """The model in memory; where it is an adapter, its base with the tensors that the adapter changes."""
        folder = model.base.folder if isinstance(model, AdaptedCheckpoint) else model.folder
        device = self.options.device
        loaded = load(folder, dtype=self.settings.dtype, device=device, tokenizer_from=self._tokenizer(model))
        if isinstance(model, AdaptedCheckpoint):
            changed = {name: tensor for name, tensor in self.tensors.items() if tensor is not model.base.tensors.get(name)}
            adapt(loaded.model, changed, model.config.get("vocab_size"))
        return loaded

    def _tokenizer(self, model: Checkpoint) -> Path:
        """The model's own, or where it has none the recipe's."""
        if any((model.folder / name).is_file() for name in VOCABULARY_FILES):
            return model.folder
        source = self.plan.recipe.tokenizer or self.plan.models[0].name
        return next(other.folder for other in self.plan.models if other.name == source)

    def _dtype(self, model: Checkpoint) -> str:
        if self.options.dtype:
            return self.options.dtype
        sizes: dict[str, int] = {}
        for tensor in model.tensors.values():
            if tensor.dtype.torch_name:
                sizes[tensor.dtype.torch_name] = sizes.get(tensor.dtype.torch_name, 0) + tensor.nbytes
        stored = max(sizes, key=lambda name: sizes[name], default="float32")
        return "float32" if stored == "float16" else stored  # squared gradients overflow in float16

    def _kept(self, model: Checkpoint) -> Outcome:
        known = open_statistics(self.path)
        facts = known.facts
        other = "settings" if facts.settings != self.settings else None
        if [(text.digest, text.part) for text in facts.texts] != [(self.text.digest, self.text.part)]:
            other = "text"
        if other is None and facts.model.stamps != model.stamps and facts.model.digests != digests_of(self.tensors):
            other = "weights"
        if other is None and any(not names <= _covered(known, kind) for kind, names in self.wanted.items()):
            other = "tensors"
        if other:
            raise InputError(
                f"{self.path} holds statistics of other {other}: choose another folder, or replace it with --force",
                code="target-exists",
            )
        return Outcome(self.path, facts, self.path.stat().st_size, gathered=False)

    def _facts(self, model: Checkpoint, layout: Layout, sequences: Sequences) -> Facts:
        having: dict[Kind, frozenset[str]] = {"fisher": layout.fisher, "gram": frozenset(layout.grams)}
        return Facts(
            expert=self.expert,
            model=ModelFacts(
                location=model.location,
                folder=str(model.folder.resolve()),
                revision=model.revision,
                stamps=model.stamps,
                digests=digests_of(self.tensors),
            ),
            settings=self.settings,
            texts=(self.text,),
            sequences=len(sequences.ids),
            tokens=sequences.tokens,
            predicted=sequences.predicted,
            fisher=dict.fromkeys(sorted(layout.fisher), (0.0, 0.0)),
            grams=dict(layout.grams),
            without={kind: tuple(sorted(names - having[kind])) for kind, names in self.wanted.items()},
        )

    def _sums(
        self, model: Any, layout: Layout, names: Sequence[str], sequences: Sequences, advance: Callable[[int], None]
    ) -> dict[str, torch.Tensor]:
        if names[0].startswith("fisher:"):
            return fisher_sums(model, layout, names, sequences, self.settings, advance=advance)
        return gram_sums(model, layout, names, sequences, batch_size=self.options.batch_size, advance=advance)


def _covered(statistics: Statistics, kind: Kind) -> frozenset[str]:
    return statistics.facts.names[kind] | set(statistics.facts.without.get(kind, ()))


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor, as a merge takes it."""
    found = {}
    for name, tensor in tensors.items():
        elements, digest = tensor.open(), TensorDigest()
        buffer_N = np.empty(min(CHUNK, tensor.size), tensor.dtype.storage)
        for start in range(0, tensor.size, CHUNK):
            digest.update(elements.read(start, buffer_N[: tensor.size - start]))
        found[name] = digest.digest()
    return found
