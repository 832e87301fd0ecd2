"""`moerge learn` from the recipe to the coefficients: read `learn_coefficients` first."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moerge.distillation import target_bytes
from moerge.errors import InputError, MachineError
from moerge.files import scratch_folder
from moerge.formatting import as_size
from moerge.learning.chunks import allocate, importances
from moerge.learning.directions import Directions
from moerge.learning.expert_targets import ExpertTargets, Sample
from moerge.learning.merged_parameters import merged_parameters
from moerge.learning.model import BASE, MergedParameter, MergingModel, known_config
from moerge.learning.training import History, Trainer, evaluations, interleave
from moerge.methods.method import TaskVectorMethod
from moerge.planning.plan import Plan
from moerge.progress import SILENT, Advance, Progress
from moerge.recipe.coefficients import Coefficients, chunk_count, chunk_size
from moerge.recipe.learning import Learning
from moerge.recipe.schema import Recipe
from moerge.runtime.inputs import model_inputs
from moerge.runtime.loading import load_tokenizer
from moerge.texts import Texts, read_texts
from moerge.tokenizer import VOCABULARY_FILES

OFF = 0.1
"""An expert whose mean coefficient falls below this fraction of the initial one is reported as switched off."""


@dataclass(frozen=True)
class Learned:
    """The outcome: coefficients, what happened in each stage, and what a user should know."""

    coefficients: Coefficients
    stages: tuple[History, ...]
    texts: tuple[Texts, ...]
    warnings: tuple[str, ...]


def learn_coefficients(recipe: Recipe, plan: Plan, settings: Learning, progress: Progress = SILENT) -> Learned:
    """Learn the coefficients of a dense plan's tensors from the recipe's calibration texts.

    `plan` is the recipe's, as if it were a dense merge; what its MoE keeps separate does not learn. Raises InputError where
    the recipe does not fit, MachineError where targets do not fit on the disk.
    """
    tasks = {BASE: "base"} if recipe.includes_base else {}
    tasks |= dict(enumerate(recipe.experts))
    texts = {task: _texts(recipe, name, settings) for task, name in tasks.items()}
    method = recipe.method
    assert isinstance(method, TaskVectorMethod)
    with (
        _torch_threads(settings.threads),
        ThreadPoolExecutor() as pool,
        scratch_folder("moerge-learn-") as folder,
    ):
        slots = merged_parameters(recipe, plan, settings, pool)
        samples = _samples(plan, texts, settings, folder)
        train, heldout = _split(samples, settings)
        job = _Job(recipe, plan, settings, slots, method.scale, folder, progress)
        job.announce(train, heldout)
        stages = [job.stage(_ones(slots), {}, train, heldout)]
        if settings.extra:
            counts = job.more_chunks()
            stages.append(job.stage(counts, job.coef_logits, train, heldout))
        found = job.coefficients(stages)
    return Learned(found, tuple(stages), tuple(texts.values()), tuple(_warnings(found)))


def _texts(recipe: Recipe, name: str, settings: Learning) -> Texts:
    location = recipe.calibration.get(name)
    if location is None:
        raise InputError(f"{recipe.source}: learning needs text for every expert: add '{name}: FILE' to 'calibration'")
    return read_texts(name, location, relative_to=recipe.folder, limit=settings.texts)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tokenizer(plan: Plan, folder: Path) -> Any:
    source, name = plan.recipe.source, plan.vocabulary.get("source", "the models")
    if not set(plan.files) & set(VOCABULARY_FILES):
        raise InputError(
            f"{source}: learning needs a tokenizer, and no model has one: copy a tokenizer.json to the base's folder"
        )
    home = folder / "tokenizer"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(plan.config), encoding="utf-8")
    for file, content in plan.files.items():
        (home / file).write_bytes(content)
    return load_tokenizer(home, name=str(name), advice="fetch or copy it again", where=source)


def _samples(plan: Plan, texts: Mapping[int, Texts], settings: Learning, folder: Path) -> dict[int, list[Sample]]:
    tokenizer, rows = _tokenizer(plan, folder), known_config(plan.config, plan.recipe.source).get_text_config().vocab_size
    found: dict[int, list[Sample]] = {}
    for task, given in texts.items():
        for document in given.documents:
            inputs = model_inputs(tokenizer, document, settings.tokens)
            largest = max(inputs["input_ids"].flatten().tolist(), default=0)
            if largest >= rows:
                raise InputError(
                    f"{plan.recipe.source}: calibration.{given.expert}: the tokenizer makes token {largest} of a text, but the "
                    f"embedding has {rows} rows: give the models their own tokenizer"
                )
            if inputs["input_ids"].shape[1] > 1:
                found.setdefault(task, []).append(Sample(inputs, task, len(found.get(task, ()))))
        if task not in found:
            raise InputError(
                f"{plan.recipe.source}: calibration.{given.expert}: no text in {given.location} has two tokens: name a longer one"
            )
    return found


def _split(samples: Mapping[int, list[Sample]], settings: Learning) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, in turn, and those held out: of a task with a single text none."""
    train: dict[int, list[Sample]] = {}
    heldout: dict[int, list[Sample]] = {}
    for task, found in samples.items():
        shuffled = random.Random(f"{settings.seed} {task}").sample(found, len(found))
        count = min(len(found) - 1, math.ceil(settings.heldout * len(found)))
        train[task], heldout[task] = shuffled[count:], shuffled[:count]
    return interleave(train), [sample for found in heldout.values() for sample in found]


def _ones(slots: Sequence[MergedParameter]) -> dict[str, int]:
    return {slot.key: 1 for slot in slots if slot.key}


@dataclass
class _Job:
    recipe: Recipe
    plan: Plan
    settings: Learning
    slots: Sequence[MergedParameter]
    initial: float
    folder: Path
    progress: Progress
    advance: Advance = lambda count: None
    coef_logits: dict[str, torch.Tensor] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    targets: ExpertTargets | None = None

    def announce(self, train: Sequence[Sample], heldout: Sequence[Sample]) -> None:
        """Say how much is to be done, and what disk it takes."""
        settings, layers = self.settings, _hidden_layers(self.settings, self.plan)
        distinct = {(sample.task, sample.index): sample for sample in (*train, *heldout)}.values()
        updates = math.ceil(len(train) * settings.epochs / settings.accumulation)
        stages = 2 if settings.extra else 1
        looks = len(evaluations(updates, len(heldout), settings.accumulation)) + 1
        steps = stages * (len(train) * settings.epochs + len(heldout) * looks)
        if settings.objective == "entropy":
            self.advance = self.progress.phase("learning", steps, "texts")
            return
        itemsize = getattr(torch, settings.dtype).itemsize
        largest = None if settings.targets == "full" else settings.targets
        tokens = sum(sample.tokens for sample in distinct)
        text = known_config(self.plan.config, self.recipe.source).get_text_config()
        nbytes = target_bytes(tokens, text.vocab_size, text.hidden_size, len(layers), largest, itemsize)
        free = shutil.disk_usage(self.folder).free
        self.progress.info(f"the experts' targets for {tokens:,} tokens take {nbytes / 1e9:.2f} GB in {self.folder.parent}")
        if nbytes > free:
            raise MachineError(
                f"no space for the experts' targets in {self.folder.parent}: {as_size(nbytes)} are needed, "
                f"{as_size(free)} free; set learn.targets to a number such as 64, or TMPDIR elsewhere",
                code="no-space",
            )
        self.advance = self.progress.phase("learning", steps + len(distinct), "texts")

    def stage(
        self, counts: Mapping[str, int], start: Mapping[str, torch.Tensor], train: Sequence[Sample], heldout: Sequence[Sample]
    ) -> History:
        """Learn with this many chunks, from where an earlier stage ended."""
        settings, experts = self.settings, len(self.recipe.experts)
        wide = torch.float64 if settings.dtype == "float64" else torch.float32
        first = math.log(self.initial / (1 - self.initial))
        self.coef_logits = {
            key: start[key].detach().repeat(1, count) if key in start else torch.full((experts, count), first, dtype=wide)
            for key, count in counts.items()
        }
        self.coef_logits = {key: a_EC.to(settings.device).requires_grad_() for key, a_EC in self.coef_logits.items()}
        source, element, device = self.recipe.source, settings.dtype, settings.device
        model = MergingModel(
            self.plan.config, self.slots, self.coef_logits, self.initial, dtype=element, device=device, source=source
        )
        targets = self._targets(model, (*train, *heldout))
        weights = {task: settings.task_weights[name] for task, name in self._tasks() if name in settings.task_weights}
        trainer = Trainer(model, self.coef_logits, settings, self.initial, targets, weights, source, partial(self.advance, 1))
        return trainer.fit(train, heldout)

    def _tasks(self) -> Iterator[tuple[int, str]]:
        yield BASE, "base"
        yield from enumerate(self.recipe.experts)

    def _targets(self, model: MergingModel, samples: Sequence[Sample]) -> ExpertTargets:
        if self.targets is None:
            largest = None if self.settings.targets == "full" else self.settings.targets
            self.targets = ExpertTargets(self.folder, _hidden_layers(self.settings, self.plan), largest)
            if self.settings.objective == "alignment":
                distinct = {(sample.task, sample.index): sample for sample in samples}
                self.targets.compute(model, list(distinct.values()), partial(self.advance, 1))
        return self.targets

    def more_chunks(self) -> dict[str, int]:
        """Chunk counts for the second stage, by importance."""
        groups = _groups(self.slots)
        means = {key: torch.sigmoid(a_EC).mean(dim=1).tolist() for key, a_EC in self.coef_logits.items()}
        norms = {key: group.norms() for key, group in groups.items()}
        self.importance = importances(means, norms, {key: group.size for key, group in groups.items()})
        extra = round(self.settings.extra * len(groups))
        counts = allocate(self.importance, {key: group.smallest for key, group in groups.items()}, extra)
        return {key: groups[key].cuttable(count) for key, count in counts.items()}

    def coefficients(self, stages: Sequence[History]) -> Coefficients:
        """The artefact."""
        rows = {
            slot.name: tuple(tuple(row) for row in torch.sigmoid(self.coef_logits[slot.key].detach()).tolist())
            for slot in self.slots
            if slot.key
        }
        method = self.recipe.method
        directions = {"method": method.name, **method.model_dump(mode="json", exclude={"scale"})}
        settings = {**self.settings.model_dump(mode="json"), "threads": torch.get_num_threads()}
        if math.isinf(self.settings.gamma):
            settings["gamma"] = ".inf"  # JSON has no such number
        learning: dict[str, Any] = {"settings": settings}
        if self.importance:
            learning["importance"] = self.importance
        learning["stages"] = [{"best_update": h.best, "stopped_early": h.stopped_early, "updates": h.rows} for h in stages]
        sizes = {slot.name: slot.base.tensor.size for slot in self.slots}
        chunks = {name: chunk_size(sizes[name], len(row[0])) for name, row in rows.items() if len(row[0]) > 1}
        return Coefficients(tuple(self.recipe.experts), rows, chunks, self.initial, directions, learning)


@dataclass(frozen=True)
class _Group:
    """Tensors that share coefficients."""

    members: tuple[Directions, ...]

    @property
    def size(self) -> int:
        return sum(directions.size for directions in self.members)

    @property
    def smallest(self) -> int:
        return min(directions.size for directions in self.members)

    def norms(self) -> list[float]:
        """The norm of each expert's task vector over all members."""
        by_expert = zip(*(directions.norms() for directions in self.members), strict=True)
        return [math.hypot(*norms) for norms in by_expert]

    def cuttable(self, count: int) -> int:
        """The largest number up to `count` of chunks that torch.chunk really cuts all members into."""
        return next(c for c in range(count, 0, -1) if all(chunk_count(d.size, c) == c for d in self.members))


def _groups(slots: Sequence[MergedParameter]) -> dict[str, _Group]:
    """Learning tensors by the key of their coefficients."""
    members: dict[str, list[Directions]] = {}
    for slot in slots:
        if slot.key and slot.directions is not None:
            members.setdefault(slot.key, []).append(slot.directions)
    return {key: _Group(tuple(directions)) for key, directions in members.items()}


def _hidden_layers(settings: Learning, plan: Plan) -> tuple[int, ...]:
    layers = int(known_config(plan.config, plan.recipe.source).get_text_config().num_hidden_layers)
    if settings.hidden_weight == 0 or settings.objective == "entropy":
        return ()
    if settings.hidden_layers == "middle":
        return (max(1, layers // 2),)
    beyond = [layer for layer in settings.hidden_layers if layer > layers]
    if beyond:
        raise InputError(f"{plan.recipe.source}: learn.hidden_layers: there is no layer {beyond[0]}, the model has {layers}")
    return settings.hidden_layers


def _warnings(found: Coefficients) -> Iterator[str]:
    for expert, mean in found.means().items():
        if mean < OFF * found.fixed:
            yield (
                f"learning switched {expert} off: its mean coefficient is {mean:.3g}, from {found.fixed:.3g}; "
                "look at its calibration text, or give it a weight in learn.task_weights"
            )
