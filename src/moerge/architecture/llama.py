"""Llama and the families that share its layout."""

from moerge.architecture.family import Family, TensorRule

BACKBONE = (
    TensorRule("embedding", "model.embed_tokens.weight", ("vocab", "hidden")),
    TensorRule("layers.{layer}.norm.attention", "model.layers.{layer}.input_layernorm.weight", ("hidden",)),
    TensorRule("layers.{layer}.attention.q", "model.layers.{layer}.self_attn.q_proj.weight", ("q", "hidden")),
    TensorRule("layers.{layer}.attention.k", "model.layers.{layer}.self_attn.k_proj.weight", ("kv", "hidden")),
    TensorRule("layers.{layer}.attention.v", "model.layers.{layer}.self_attn.v_proj.weight", ("kv", "hidden")),
    TensorRule("layers.{layer}.attention.o", "model.layers.{layer}.self_attn.o_proj.weight", ("hidden", "q")),
    TensorRule("layers.{layer}.norm.ffn", "model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
    TensorRule("norm.final", "model.norm.weight", ("hidden",)),
    TensorRule("head", "lm_head.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
)
"""All that is not feed-forward; Mixtral shares it to the letter."""

_FFN = (
    TensorRule("layers.{layer}.ffn.gate", "model.layers.{layer}.mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorRule("layers.{layer}.ffn.up", "model.layers.{layer}.mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorRule("layers.{layer}.ffn.down", "model.layers.{layer}.mlp.down_proj.weight", ("hidden", "intermediate")),
)
_BIASES = tuple(
    TensorRule(f"layers.{{layer}}.{part}.{short}.bias", f"model.layers.{{layer}}.{module}.{short}_proj.bias", (size,), when)
    for part, module, when, sizes in (
        ("attention", "self_attn", "attention_bias", {"q": "q", "k": "kv", "v": "kv", "o": "hidden"}),
        ("ffn", "mlp", "mlp_bias", {"gate": "intermediate", "up": "intermediate", "down": "hidden"}),
    )
    for short, size in sizes.items()
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=(*BACKBONE, *_FFN, *_BIASES),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=(*BACKBONE, *_FFN),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
)
