"""Roles of tensors by the names that transformers' modules usually have; a module with a name of its own is its own role.

`layers.3.self_attn.q_proj.weight` is `attention.q` of layer 3, `layers.3.mlp.experts.7.down_proj.weight` `ffn.7.down`, and
`layers.3.mamba.in_proj.weight` `ssm.in`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_GROUPS = (
    ("cross_attention", r"cross_?attn|cross_?attention|encoder_attn|crossattention"),
    ("linear_attention", r"linear_attn|linear_attention|delta_net|gdn|kda"),
    ("attention", r"(self_?)?attn|multi_?head_?attention|(self_?)?attention|mha|self_attention|selfattention|attention_layer"),
    ("ssm", r"mamba\w*|ssm|mixer|xlstm|mlstm\w*|temporal_block|recurrent\w*"),
    ("conv", r"conv|short_conv"),
    ("ffn", r"mlp|ffn|feed_?forward|ff|block_sparse_moe|moe|shared_mlp|intermediate|moe_block|sparse_moe|channel_mixer"),
)
"""What the modules of a layer are called, by the beginning of the role; the first that matches counts."""

_PARTS = {
    "attention": {
        "q": r"q_proj|query|q|wq|q_lin|q_attn|query_proj",
        "k": r"k_proj|key|k|wk|k_lin|key_proj",
        "v": r"v_proj|value|v|wv|v_lin|value_proj",
        "o": r"o_proj|out_proj|dense|c_proj|wo|o|out_lin|output_proj|linear_out|proj",
        "kv": r"kv_proj|key_value|kv",
        "qkv": r"qkv_proj|query_key_value|c_attn|wqkv|qkv|qkv_fused",
    },
    "ffn": {
        "gate": r"gate_proj|w1|gate|wi_0|linear_fc1_g",
        "up": r"up_proj|w3|up|fc1|c_fc|fc_in|dense_h_to_4h|lin1|wi_1|v1|dense_in|linear_in",
        "down": r"down_proj|w2|down|fc2|c_proj|fc_out|dense_4h_to_h|lin2|wo|dense_out|linear_out|output_linear",
        "gate_up": r"gate_up_proj|input_linear|gate_up",
    },
}
_DIRECT = {
    "fc1": "ffn.up",
    "fc2": "ffn.down",
    "lin1": "ffn.up",
    "lin2": "ffn.down",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
}
"""Feed-forward matrices that some layers have without a module around them, and BERT's."""

_GATED = re.compile(r"((?:gate_up|gate|up|down)_proj)(?:_bias|\.bias)?")
_NORM = re.compile(r".*(norm|layernorm)\w*|ln(_\w+)?|ln\d", re.IGNORECASE)
_BEFORE_ATTENTION = re.compile(
    r"input_layernorm|ln_1|ln1|norm1|norm_1|attention_norm|operator_norm|self_attn_layer_norm|ln_attn|pre_attention\w*norm|"
    r"input_norm|attn_norm|pre_self_attn\w*norm|layer_norm1|norm|temporal_pre_norm|pre_norm"
)
_BEFORE_FFN = re.compile(
    r"pre_feedforward_layernorm|pre_mlp_layernorm|pre_ff_layernorm|ffn_norm|ff_norm|ln_2|ln2|norm2|norm_2|final_layer_norm|"
    r"ln_mlp|pre_moe_layernorm|mlp_norm|layer_norm2|channel_pre_norm"
)
_AFTER = {
    "post_attention": r"post_self_attn_layernorm|post_attn_norm|post_self_attn_norm",
    "post_ffn": r"post_feedforward_layernorm|post_mlp_layernorm|post_ff_layernorm|post_ffn_norm",
}


def layer_role(path: Sequence[str], beside: Collection[str]) -> str:
    """The role of a tensor in its layer.

    Args:
        path: Its name below the layer, such as `("self_attn", "q_proj", "weight")`.
        beside: Names of the modules of the layer, all of them.

    Returns:
        The role, such as `attention.q` or `norm.ffn.bias`.
    """
    *modules, leaf = path
    end = "" if leaf == "weight" else leaf
    if modules and leaf not in ("weight", "bias") and _GATED.fullmatch(leaf):  # all experts in one parameter
        modules, end = [*modules, _GATED.sub(r"\1", leaf)], "bias" if leaf.endswith("bias") else ""
    role = _module_role(modules, beside) if modules else ""
    return ".".join(part for part in (role, end) if part)


def _module_role(modules: Sequence[str], beside: Collection[str]) -> str:
    last = modules[-1]
    group = next((role for role, names in _GROUPS if re.fullmatch(names, modules[0], re.IGNORECASE)), "")
    if ".".join(modules) in _DIRECT:
        return _DIRECT[".".join(modules)]
    if _NORM.fullmatch(last) and (not group or len(modules) == 1 or last == "LayerNorm"):
        return f"norm.{_norm_use(modules, beside)}"
    if group == "ffn":
        return _ffn_role(modules, beside)
    return _attention_role(group, modules, beside) if group else ".".join(modules)


def _attention_role(group: str, modules: Sequence[str], beside: Collection[str]) -> str:
    first = modules[0]
    if modules[1:] == ["c_attn"] and f"{first}.q_attn" in beside:  # GPT-2's queries come from elsewhere
        return f"{group}.kv"
    inner = [part for part in modules[1:] if part not in ("self", "output", "attention", "attn")] or list(modules[1:])
    return ".".join([group, *inner[:-1], _part("attention", inner[-1])] if inner else [group])


def _norm_use(modules: Sequence[str], beside: Collection[str]) -> str:
    name = modules[-1]
    if name == "LayerNorm":  # BERT
        return "post_attention" if "attention" in modules else "post_ffn"
    after = next((use for use, names in _AFTER.items() if re.fullmatch(names, name)), "")
    if after:
        return after
    if re.search(r"cross_?att|encoder_attn", name, re.IGNORECASE):
        return "cross_attention"
    before_ffn = [other for other in beside if _BEFORE_FFN.fullmatch(other)]
    before_attention = [other for other in beside if _BEFORE_ATTENTION.fullmatch(other)]
    if name == "post_attention_layernorm":
        return "post_attention" if before_ffn or not before_attention else "ffn"
    if name in before_attention:
        return "attention"
    return "ffn" if name in before_ffn else name


def _ffn_role(modules: Sequence[str], beside: Collection[str]) -> str:
    inner = list(modules[1:])
    experts = any(name.partition(".")[2].startswith("experts") for name in beside)
    if experts and inner and re.fullmatch(r"router|gate|wg", inner[0]):
        return ".".join(["router", *(part for part in inner[1:] if part not in ("layer", "wg"))])
    if re.fullmatch(r"shared_mlp", modules[0]):
        inner = ["shared", *inner]
    if inner and re.fullmatch(r"shared_expert_gate", inner[0]):
        return "ffn.shared_gate"
    inner = ["shared" if re.fullmatch(r"shared_experts?|shared_mlp", part) else part for part in inner]
    inner = [part for part in inner if part not in ("experts", "mlp")]
    if not inner:
        return "ffn.up" if modules[0] == "intermediate" else "ffn"
    return ".".join(["ffn", *inner[:-1], inner[-1] if inner[-1].isdigit() else _part("ffn", inner[-1])])


def _part(group: str, name: str) -> str:
    usual = next((part for part, names in _PARTS[group].items() if re.fullmatch(names, name, re.IGNORECASE)), None)
    return usual or name.removesuffix("_proj")


_POSITION = re.compile(r".*(wpe|embed_positions|position_embeddings?|positions_embed)")


def outer_role(path: Sequence[str]) -> str:
    """The role of a tensor of the language model outside of its layers, given its name below the language model."""
    *modules, leaf = path
    end = [] if leaf == "weight" else [leaf]
    name = modules[-1] if modules else ""
    if re.fullmatch(r"(final_)?(layer_?)?norm(_f)?|ln_f|final_layer_?norm|norm_f|final_norm|ln_out|out_norm", name):
        return ".".join(["norm.final", *end])
    if name and _POSITION.fullmatch(name):
        return ".".join(["embedding.position", *end])
    return ".".join([*modules, *end])
