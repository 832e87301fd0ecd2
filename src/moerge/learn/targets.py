"""What each expert makes of its own texts: computed once, expert by expert, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moerge.files import whole_file
from moerge.learn.losses import Target
from moerge.learn.model import MergingModel


@dataclass(frozen=True)
class Sample:
    """A text as tokens [1, T], and the number of the expert it belongs to (`BASE` for the base)."""

    ids_1T: torch.Tensor
    task: int
    index: int


@dataclass(frozen=True)
class TargetFiles:
    """A folder of safetensors files, one a text. `largest` is how many logits of each token are kept, None for all."""

    folder: Path
    layers: tuple[int, ...]
    largest: int | None

    def save(self, name: str, logits_TV: torch.Tensor, hidden: Sequence[torch.Tensor]) -> None:
        """Keep a text's targets, whole or not at all; `hidden` [T, H] belongs to `layers`."""
        kept = {f"hidden.{layer}": state_TH.contiguous().cpu() for layer, state_TH in zip(self.layers, hidden, strict=True)}
        if self.largest is None or self.largest >= logits_TV.shape[-1]:
            kept["logits"] = logits_TV.contiguous().cpu()
        else:
            top = logits_TV.topk(self.largest, dim=-1)
            kept |= {"logits": top.values.contiguous().cpu(), "ids": top.indices.int().contiguous().cpu()}
        with whole_file(self.file(name)) as beside:
            save_file(kept, beside)

    def load(self, name: str) -> Target:
        """What was kept for a text."""
        found = load_file(self.file(name))
        return Target(found["logits"], found.get("ids"), tuple(found[f"hidden.{layer}"] for layer in self.layers))

    def file(self, name: str) -> Path:
        """Where a text's targets lie."""
        return self.folder / f"{name}.safetensors"


@dataclass(frozen=True)
class Targets(TargetFiles):
    """The targets of every text that learns."""

    def compute(self, model: MergingModel, samples: Sequence[Sample], advance: Callable[[], None]) -> None:
        """Run every expert over its texts."""
        for task in sorted({sample.task for sample in samples}):
            model.use(task)
            for sample in (sample for sample in samples if sample.task == task):
                with torch.no_grad():
                    output = model.forward(sample.ids_1T, task)
                states = [output.hidden_states[layer][0] for layer in self.layers]
                self.save(_name(sample), output.logits[0], states)
                advance()
        model.use(None)

    def of(self, sample: Sample) -> Target:
        """The expert's logits and hidden states for a text."""
        return self.load(_name(sample))


def _name(sample: Sample) -> str:
    return f"{sample.task + 1}-{sample.index}"


def target_bytes(tokens: int, vocabulary: int, hidden: int, layers: int, largest: int | None, itemsize: int) -> int:
    """Bytes on disk for the targets of `tokens` tokens."""
    logits = vocabulary * itemsize if largest is None or largest >= vocabulary else largest * (itemsize + 4)
    return tokens * (logits + layers * hidden * itemsize)
