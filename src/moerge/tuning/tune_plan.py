"""The plan of a tuning: the data's shares and how long it lasts, what is trained, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.texts.documents import read_documents
from moerge.tuning.adapters import AdapterTargets, add_adapters, targets_of, with_adapters
from moerge.tuning.mixture import Mixture
from moerge.tuning.models import expert_names
from moerge.tuning.parts import Parts, Schedule, check_losses, hidden_layers, make_schedule, parts_of
from moerge.tuning.run_directory import RunDirectory
from moerge.tuning.settings import PARTS, TuneConfig, Tuning
from moerge.tuning.teachers import (
    TeacherTargets,
    check_teachers,
    check_vocabularies,
    plan_targets,
    positions,
    target_bytes_needed,
)
from moerge.tuning.tokens import Tokens, documents_of, tokenise

_STATE_BYTES = 12
"""Bytes of a trained parameter in a training checkpoint: the weight and AdamW's two moments, float32 each."""


@dataclass(frozen=True)
class TunePlan:
    """Everything that is known before a model runs.

    `trained_on` says how many documents of each held-out text are trained on, by source.
    """

    settings: Tuning
    mixture: Mixture
    tokens: tuple[Tokens, ...]
    parameters: Mapping[str, int]
    trained: int
    heldout: Mapping[str, Tokens]
    teacher_targets: TeacherTargets | None
    target_bytes_needed: int
    processes: int
    schedule: Schedule
    targets: AdapterTargets | None
    trained_on: Mapping[str, Mapping[str, int]]

    @property
    def checkpoint_bytes(self) -> int:
        """A training checkpoint: float32 weights, and moments of what is trained; where adapters are trained, only what is."""
        if self.targets:
            return _STATE_BYTES * self.trained
        return 4 * self.parameters["all"] + (_STATE_BYTES - 4) * self.trained

    @property
    def disk_bytes(self) -> int:
        """Return the most bytes on the disk: three training checkpoints while one is written, or two and the result."""
        alone = self.settings.adapters is not None and self.settings.adapters.save == "adapter"
        whole = 0 if alone else 4 * self.parameters["all"]
        unsharded = whole if self.settings.sharding != "none" else 0
        return max(3 * self.checkpoint_bytes, 2 * self.checkpoint_bytes + whole + unsharded)

    def sources(self) -> dict[str, dict[str, Any]]:
        """By source: its share of tokens, expected and as drawn, and how much of it there is.

        `read` is how often the run reads it, None where it has more text than the run needs.
        """
        found = {}
        for name, share, count, tokens in zip(
            self.mixture.names, self.mixture.shares, self.mixture.counts, self.tokens, strict=True
        ):
            found[name] = {
                "expected_share": share,
                "drawn_share": count / self.mixture.sequences,
                "sequences": count,
                "tokens": count * self.settings.length,
                "documents": tokens.documents,
                "available_tokens": tokens.tokens if tokens.exhausted else None,
                "read": count / tokens.sequences if tokens.exhausted else None,
                "digest": tokens.digest,
                **({} if tokens.learned is None else {"answers": tokens.learned, "left_out_answers": tokens.left_out}),
            }
        return found

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json` and tune.json."""
        settings = self.settings
        return {
            "steps": settings.total_steps,
            "tokens": settings.sequences * settings.length,
            "batch": settings.batch,
            "length": settings.length,
            "processes": self.processes,
            "parameters": dict(self.parameters),
            "trained_parameters": self.trained,
            "sources": self.sources(),
            "heldout": {
                name: {"tokens": t.sequences * t.length, "digest": t.digest, "trained_on": dict(self.trained_on[name])}
                for name, t in self.heldout.items()
            },
            "target_bytes": self.target_bytes_needed,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "warnings": list(self.warnings),
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return warnings for the user."""
        found = []
        for name, facts in self.sources().items():
            if facts["sequences"] == 0:
                found.append(f"data.{name} is never drawn in {self.mixture.sequences} sequences: its weight is too small")
            elif facts["read"] is not None and facts["read"] > 4:
                found.append(f"data.{name} is read {facts['read']:.1f} times: add text, or lower its weight")
            if facts.get("left_out_answers"):
                found.append(
                    f"data.{name}: {facts['left_out_answers']:,} answers do not end within one sequence of length "
                    f"{self.settings.length} and are left out: raise 'length'"
                )
        for name, tokens in self.heldout.items():
            for source, count in self.trained_on[name].items():
                found.append(
                    f"heldout.{name}: {count} of its {tokens.documents} documents are trained on, in data.{source}, so figures "
                    "on them are no evidence: name other text"
                )
        return tuple(found)


def make_plan(
    tune_config: TuneConfig,
    work: RunDirectory,
    models: Mapping[str, Checkpoint],
    tokenizer: Any,
    model: Any,
    processes: int,
    note: Callable[[str], None],
) -> TunePlan:
    """Tokenise what the run needs into the work folder, and check settings against the model, which needs no values.

    `models` are where `locate_models` found them. The model gets the adapters that the settings ask for.
    """
    settings, parts = tune_config.settings, parts_of(model, expert_names(models[""]))
    schedule, layers = make_schedule(tune_config, parts), hidden_layers(tune_config, model)
    _check(tune_config, models, tokenizer, model, parts, hidden=bool(layers))
    weights = {name: source.weight for name, source in settings.data.items()}
    mixture = Mixture(weights, settings.sequences, settings.seed, settings.shuffle)
    tokens = tuple(_tokenise(tune_config, work.tokens, name, count, tokenizer) for name, count in _needs(mixture))
    teacher_targets = plan_targets(tune_config, work, mixture, tokens, layers) if settings.distils else None
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    targets = targets_of(tune_config, model, parts, schedule) if settings.adapters else None
    if settings.adapters and targets:
        add_adapters(model, settings.adapters, targets, settings.seed)
        schedule = with_adapters(schedule, model)
    heldout = {name: _heldout(tune_config, work.tokens / "heldout", name, tokenizer) for name in settings.heldout}
    plan = TunePlan(
        settings=settings,
        mixture=mixture,
        tokens=tokens,
        parameters={part: sum(sizes[name] for name in parts[part]) for part in PARTS},
        trained=schedule.trained({name: tuple(parameter.shape) for name, parameter in model.named_parameters()}),
        heldout=heldout,
        teacher_targets=teacher_targets,
        target_bytes_needed=target_bytes_needed(tune_config, teacher_targets, model.config) if teacher_targets else 0,
        processes=processes,
        schedule=schedule,
        targets=targets,
        trained_on={name: _shared(text, mixture.names, tokens) for name, text in heldout.items()},
    )
    for warning in plan.warnings:
        note(warning)
    return plan


def _check(
    tune_config: TuneConfig, models: Mapping[str, Checkpoint], tokenizer: Any, model: Any, parts: Parts, *, hidden: bool
) -> None:
    """Raise InputError if the losses, the length, the tokenizer or a teacher do not fit the model."""
    check_losses(tune_config, model, parts)
    _check_length(tune_config, model.config)
    rows = int(model.config.get_text_config().vocab_size)
    check_vocabularies(next(iter(tune_config.settings.data)), _rows_needed(tokenizer), rows)
    if tune_config.settings.distils:
        check_teachers(tune_config, models, model.config, tokenizer.get_vocab(), hidden=hidden)


def _shared(heldout: Tokens, names: Sequence[str], sources: Sequence[Tokens]) -> dict[str, int]:
    """Count the documents of a text that each source has too. Parts of one, or one cut in another way, are not found."""
    counts = (int(np.isin(heldout.hashes_N, tokens.hashes_N).sum()) for tokens in sources)
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def _check_length(tune_config: TuneConfig, config: Any) -> None:
    most, length = positions(config), tune_config.settings.length
    if most is not None and most < length:
        raise tune_config.error(("length",), f" is {length}, but the model has positions for {most}: lower it")


def _rows_needed(tokenizer: Any) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


def _needs(mixture: Mixture) -> Sequence[tuple[str, int]]:
    """Sources and how many sequences of each are needed; one of a source that is never drawn shows that it can be read."""
    return [(name, max(1, count)) for name, count in zip(mixture.names, mixture.counts, strict=True)]


def _tokenise(tune_config: TuneConfig, folder: Path, name: str, sequences: int, tokenizer: Any) -> Tokens:
    settings, file = tune_config.settings, folder / f"{name}.bin"
    try:
        documents = documents_of(settings.data[name], tune_config.folder)
        return tokenise(documents, tokenizer, length=settings.length, sequences=sequences, file=file)
    except InputError as error:
        raise tune_config.error(("data", name), f": {error}", code=error.code) from None


def _heldout(tune_config: TuneConfig, folder: Path, name: str, tokenizer: Any) -> Tokens:
    settings, file = tune_config.settings, folder / f"{name}.bin"
    try:
        documents = read_documents(settings.heldout[name], relative_to=tune_config.folder)
        return tokenise(documents, tokenizer, length=settings.length, sequences=settings.heldout_sequences, file=file)
    except InputError as error:
        raise tune_config.error(("heldout", name), f": {error}", code=error.code) from None
