"""The files beside an extracted adapter's tensors: settings as peft reads them, and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from moerge.checkpoint.manifest import to_json
from moerge.extraction.result import Extraction
from moerge.extraction.targets import Target

_USE = """```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}), "path/to/this/folder")
```"""


def adapter_config(
    found: Extraction,
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    saved: Sequence[str],
    modules: Sequence[str],
    tied: bool,
    parameters: Sequence[str] = (),
) -> bytes:
    """adapter_config.json. alpha equals the rank everywhere, so every factor counts as it is, also for programs that know no
    `rank_pattern`. `modules` are all modules of the base, `parameters` what is no module's weight: all experts of a layer."""
    pattern = {module: rank for module, rank in ranks.items() if rank != found.rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": found.base,
        "revision": found.revision,
        "r": found.rank,
        "lora_alpha": found.rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _short([target.module for target in targets], modules),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": any(target.transposed and target.kind == "lora" for target in targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if parameters:
        config["target_parameters"] = list(parameters)
    return to_json({**config, "ensure_weight_tying": True} if tied else config)


def _short(targets: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The modules' last names, where these mean no others; else the whole names."""
    shortened = sorted({name.rpartition(".")[2] for name in targets})
    meant = {name for name in modules if name.rpartition(".")[2] in shortened}
    return shortened if meant == set(targets) else sorted(targets)


def adapter_card(found: Extraction, *, multimodal: bool = False) -> bytes:
    """README.md with the Hub's metadata in front."""
    metadata = {
        "library_name": "peft",
        "tags": ["lora", "moerge"],
        **({"base_model": found.base, "base_model_relation": "adapter"} if found.revision else {}),
    }
    rows = ["| role | stored as | rank | part of the task vector | kept |", "|---|---|---|---|---|"]
    for role in found.roles:
        low, high = role.ranks or ("", "")
        ranks = str(low) if low == high else f"{low} to {high}"
        rows.append(f"| {role.role} | {role.kind} | {ranks} | {found.part(role):.2%} | {role.share:.2%} |")
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---",
        f"# {found.expert} as an adapter of {found.base}",
        f"Extracted by moerge {version('moerge')}: the task vector's truncated singular value decomposition, rank {found.rank}. "
        f"It keeps {found.share:.2%} of the task vector's squared Frobenius norm.",
        "\n".join(rows),
        *(["## Warnings", "\n".join(f"- {warning}" for warning in found.warnings)] if found.warnings else ()),
        "## Use",
        _USE.format(base=found.base, auto="AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"),
    ]
    return ("\n\n".join(parts) + "\n").encode()
