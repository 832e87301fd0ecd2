"""AdapterTargets of the teachers: each runs once over the sequences of its sources, and its largest logits are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moerge.architecture.sequence import BY_SEQUENCE
from moerge.checkpoint.reader import Checkpoint
from moerge.distillation import TargetFiles, target_bytes
from moerge.errors import InputError, MachineError
from moerge.formatting import as_size
from moerge.runtime.loading import load
from moerge.tuning.marks import Marks
from moerge.tuning.mixture import Mixture
from moerge.tuning.models import skeleton_of
from moerge.tuning.run_directory import RunDirectory
from moerge.tuning.settings import TuneConfig
from moerge.tuning.tokens import Tokens

_IMPOSSIBLE = -1e6
"""The logit, at temperature 1, of a token that a teacher has no row for: its probability is exactly 0. It is not -inf, because
0 * -inf is NaN."""


@dataclass(frozen=True)
class TeacherTargets:
    """The targets of a run: which sequences of which source need some, and where they lie."""

    files: TargetFiles
    needed: Mapping[str, tuple[int, ...]]

    @property
    def sequences(self) -> int:
        """Return the number of sequences that the teachers run over."""
        return sum(map(len, self.needed.values()))

    def missing(self, source: str) -> list[int]:
        """Return the source's sequences whose targets are not on the disk yet."""
        (self.files.folder / source).mkdir(exist_ok=True)
        return [number for number in self.needed[source] if not self.files.file(f"{source}/{number}").exists()]

    def of(self, source: str, number: int) -> dict[str, torch.Tensor]:
        """A sequence's targets as a batch has them: logits [T, M], ids [T, M], hidden.LAYER [T, H]."""
        found = self.files.load(f"{source}/{number}")
        ids = {} if found.ids is None else {"target_ids": found.ids}
        hidden = {f"hidden.{layer}": state for layer, state in zip(self.files.layers, found.hidden, strict=True)}
        return {"target_logits": found.logits, **ids, **hidden}


def plan_targets(
    tune_config: TuneConfig, work: RunDirectory, mixture: Mixture, tokens: Sequence[Tokens], layers: tuple[int, ...]
) -> TeacherTargets:
    """Plan the sequences that need targets: those that are drawn, each once however often it is drawn."""
    files = TargetFiles(work.targets, layers, tune_config.settings.losses.distillation.top)
    used = (mixture.used(source, found.sequences) for source, found in enumerate(tokens))
    return TeacherTargets(files, dict(zip(mixture.names, used, strict=True)))


def target_bytes_needed(tune_config: TuneConfig, teacher_targets: TeacherTargets, config: Any) -> int:
    """Return the bytes of the targets on the disk."""
    settings, text = tune_config.settings, config.get_text_config()
    itemsize = 4 if settings.dtype == "float32" else 2
    width, layers = int(text.hidden_size), len(teacher_targets.files.layers)
    tokens = teacher_targets.sequences * settings.length
    return target_bytes(tokens, int(text.vocab_size), width, layers, settings.losses.distillation.top, itemsize)


def check_space(nbytes: int, folder: Path, what: str, remedy: str) -> None:
    """MachineError where the disk is too full."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if nbytes > free:
        raise MachineError(
            f"no space for {what} in {folder}: {as_size(nbytes)} are needed, {as_size(free)} free; {remedy}", code="no-space"
        )


@torch.no_grad()
def run_teachers(
    tune_config: TuneConfig,
    teacher_targets: TeacherTargets,
    teachers: Mapping[str, Path],
    tokens: Mapping[str, Tokens],
    student: Any,
    device: str,
    advance: Callable[[int], None],
) -> None:
    """Run every teacher over its sources, except for targets that an interrupted run has left. `advance` receives tokens.

    `teachers` are folders by source, which `check_teachers` found fit; `student` is the trained model's config.
    """
    settings, vocabulary = tune_config.settings, int(student.get_text_config().vocab_size)
    impossible = _IMPOSSIBLE * max(1, settings.losses.distillation.temperature)
    files, rows = teacher_targets.files, settings.batch // settings.accumulation
    for folder in dict.fromkeys(teachers.values()):
        sources = [source for source in teacher_targets.needed if teachers[source] == folder]
        missing = {source: teacher_targets.missing(source) for source in sources}
        complete = sum(len(teacher_targets.needed[source]) - len(missing[source]) for source in sources)
        advance(settings.length * complete)
        if not any(missing.values()):
            continue
        teacher = load(folder, dtype=settings.dtype, device=device)
        for source, numbers in _batches(missing, rows):
            logits_BTV, states = _run(teacher.model, tokens[source], numbers, files.layers)
            for row, number in enumerate(numbers):
                logits_TV = pad_vocab(logits_BTV[row], vocabulary, impossible)
                files.save(f"{source}/{number}", logits_TV, [state_BTH[row] for state_BTH in states])
            advance(settings.length * len(numbers))


def _batches(missing: Mapping[str, Sequence[int]], rows: int) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield (source, numbers of at most `rows` sequences)."""
    for source, numbers in missing.items():
        for start in range(0, len(numbers), rows):
            yield source, numbers[start : start + rows]


def _run(
    model: Any, tokens: Tokens, numbers: Sequence[int], layers: Sequence[int]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits [B, T, V] and hidden states [B, T, H] after these layers."""
    ids_BT = torch.from_numpy(np.stack([tokens.sequence(number) for number in numbers])).to(model.device)
    options: dict[str, Any] = {"output_hidden_states": True} if layers else {}
    if tokens.learned is not None:
        marks_BT = torch.from_numpy(np.stack([tokens.marks(number) for number in numbers])).to(model.device)
        options |= Marks(marks_BT).options(by_sequence=model.config.model_type in BY_SEQUENCE)
    output = model(input_ids=ids_BT, use_cache=False, **options)
    return output.logits, tuple(output.hidden_states[layer] for layer in layers)


def pad_vocab(logits_TV: torch.Tensor, rows: int, impossible: float) -> torch.Tensor:
    """Logits [T, rows], as the student has: no token has the rows that it lacks; what the teacher lacks is impossible."""
    missing = rows - logits_TV.shape[1]
    return F.pad(logits_TV, (0, missing), value=impossible) if missing > 0 else logits_TV[:, :rows]


def check_teachers(
    tune_config: TuneConfig, models: Mapping[str, Checkpoint], student: Any, vocabulary: Mapping[str, int], *, hidden: bool
) -> None:
    """InputError that names the line of a teacher that cannot teach the model with this config. No weights are read.

    Its vocabulary must be `vocabulary`, and where hidden states are compared its width and depth the model's.
    """
    known: dict[Path, tuple[Any, Any]] = {}
    for source, checkpoint in models.items():
        if not source:
            continue
        path, folder = ("data", source, "teacher"), checkpoint.folder
        try:
            teacher, tokenizer = known.get(folder) or skeleton_of(folder)
        except InputError as error:
            raise tune_config.error(path, f": {error}", code=error.code) from None
        known[folder] = teacher, tokenizer
        if problem := _unfit(
            teacher.config, student, tune_config.settings.length, tokenizer.get_vocab(), vocabulary, hidden=hidden
        ):
            raise tune_config.error(path, f": {checkpoint.location} {problem}")


def _unfit(
    teacher: Any, student: Any, length: int, own: Mapping[str, int], vocabulary: Mapping[str, int], *, hidden: bool
) -> str | None:
    """Why a teacher with this config and vocabulary cannot teach, if it cannot."""
    mine, theirs = student.get_text_config(), teacher.get_text_config()
    if own != vocabulary:
        return "has another vocabulary than the model, so its logits mean other tokens"
    if (rows := int(theirs.vocab_size)) <= max(vocabulary.values()):
        return f"has {rows} rows, but its tokenizer gives id {max(vocabulary.values())}: add rows to it, or name another teacher"
    if (most := positions(teacher)) is not None and most < length:
        return f"has positions for {most} tokens, but length is {length}: lower length, or name another teacher"
    if hidden and teacher.model_type in BY_SEQUENCE:
        return "routes sequences to experts with hidden states each: compare logits only (distillation.hidden: 0)"
    if hidden and (mine.hidden_size, mine.num_hidden_layers) != (theirs.hidden_size, theirs.num_hidden_layers):
        return "has another width or depth: compare logits only (distillation.hidden: 0)"
    return None


def positions(config: Any) -> int | None:
    """Return the number of tokens that a model has positions for, None where its config sets no limit."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def check_vocabularies(source: str, size: int, vocabulary: int) -> None:
    """InputError where a token's id has no row in the model."""
    if size > vocabulary:
        raise InputError(f"data.{source}: the tokenizer gives id {size - 1}, but the model has {vocabulary} rows")
