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
from moerge.architecture.config import portable_config
from moerge.architecture.sequence import BY_SEQUENCE
from moerge.checkpoint.companions import model_companions
from moerge.checkpoint.manifest import to_json
from moerge.checkpoint.reader import Checkpoint, read_json
from moerge.formatting import Displayed
from moerge.quiet import without_progress_bars
from moerge.tensors.digest import combined_digest, running_digest
from moerge.tokenizer import companion_files
from moerge.tokenizer.portable import portable_tokenizer
from moerge.tuning.run_directory import FACTS, METRICS, RunDirectory
from moerge.tuning.settings import Tuning
from moerge.tuning.tune_plan import TunePlan

_FORMAT = 1
_PIECE = 1 << 24


@dataclass(frozen=True, repr=False)
class TuneResult(Displayed):
    """A finished tuning: the folder, and tune.json's facts. `was_complete`: there was nothing to resume, nothing was done."""

    folder: Path
    facts: Mapping[str, Any]
    was_complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {"checkpoint": str(self.folder), "was_complete": self.was_complete, **self.facts}


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


def write_result(model: Any, work: RunDirectory, source: Checkpoint, save_dtype: str | None) -> None:
    """The checkpoint without its facts, into the work folder: in `save_dtype`, else as the source stores each tensor."""
    dtype = save_dtype or stored_dtype(source)
    with without_progress_bars():
        model.config.dtype = getattr(torch, dtype)
        _convert(model, dtype, {} if save_dtype else _dtypes(source)).save_pretrained(work.result)
    if model.config.model_type not in BY_SEQUENCE:
        config = read_json(work.result / "config.json")
        (work.result / "config.json").write_bytes(to_json(portable_config(config, family=family_of(config), dtype=dtype)))
    beside = model_companions(source.folder, source.config, others=()).files
    for name, content in {**beside, **portable_tokenizer(companion_files(source.folder))}.items():
        (work.result / name).parent.mkdir(parents=True, exist_ok=True)
        (work.result / name).write_bytes(content)


def _dtypes(source: Checkpoint) -> dict[str, str]:
    return {name: str(tensor.dtype.torch_name) for name, tensor in source.tensors.items() if tensor.dtype.is_float}


def _convert(model: Any, dtype: str, by_name: Mapping[str, str]) -> Any:
    """The model in these element types, in place; `dtype` where a tensor goes by another name or is several on disk."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(getattr(torch, by_name.get(name, dtype)))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(getattr(torch, by_name.get(name, dtype)))
    return model


def write_adapter(adapted: Any, work: RunDirectory, base: str) -> None:
    """The adapters alone, as peft writes them, into the work folder; `base` is what they are to be put on."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules or ())
    adapted.save_pretrained(work.result, save_embedding_layers=False)  # none has an adapter


def facts_of(plan: TunePlan, inputs: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of tune.json."""
    settings = plan.settings
    packages = ("moerge", "torch", "transformers", "accelerate", "numpy", *(["peft"] if settings.adapters else []))
    return {
        "format": _FORMAT,
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "settings": settings.model_dump(mode="json"),
        "models": inputs,
        **plan.to_json(),
        "trained": _trained(settings),
        **trained,
    }


def _trained(settings: Tuning) -> list[str]:
    """Name what is trained at some time, as people call it."""
    found = [*settings.trains, *(part for opening in settings.opens for part in opening.train)]
    given = settings.adapters
    return [*dict.fromkeys(found), *([f"adapters of rank {given.rank} on {'+'.join(given.target)}"] if given else [])]


def files_of(facts: Mapping[str, Any], work: RunDirectory) -> dict[str, bytes]:
    """The files beside the weights that say how they came about."""
    return {FACTS: to_json(facts), METRICS: work.metrics.read_bytes(), "README.md": _card(facts).encode()}


def _card(facts: Mapping[str, Any]) -> str:
    settings, last = facts["settings"], facts["last"]
    rows = [
        f"| {name} | {100 * found['expected_share']:.2f}% | {100 * found['drawn_share']:.2f}% | {found['tokens']:,} |"
        for name, found in facts["sources"].items()
    ]
    losses = json.dumps(settings["losses"])
    adapters = settings["adapters"]
    alone = adapters is not None and adapters["save"] == "adapter"
    return "\n".join(
        [
            f"---\nlibrary_name: {'peft' if alone else 'transformers'}\ntags:\n- moerge\n---",
            "# A tuned adapter" if alone else "# A tuned model",
            f"\n`{settings['model']}`, tuned by moerge {facts['versions']['moerge']} for {facts['steps']:,} steps of "
            f"{settings['batch']} sequences of {settings['length']} tokens, {facts['tokens']:,} tokens in all. Trained: "
            f"{', '.join(facts['trained'])}, {facts['trained_parameters']:,} of {facts['parameters']['all']:,} parameters. "
            f"AdamW, learning rate {settings['learning_rate']:g} ({settings['schedule']}), "
            f"weight decay {settings['weight_decay']:g}. Losses: `{losses}`. "
            f"Cross-entropy of the last step: {last['cross_entropy']:.4f} nats a token.",
            "\n## Text\n\n| source | weight | drawn | tokens |\n|---|---|---|---|",
            *rows,
            f"\n`{FACTS}` has every setting and digest, `{METRICS}` every step.\n",
        ]
    )
