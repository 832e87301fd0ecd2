"""Tensors that the class in a checkpoint's `architectures` needs, and their names in memory, asked of one without values."""

# mypy: allow-untyped-calls

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SHOWN = 3


@dataclass(frozen=True)
class Compared:
    """The problems that keep a checkpoint from running, and notes."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_with_transformers(folder: Path, config: Mapping[str, Any]) -> Compared:
    """Load the checkpoint in `folder` without values, if transformers is installed and has its class; its code is never run."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or config.get("quantization_config") or not (find_spec("transformers") and find_spec("torch")):
        return Compared()
    import transformers

    from moerge.quiet import without_progress_bars, without_warnings

    version = f"transformers {transformers.__version__}"
    kind = getattr(transformers, name, None)
    if kind is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return Compared(notes=(f"not compared with what the model's code needs: {version} has no {name}",))
    with without_warnings(), without_progress_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, about configs of other versions
        return _load(kind, folder, f"{version} needs for a {name}", transformers)


def names_in_memory(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names that a checkpoint's tensors have in its class, None where transformers does not have that. Needs transformers."""
    model = model_without_values(folder, config)
    return None if model is None else tuple(model.state_dict())


def model_without_values(folder: Path, config: Mapping[str, Any]) -> Any:
    """A checkpoint's model on torch's device `meta`, None where transformers does not have its class. Needs transformers."""
    import torch
    import transformers

    from moerge.quiet import without_warnings

    named = config.get("architectures")
    kind = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    if kind is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    with without_warnings():
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return kind(settings)


def _load(kind: Any, folder: Path, what: str, transformers: Any) -> Compared:
    import torch

    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            kind(settings)
    except ImportError as error:
        return Compared(notes=(f"not compared with what {what}: it needs {error.name}",))
    except Exception as error:  # whatever a config that fits no model makes its code raise
        return Compared((f"config.json has not what {what}: {' '.join(str(error).split())[:200]}",))
    options = {"device_map": "meta", "ignore_mismatched_sizes": True, "use_safetensors": True, "dtype": torch.bfloat16}
    try:
        _, report = kind.from_pretrained(folder, config=settings, output_loading_info=True, **options)
    except Exception as error:  # a version that cannot load without values is no fault of the checkpoint
        return Compared(notes=(f"not compared with what {what}: {' '.join(str(error).split())[:200]}",))
    missing = [f"tensor {name!r} is missing, which {what}" for name in sorted(report["missing_keys"])]
    shapes = [
        f"tensor {name!r} has shape {list(stored)}, not {list(wanted)}, which {what}"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    unused = sorted(report["unexpected_keys"])
    notes = [f"{len(unused)} tensors are none that {what}: {', '.join(unused[:_SHOWN])}"] if unused else []
    return Compared((*missing, *shapes), tuple(notes))
