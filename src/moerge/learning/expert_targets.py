"""ExpertTargets of each expert on its own texts: computed once, expert by expert, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moerge.distillation import DistillationTarget, TargetFiles
from moerge.learning.model import MergingModel
from moerge.runtime.inputs import Inputs


@dataclass(frozen=True)
class Sample:
    """A document as the model takes it in, and the number of the expert it belongs to (`BASE` for the base)."""

    inputs: Inputs
    task: int
    index: int

    @property
    def tokens(self) -> int:
        """Return the number of its tokens."""
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class ExpertTargets(TargetFiles):
    """The targets of every text that learns."""

    def compute(self, model: MergingModel, samples: Sequence[Sample], advance: Callable[[], None]) -> None:
        """Run every expert over its texts."""
        for task in sorted({sample.task for sample in samples}):
            model.set_mode(task)
            for sample in (sample for sample in samples if sample.task == task):
                with torch.no_grad():
                    output = model.forward(sample.inputs, task)
                states = [output.hidden_states[layer][0] for layer in self.layers]
                self.save(_name(sample), output.logits[0], states)
                advance()
        model.set_mode(None)

    def of(self, sample: Sample) -> DistillationTarget:
        """The expert's logits and hidden states for a text."""
        return self.load(_name(sample))


def _name(sample: Sample) -> str:
    return f"{sample.task + 1}-{sample.index}"
