"""Small configs of any language model of transformers: its defaults, with sizes by the kind of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

VOCABULARY = 128
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size.*|unpadded_vocab_size|num_embeddings|codebook_size|ngram_vocab_size_base|.*_vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions|model_max_length|max_sequence_length", 64),
    (r"num_key_value_heads|.*_num_key_value_heads|num_kv_heads|n_head_kv|kv_heads|multi_query_group_num", 2),
    (r"(.*_)?num_attention_heads|n_heads?|num_heads|(.*_)?attention_heads|(.*_)?n_heads|.*num_heads", 4),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"(.*_)?head_dim|kv_channels|d_kv|v_head_dim|attention_head_dim|d_head|(.*_)?d_head", 8),
    (r".*lora_rank|laurel_rank|gated_norm_rank|.*low_?rank|.*gate_rank", 8),
    (r"(.*_)?(intermediate|inner)_(size|dim).*|(.*_)?ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|dim_feedforward", 48),
    (r"(.*_)?hidden_(size|dim)s?|d_model|n_embd|(.*_)?embed_dim|(.*_)?embedding_size|projection_dim|emb_dim|width|dim", 32),
    (r"hidden_size_per_layer_input|output_dim|.*projection_hidden_dim|.*_output_dim|lru_width|latent_dim|codebook_dim", 32),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_moe_experts|ffn_num_experts|.*num_experts", 4),
    (r"num_experts_per_tok.*|moe_top_?k|moe_k|top_k|num_selected_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups|.*_num_groups", 1),
    (r"image_size|input_size|resolution|max_image_size", 28),
    (r"(mamba_)?d_state|state_size|ssm_state_size|mamba_d_state", 4),
    (r"mamba_chunk_size|chunk_size|index_topk|sliding_window.*|window_size|attention_window", 8),
    (r"base_channels|latent_channels|output_channels|num_filters", 32),
)
_DEPTH = r"(num_)?(hidden_)?layers|n_layers?|depth|num_blocks|(en|de)coder_(num_)?layers|num_(en|de)coder_layers|resampler_depth"
_KINDS = (
    r".*layer_types|.*block_types?|indexer_types|layers_block_type|attention_layers|activation_sparsity_pattern|block_types|"
    r"num_attention_heads_per_layer|layer_rope_theta"
)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_ssm": 64}
_LATENT = {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16}
"""Of attention with latent keys and values."""
_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n": {"intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "glm5_next": {"num_key_value_heads": 4, "index_kpool": 4, "qk_rope_head_dim": 0, "qk_head_dim": 8},
    "hy_v4_vl": {"qk_rope_head_dim": 8},
    "mistral_large4": {"kv_source_layers": [0, 1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "apertus1p5": {"image_token_offset": 16, "audio_token_offset": 144},
    "cohere_compass": {"rope_parameters": _ROPES},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]]},
    "emu3": {"vocabulary_map": {"<image>": 20}},
    "chameleon": {"vocabulary_map": {"<image>": 20}},
    "zamba2": {"hybrid_layer_ids": [1], "layers_block_type": ["linear_attention", "hybrid"], "layer_types": None},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note": {"num_key_value_heads": 4, "adapter_in_dim": 32, "adapter_out_dim": 32, "adapter_input_size": 32},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
}
"""Values that go with others in ways that their names do not say."""


def small(values: Mapping[str, Any], layers: int, changes: Mapping[str, Any], *, kinds: bool) -> dict[str, Any]:
    """The values with small sizes and lists; what is derived from other values is left out, to be derived again.

    With `kinds` every kind of layer of the default is there, in as many layers.
    """
    result: dict[str, Any] = {}
    changes = changes if "kv_lora_rank" not in values else {**_LATENT, **changes}
    for key, value in values.items():
        if key in changes:
            result[key] = changes[key]
        elif isinstance(value, Mapping) and (key.endswith("_config") or key in ("decoder", "encoder")):
            result[key] = small(value, layers, changes, kinds=kinds) if key != "per_layer_config" else None
        elif isinstance(value, Mapping) and "mrope_section" in value:
            result[key] = {**value, "mrope_section": [2, 1, 1]}
        elif type(value) is int and value > 0:
            result[key] = _size(key, value, layers)
        elif isinstance(value, list | tuple):
            result[key] = _list(key, value, layers, kinds=kinds)
        else:
            result[key] = value
    return {
        key: value for key, value in (result | {k: v for k, v in changes.items() if k in values}).items() if value is not None
    }


def _size(key: str, value: int, layers: int) -> int:
    if re.search(r"token_(id|index)|_id$|token_offset", key):
        return value % 100 + 20
    if re.fullmatch(_DEPTH, key):
        return min(value, layers)
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
    return value if size is None or size > value else size


def _list(key: str, value: Sequence[Any], layers: int, *, kinds: bool) -> Any:
    if re.fullmatch(_KINDS, key):
        different = sorted(dict.fromkeys(value), key=lambda kind: kind == "full_attention")  # which some want last
        return [different[i % len(different)] for i in range(layers)] if kinds and 1 < len(different) <= layers else None
    if re.search(r"layers?$|idxs|index|indices|_ids$", key) and all(type(number) is int for number in value):
        return [number % layers for number in value] if "token" not in key else [number % 16 for number in value]
    return value
