"""The sequences of a run as torch's data set. Shapes: T tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from moerge.tuning.mixture import Mixture
from moerge.tuning.teachers import TeacherTargets
from moerge.tuning.tokens import Tokens


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """The run's sequences in their order: ids [T], the source's number, marks [T] if there are any, the teacher's targets."""

    def __init__(self, mixture: Mixture, tokens: Sequence[Tokens], teacher_targets: TeacherTargets | None) -> None:
        self._mixture, self._tokens, self._teacher_targets = mixture, tokens, teacher_targets
        self._available = [found.sequences for found in tokens]
        self._marked = any(found.learned is not None for found in tokens)

    def __len__(self) -> int:
        return self._mixture.sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, number = self._mixture.place(index, self._available)
        ids_T = torch.from_numpy(self._tokens[source].sequence(number))
        marks = {"marks": torch.from_numpy(self._tokens[source].marks(number))} if self._marked else {}
        targets = {} if self._teacher_targets is None else self._teacher_targets.of(self._mixture.names[source], number)
        return {"input_ids": ids_T, "source": torch.tensor(source), **marks, **targets}


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: all sequences have the same length."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
