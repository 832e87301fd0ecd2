"""Native mixtures whose tables, and whose dense families', transformers says: a config's keys, and the roles that are new."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moerge.architecture.families.qwen_moe import SHARED_SIZE, shared_width
from moerge.architecture.family import Family
from moerge.architecture.moe_format import MoEFormat, SharedSlot

Keys = Callable[[Mapping[str, Any], int, int], dict[str, Any]]


def _derived(name: str, architecture: str, source: str, keys: Keys, **more: Any) -> MoEFormat:
    """A format without a table: `keys(config, experts, top_k)` are those that differ from the dense config's."""

    def convert(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
        own = {"architectures": [architecture], "model_type": name, "output_router_logits": False}
        return {**own, **keys(config, experts, top_k)}

    family = Family(model_type=name, architecture=architecture, tensors=())
    return MoEFormat(name, family, frozenset({source}), convert, more.pop("unsupported_reason", lambda config: None), **more)


def _qwen3_5(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    width = config["intermediate_size"]
    own = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}
    return {**own, "shared_expert_intermediate_size": SHARED_SIZE}


def _lfm2(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    width = config["intermediate_size"]
    own = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width, "intermediate_size": width}
    return {**own, "num_dense_layers": 0, "use_expert_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0}


def _lfm2_layers(chosen: Sequence[bool]) -> dict[str, Any] | None:
    first = list(chosen).index(True)
    return {"num_dense_layers": first} if all(chosen[first:]) else None


def _ernie(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    own = {"moe_num_experts": experts, "moe_k": top_k, "moe_intermediate_size": config["intermediate_size"]}
    own |= {"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1}
    return {**own, "moe_num_shared_experts": 0, "moe_norm_min": 1e-12}


def _ernie_layers(chosen: Sequence[bool]) -> dict[str, Any] | None:
    first, last = list(chosen).index(True), len(chosen) - 1 - list(reversed(chosen)).index(True)
    if not all(chosen[first : last + 1]):
        return None
    return {"moe_layer_start_index": first, "moe_layer_end_index": last}


def _hunyuan(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    return {"num_experts": experts, "moe_topk": top_k}


def _granite(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    own = {"num_local_experts": experts, "num_experts_per_tok": top_k, "intermediate_size": config["intermediate_size"]}
    return {**own, "shared_intermediate_size": SHARED_SIZE}


def _granite_obstacle(config: Mapping[str, Any]) -> str | None:
    return "its feed-forward modules are mixtures already" if config.get("num_local_experts") else None


QWEN3_5_MOE_FORMAT = _derived(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    "qwen3_5_text",
    _qwen3_5,
    zero_roles=("ffn.shared",),
    random_roles=("ffn.shared_gate",),
    shared=SharedSlot(shared_width, gated=True),
)
LFM2_MOE_FORMAT = _derived("lfm2_moe", "Lfm2MoeForCausalLM", "lfm2", _lfm2, layers=_lfm2_layers, gate="sigmoid")
ERNIE4_5_MOE_FORMAT = _derived(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    "ernie4_5",
    _ernie,
    zero_roles=("router.moe_statics",),
    shared=SharedSlot(lambda config: {"moe_num_shared_experts": 1}),
    layers=_ernie_layers,
)
HUNYUAN_V1_MOE_FORMAT = _derived(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    "hunyuan_v1_dense",
    _hunyuan,
    zero_roles=("ffn.shared",),
    shared=SharedSlot(lambda config: {}),
)
GRANITEMOEHYBRID_FORMAT = _derived(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    "granitemoehybrid",
    _granite,
    unsupported_reason=_granite_obstacle,
    zero_roles=("ffn.shared",),
    shared=SharedSlot(lambda config: {"shared_intermediate_size": config["intermediate_size"]}),
    dense_module="ffn.shared",
)
