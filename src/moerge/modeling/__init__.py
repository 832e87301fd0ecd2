"""The routed models, as transformers sees them: experts of one family, and experts of different architectures.

The files `*_moerge.py` import only torch, transformers and each other, so that a checkpoint can carry them and load with
`trust_remote_code=True` where moerge is not installed. Importing this package imports neither torch nor transformers.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.modeling.naming_moerge import FAMILIES, ROLES, dense_name, layer_of, role_of, separate_name

if TYPE_CHECKING:
    from moerge.modeling.cache_moerge import MoergeCache
    from moerge.modeling.configuration_heterogeneous_moerge import MoergeHeterogeneousConfig
    from moerge.modeling.configuration_moerge import MoergeConfig
    from moerge.modeling.modeling_heterogeneous_moerge import MoergeHeterogeneousForCausalLM, MoergeHeterogeneousModel
    from moerge.modeling.modeling_moerge import MoergeForCausalLM, MoergeModel
    from moerge.modeling.routing_moerge import Routing

_HOMES = {
    "MoergeCache": "cache_moerge",
    "MoergeConfig": "configuration_moerge",
    "MoergeForCausalLM": "modeling_moerge",
    "MoergeHeterogeneousConfig": "configuration_heterogeneous_moerge",
    "MoergeHeterogeneousForCausalLM": "modeling_heterogeneous_moerge",
    "MoergeHeterogeneousModel": "modeling_heterogeneous_moerge",
    "MoergeModel": "modeling_moerge",
    "Routing": "routing_moerge",
}

AUTO_MAP = {
    "AutoConfig": "configuration_moerge.MoergeConfig",
    "AutoModel": "modeling_moerge.MoergeModel",
    "AutoModelForCausalLM": "modeling_moerge.MoergeForCausalLM",
}
"""`auto_map` of config.json: where a checkpoint's own code has the classes."""

HETEROGENEOUS_AUTO_MAP = {
    "AutoConfig": "configuration_heterogeneous_moerge.MoergeHeterogeneousConfig",
    "AutoModel": "modeling_heterogeneous_moerge.MoergeHeterogeneousModel",
    "AutoModelForCausalLM": "modeling_heterogeneous_moerge.MoergeHeterogeneousForCausalLM",
}
"""The same for experts of different architectures."""

_IMPORTS = re.compile(r"^from \.(\w+) import", re.MULTILINE)

__all__ = [
    "AUTO_MAP",
    "FAMILIES",
    "HETEROGENEOUS_AUTO_MAP",
    "ROLES",
    "MoergeCache",
    "MoergeConfig",
    "MoergeForCausalLM",
    "MoergeHeterogeneousConfig",
    "MoergeHeterogeneousForCausalLM",
    "MoergeHeterogeneousModel",
    "MoergeModel",
    "Routing",
    "code_files",
    "dense_name",
    "layer_of",
    "register",
    "role_of",
    "separate_name",
]


def register() -> None:
    """Make transformers' Auto classes know the models, and `save_pretrained` put their code beside the weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for auto_map in (AUTO_MAP, HETEROGENEOUS_AUTO_MAP):
        config, model, causal = (
            getattr(import_module(f"moerge.modeling.{home}"), name)
            for home, name in (auto_map[auto].split(".") for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"))
        )
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
        causal.register_for_auto_class("AutoModelForCausalLM")


def code_files(auto_map: Mapping[str, str] = AUTO_MAP) -> dict[str, Path]:
    """The files that a checkpoint carries to load without moerge, by the name that they have there.

    They are those that `auto_map` names, and what these import.
    """
    found: dict[str, Path] = {}
    wanted = sorted({home.split(".")[0] for home in auto_map.values()})
    while wanted:
        path = Path(__file__).parent / f"{wanted.pop()}.py"
        if path.name not in found:
            found[path.name] = path
            wanted += _IMPORTS.findall(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"moerge.modeling.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moerge.modeling' has no attribute {name!r}")
