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
    from moerge.modeling.configuration_token_moerge import MoergeTokenConfig
    from moerge.modeling.modeling_heterogeneous_moerge import MoergeHeterogeneousForCausalLM, MoergeHeterogeneousModel
    from moerge.modeling.modeling_moerge import MoergeForCausalLM, MoergeModel
    from moerge.modeling.modeling_token_moerge import MoergeTokenForCausalLM
    from moerge.modeling.routing_moerge import Routing

_HOMES = {
    "MoergeCache": "cache_moerge",
    "MoergeConfig": "configuration_moerge",
    "MoergeForCausalLM": "modeling_moerge",
    "MoergeHeterogeneousConfig": "configuration_heterogeneous_moerge",
    "MoergeHeterogeneousForCausalLM": "modeling_heterogeneous_moerge",
    "MoergeHeterogeneousModel": "modeling_heterogeneous_moerge",
    "MoergeModel": "modeling_moerge",
    "MoergeTokenConfig": "configuration_token_moerge",
    "MoergeTokenForCausalLM": "modeling_token_moerge",
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

TOKEN_AUTO_MAP = {
    "AutoConfig": "configuration_token_moerge.MoergeTokenConfig",
    "AutoModelForCausalLM": "modeling_token_moerge.MoergeTokenForCausalLM",
}
"""The same for a dense family's model that routes tokens."""

AUTO_MAPS = (AUTO_MAP, HETEROGENEOUS_AUTO_MAP, TOKEN_AUTO_MAP)

_IMPORTS = re.compile(r"^from \.(\w+) import", re.MULTILINE)

__all__ = [
    "AUTO_MAP",
    "FAMILIES",
    "HETEROGENEOUS_AUTO_MAP",
    "ROLES",
    "TOKEN_AUTO_MAP",
    "MoergeCache",
    "MoergeConfig",
    "MoergeForCausalLM",
    "MoergeHeterogeneousConfig",
    "MoergeHeterogeneousForCausalLM",
    "MoergeHeterogeneousModel",
    "MoergeModel",
    "MoergeTokenConfig",
    "MoergeTokenForCausalLM",
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

    models = {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    for auto_map in AUTO_MAPS:
        known = {auto: getattr(import_module(f"moerge.modeling.{home}"), name) for auto, (home, name) in _homes(auto_map)}
        config = known.pop("AutoConfig")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()
        for auto, kind in known.items():
            models[auto].register(config, kind, exist_ok=True)
            kind.register_for_auto_class(auto)


def _homes(auto_map: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    return [(auto, place.split(".")) for auto, place in auto_map.items()]


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
