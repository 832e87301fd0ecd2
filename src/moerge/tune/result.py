"""OUT: the tuned checkpoint in the layout its family has on disk, with the facts of how it came about."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moerge.architecture import family_of
from moerge.architecture.config import portable
from moerge.architecture.sequence import MODEL_TYPE
from moerge.checkpoint.digest import combined_digest, running_digest
from moerge.checkpoint.manifest import to_json
from moerge.checkpoint.reader import Checkpoint, read_json
from moerge.checkpoint.tokenizer import companion_files
from moerge.checkpoint.tokenizer.portable import portable_tokenizer
from moerge.inference.loading import without_progress_bars
from moerge.tune.outlook import Outlook
from moerge.tune.work import FACTS, METRICS, Work

_FORMAT = 1
_PIECE = 1 << 24


@dataclass(frozen=True)
class TuneResult:
    """A finished tuning: the folder, tune.json's facts, and the last step's row."""

    folder: Path
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {"checkpoint": str(self.folder), **self.facts}


def weights_digest(checkpoint: Checkpoint) -> str:
    """One digest of a model's safetensors files and its config."""
    digests = {}
    for path in sorted([*checkpoint.folder.glob("*.safetensors"), checkpoint.folder / "config.json"]):
        digest = running_digest()
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        digests[path.name] = digest.hexdigest()
    return combined_digest(digests)


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The element type that most of a checkpoint's values have, as torch calls it."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.is_float:
            sizes[str(tensor.dtype.torch_name)] += tensor.size
    return sizes.most_common(1)[0][0]


def write_result(model: Any, work: Work, source: Checkpoint, dtype: str) -> None:
    """The checkpoint without its facts, into the work folder."""
    with without_progress_bars():
        model.to(getattr(torch, dtype)).save_pretrained(work.result)
    if model.config.model_type != MODEL_TYPE:
        config = read_json(work.result / "config.json")
        (work.result / "config.json").write_bytes(to_json(portable(config, family=family_of(config), dtype=dtype)))
    for name, content in portable_tokenizer(companion_files(source.folder)).items():
        (work.result / name).write_bytes(content)


def facts_of(outlook: Outlook, inputs: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """What tune.json holds."""
    packages = ("moerge", "torch", "transformers", "accelerate", "numpy")
    return {
        "format": _FORMAT,
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "settings": outlook.settings.model_dump(mode="json"),
        "models": inputs,
        **outlook.to_json(),
        **trained,
    }


def files_of(facts: Mapping[str, Any], work: Work) -> dict[str, bytes]:
    """The files beside the weights that say how they came about."""
    return {FACTS: to_json(facts), METRICS: work.metrics.read_bytes(), "README.md": _card(facts).encode()}


def _card(facts: Mapping[str, Any]) -> str:
    settings, last = facts["settings"], facts["last"]
    rows = [
        f"| {name} | {100 * found['expected_share']:.2f}% | {100 * found['drawn_share']:.2f}% | {found['tokens']:,} |"
        for name, found in facts["sources"].items()
    ]
    losses = json.dumps(settings["losses"])
    return "\n".join(
        [
            "---\nlibrary_name: transformers\ntags:\n- moerge\n---",
            "# A tuned model",
            f"\n`{settings['model']}`, tuned by moerge {facts['versions']['moerge']} for {facts['steps']:,} steps of "
            f"{settings['batch']} sequences of {settings['length']} tokens, {facts['tokens']:,} tokens in all. Trained: "
            f"{', '.join(settings['train'])}, {facts['trained_parameters']:,} of {facts['parameters']['all']:,} parameters. "
            f"AdamW, learning rate {settings['learning_rate']:g} ({settings['schedule']}), "
            f"weight decay {settings['weight_decay']:g}. Losses: `{losses}`. "
            f"Cross-entropy of the last step: {last['cross_entropy']:.4f} nats a token.",
            "\n## Text\n\n| source | weight | drawn | tokens |\n|---|---|---|---|",
            *rows,
            f"\n`{FACTS}` has every setting and digest, `{METRICS}` every step.\n",
        ]
    )
