"""The sequence-routed model, as transformers sees it.

The files `*_moerge.py` import only torch, transformers and each other, so that a checkpoint can carry them and load with
`trust_remote_code=True` where moerge is not installed. Importing this package imports neither torch nor transformers.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.modeling.naming_moerge import FAMILIES, ROLES, dense_name, layer_of, role_of, separate_name

if TYPE_CHECKING:
    from moerge.modeling.cache_moerge import MoergeCache
    from moerge.modeling.configuration_moerge import MoergeConfig
    from moerge.modeling.modeling_moerge import MoergeForCausalLM, MoergeModel
    from moerge.modeling.routing_moerge import Routing

_HOMES = {
    "MoergeCache": "cache_moerge",
    "MoergeConfig": "configuration_moerge",
    "MoergeForCausalLM": "modeling_moerge",
    "MoergeModel": "modeling_moerge",
    "Routing": "routing_moerge",
}

AUTO_MAP = {
    "AutoConfig": "configuration_moerge.MoergeConfig",
    "AutoModel": "modeling_moerge.MoergeModel",
    "AutoModelForCausalLM": "modeling_moerge.MoergeForCausalLM",
}
"""`auto_map` of config.json: where a checkpoint's own code has the classes."""

__all__ = [
    "AUTO_MAP",
    "FAMILIES",
    "ROLES",
    "MoergeCache",
    "MoergeConfig",
    "MoergeForCausalLM",
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
    """Make transformers' Auto classes know the model, and `save_pretrained` put its code beside the weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from moerge.modeling.configuration_moerge import MoergeConfig
    from moerge.modeling.modeling_moerge import MoergeForCausalLM, MoergeModel

    AutoConfig.register(MoergeConfig.model_type, MoergeConfig, exist_ok=True)
    AutoModel.register(MoergeConfig, MoergeModel, exist_ok=True)
    AutoModelForCausalLM.register(MoergeConfig, MoergeForCausalLM, exist_ok=True)
    MoergeConfig.register_for_auto_class()
    MoergeModel.register_for_auto_class("AutoModel")
    MoergeForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def code_files() -> dict[str, Path]:
    """The files that a checkpoint carries to load without moerge, by the name that they have there."""
    return {path.name: path for path in sorted(Path(__file__).parent.glob("*_moerge.py"))}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"moerge.modeling.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moerge.modeling' has no attribute {name!r}")
