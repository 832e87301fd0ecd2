"""Our own token-routed format, as a `MoEFormat` made for a recipe's experts: any family, whether or not it has a native one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.architecture.config import portable_config
from moerge.architecture.family import Family
from moerge.architecture.moe_format import MoEFormat, SharedSlot
from moerge.architecture.token_mixture import CLASS, INNER, MODEL_TYPE, feed_forward_module
from moerge.errors import InputError
from moerge.modeling import TOKEN_AUTO_MAP
from moerge.planning.assemble.common import Assembly
from moerge.recipe.schema import MoE
from moerge.routers.sequence import FORMAT

_NOT_INSIDE = ("torch_dtype", "transformers_version", "auto_map")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token_format(assembly: Assembly, moe: MoE) -> MoEFormat:
    """The format for experts of this family. Raises InputError where its feed-forward modules cannot be routed."""
    model, dtype = assembly.leader, str(assembly.dtype.torch_name)
    if model.family is None:
        raise InputError(f"moe.format: experts of type {model.model_type!r} are unknown here, so their tokens cannot be routed")
    try:
        module = feed_forward_module(model.family)
    except ValueError as error:
        raise InputError(f"moe.format: experts of type {model.model_type!r} cannot be routed by token: {error}") from None
    dense = portable_config(model.written, family=model.family, dtype=dtype)

    def convert(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
        return {
            "architectures": [CLASS],
            "model_type": MODEL_TYPE,
            "auto_map": TOKEN_AUTO_MAP,
            INNER: {key: value for key, value in dense.items() if key not in _NOT_INSIDE},
            "expert_names": list(assembly.recipe.expert_names),
            "feed_forward": module,
            "num_experts_per_tok": top_k,
            **{key: dense[key] for key in _TOKENS if key in dense},
            "dtype": dtype,
        }

    return MoEFormat(
        FORMAT,
        Family(MODEL_TYPE, CLASS, ()),
        frozenset({model.model_type}),
        convert,
        lambda config: None,
        shared=SharedSlot(lambda config: {"shared_weight": moe.shared_weight}, weighs=True),
        layers=_listed,
    )


def _listed(chosen: Sequence[bool]) -> dict[str, Any]:
    return {"moe_layers": [layer for layer, has_experts in enumerate(chosen) if has_experts]}
