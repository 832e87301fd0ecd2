"""GPT-2 and GPT-NeoX: fused attention, biases, layer norms, buffers in old checkpoints."""

from __future__ import annotations

from typing import Any

from moerge.architecture.families.llama import BLOCK
from moerge.architecture.family import Family, TensorRule


def _affine(
    role: str, name: str, shape: tuple[str, ...], bias: str, *, when: str = "", bias_when: str = ""
) -> tuple[TensorRule, ...]:
    return (
        TensorRule(role, f"{name}.weight", shape, when),
        TensorRule(f"{role}.bias", f"{name}.bias", (bias,), bias_when or when),
    )


_GPT2, _CROSS = "transformer.h.{layer}", "add_cross_attention"


def _derive_gpt2(config: dict[str, Any]) -> None:
    """The feed-forward module is four times as wide as the model unless `n_inner` says otherwise."""
    width = config.get("hidden_size")
    if config.get("intermediate_size") is None and type(width) is int:
        config["intermediate_size"] = 4 * width


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=(
        TensorRule("embedding", "transformer.wte.weight", ("vocab", "hidden")),
        TensorRule("embedding.position", "transformer.wpe.weight", ("positions", "hidden")),
        *_affine(f"{BLOCK}.norm.attention", f"{_GPT2}.ln_1", ("hidden",), "hidden"),
        *_affine(f"{BLOCK}.attention.qkv", f"{_GPT2}.attn.c_attn", ("hidden", "3*hidden"), "3*hidden"),
        *_affine(f"{BLOCK}.attention.o", f"{_GPT2}.attn.c_proj", ("hidden", "hidden"), "hidden"),
        *_affine(f"{BLOCK}.norm.ffn", f"{_GPT2}.ln_2", ("hidden",), "hidden"),
        *_affine(f"{BLOCK}.norm.cross_attention", f"{_GPT2}.ln_cross_attn", ("hidden",), "hidden", when=_CROSS),
        *_affine(f"{BLOCK}.cross_attention.q", f"{_GPT2}.crossattention.q_attn", ("hidden", "hidden"), "hidden", when=_CROSS),
        *_affine(
            f"{BLOCK}.cross_attention.kv", f"{_GPT2}.crossattention.c_attn", ("hidden", "2*hidden"), "2*hidden", when=_CROSS
        ),
        *_affine(f"{BLOCK}.cross_attention.o", f"{_GPT2}.crossattention.c_proj", ("hidden", "hidden"), "hidden", when=_CROSS),
        *_affine(f"{BLOCK}.ffn.up", f"{_GPT2}.mlp.c_fc", ("hidden", "intermediate"), "intermediate"),
        *_affine(f"{BLOCK}.ffn.down", f"{_GPT2}.mlp.c_proj", ("intermediate", "hidden"), "hidden"),
        *_affine("norm.final", "transformer.ln_f", ("hidden",), "hidden"),
        TensorRule("head", "lm_head.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
    ),
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 1024,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    buffers=(r"transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)",),
    keys={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
    },
    derive=_derive_gpt2,
    aliases=((r"(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
)

_NEOX, _BIAS = "gpt_neox.layers.{layer}", "attention_bias"

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    tensors=(
        TensorRule("embedding", "gpt_neox.embed_in.weight", ("vocab", "hidden")),
        *_affine(f"{BLOCK}.norm.attention", f"{_NEOX}.input_layernorm", ("hidden",), "hidden"),
        *_affine(
            f"{BLOCK}.attention.qkv", f"{_NEOX}.attention.query_key_value", ("3*hidden", "hidden"), "3*hidden", bias_when=_BIAS
        ),
        *_affine(f"{BLOCK}.attention.o", f"{_NEOX}.attention.dense", ("hidden", "hidden"), "hidden", bias_when=_BIAS),
        *_affine(f"{BLOCK}.norm.ffn", f"{_NEOX}.post_attention_layernorm", ("hidden",), "hidden"),
        *_affine(f"{BLOCK}.ffn.up", f"{_NEOX}.mlp.dense_h_to_4h", ("intermediate", "hidden"), "intermediate"),
        *_affine(f"{BLOCK}.ffn.down", f"{_NEOX}.mlp.dense_4h_to_h", ("hidden", "intermediate"), "hidden"),
        *_affine("norm.final", "gpt_neox.final_layer_norm", ("hidden",), "hidden"),
        TensorRule("head", "embed_out.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
    ),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    buffers=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    keys={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    aliases=((r"lm_head\.", "embed_out."),),
)
