"""What the teachers make of the text: each runs once over the sequences of its sources, and its largest logits are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moerge.errors import InputError, MachineError
from moerge.inference.loading import load
from moerge.learn.targets import TargetFiles, target_bytes
from moerge.tune.mixture import Mixture
from moerge.tune.settings import Request
from moerge.tune.tokens import Tokens
from moerge.tune.work import Work


@dataclass(frozen=True)
class Lessons:
    """The targets of a run: which sequences of which source need some, and where they lie."""

    files: TargetFiles
    needed: Mapping[str, tuple[int, ...]]

    @property
    def sequences(self) -> int:
        """How many sequences the teachers run over."""
        return sum(map(len, self.needed.values()))

    def of(self, source: str, number: int) -> dict[str, torch.Tensor]:
        """A sequence's targets as a batch has them: logits [T, M], ids [T, M], hidden.LAYER [T, H]."""
        found = self.files.load(f"{source}/{number}")
        ids = {} if found.ids is None else {"target_ids": found.ids}
        hidden = {f"hidden.{layer}": state for layer, state in zip(self.files.layers, found.hidden, strict=True)}
        return {"target_logits": found.logits, **ids, **hidden}


def plan_lessons(request: Request, work: Work, mixture: Mixture, tokens: Sequence[Tokens], layers: tuple[int, ...]) -> Lessons:
    """Which sequences need targets: those that are drawn, each once however often it is drawn."""
    used: dict[str, set[int]] = {name: set() for name in mixture.names}
    available = [found.sequences for found in tokens]
    for index in range(mixture.sequences):
        source, number = mixture.place(index, available)
        used[mixture.names[source]].add(number)
    files = TargetFiles(work.targets, layers, request.settings.losses.distillation.top)
    return Lessons(files, {name: tuple(sorted(numbers)) for name, numbers in used.items()})


def lesson_bytes(request: Request, lessons: Lessons, config: Any) -> int:
    """What the targets take on the disk."""
    settings, text = request.settings, config.get_text_config()
    itemsize = 4 if settings.dtype == "float32" else 2
    width, layers = int(text.hidden_size), len(lessons.files.layers)
    tokens = lessons.sequences * settings.length
    return target_bytes(tokens, int(text.vocab_size), width, layers, settings.losses.distillation.top, itemsize)


def check_space(nbytes: int, folder: Path, what: str, remedy: str) -> None:
    """MachineError where the disk is too full."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if nbytes > free:
        raise MachineError(
            f"no space for {what} in {folder}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free; {remedy}"
        )


@torch.no_grad()
def run_teachers(
    request: Request,
    lessons: Lessons,
    teachers: Mapping[str, Path],
    tokens: Mapping[str, Tokens],
    student: Any,
    vocabulary: Mapping[str, int],
    device: str,
    advance: Callable[[int], None],
) -> None:
    """Run every teacher over its sources; what an interrupted run has left is not made again. `advance` is told tokens.

    `teachers` are folders by source, `student` the trained model's config. Raises InputError for a teacher with another
    vocabulary or, where hidden states are compared, another width.
    """
    settings = request.settings
    rows = settings.batch // settings.accumulation
    for folder in dict.fromkeys(teachers.values()):
        names = [name for name in lessons.needed if teachers[name] == folder]
        left = {name: [n for n in lessons.needed[name] if not lessons.files.file(f"{name}/{n}").exists()] for name in names}
        advance(settings.length * sum(len(lessons.needed[name]) - len(left[name]) for name in names))
        if not any(left.values()):
            continue
        teacher = load(folder, dtype=settings.dtype, device=device)
        _check_teacher(request, names[0], teacher, student, vocabulary, hidden=bool(lessons.files.layers))
        for name in names:
            (lessons.files.folder / name).mkdir(exist_ok=True)
            for start in range(0, len(left[name]), rows):
                numbers = left[name][start : start + rows]
                _run(teacher.model, lessons.files, tokens[name], name, numbers, int(student.get_text_config().vocab_size))
                advance(settings.length * len(numbers))


def _run(model: Any, files: TargetFiles, tokens: Tokens, name: str, numbers: Sequence[int], vocabulary: int) -> None:
    ids_BT = torch.from_numpy(np.stack([tokens.sequence(number) for number in numbers])).to(model.device)
    hidden = {"output_hidden_states": True} if files.layers else {}
    output = model(input_ids=ids_BT, use_cache=False, **hidden)
    for row, number in enumerate(numbers):
        states = [output.hidden_states[layer][row] for layer in files.layers]
        files.save(f"{name}/{number}", output.logits[row, :, :vocabulary], states)


def _check_teacher(
    request: Request, source: str, teacher: Any, student: Any, vocabulary: Mapping[str, int], *, hidden: bool
) -> None:
    path = ("data", source, "teacher")
    if teacher.tokenizer.get_vocab() != vocabulary:
        raise request.error(path, f": {teacher.name} has another vocabulary than the model, so its logits mean other tokens")
    mine, theirs = student.get_text_config(), teacher.model.config.get_text_config()
    if hidden and (mine.hidden_size, mine.num_hidden_layers) != (theirs.hidden_size, theirs.num_hidden_layers):
        raise request.error(path, f": {teacher.name} has another width or depth: compare logits only (distillation.hidden: 0)")


def check_vocabularies(source: str, size: int, vocabulary: int) -> None:
    """InputError where a token's id has no row in the model."""
    if size > vocabulary:
        raise InputError(f"data.{source}: the tokenizer gives id {size - 1}, but the model has {vocabulary} rows")
