"""StarCoder2: LayerNorms and projections with biases, and a feed-forward layer without a gate."""

from moerge.plugins import Family, TensorRule

_LAYER = "model.layers.{layer}"
_MODULES = [  # role, name, output size, input size
    ("attention.q", "self_attn.q_proj", "q", "hidden"),
    ("attention.k", "self_attn.k_proj", "kv", "hidden"),
    ("attention.v", "self_attn.v_proj", "kv", "hidden"),
    ("attention.o", "self_attn.o_proj", "hidden", "q"),
    ("ffn.up", "mlp.c_fc", "intermediate", "hidden"),
    ("ffn.down", "mlp.c_proj", "hidden", "intermediate"),
]


def _norm(role: str, name: str) -> list[TensorRule]:
    return [TensorRule(role, f"{name}.weight", ("hidden",)), TensorRule(f"{role}.bias", f"{name}.bias", ("hidden",))]


STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    tensors=(
        TensorRule("embedding", "model.embed_tokens.weight", ("vocab", "hidden")),
        *_norm("layers.{layer}.norm.attention", f"{_LAYER}.input_layernorm"),
        *(TensorRule(f"layers.{{layer}}.{role}", f"{_LAYER}.{name}.weight", tuple(sizes)) for role, name, *sizes in _MODULES),
        *(
            TensorRule(f"layers.{{layer}}.{role}.bias", f"{_LAYER}.{name}.bias", (rows,), when="use_bias")
            for role, name, rows, _ in _MODULES
        ),
        *_norm("layers.{layer}.norm.ffn", f"{_LAYER}.post_attention_layernorm"),
        *_norm("norm.final", "model.norm"),
        TensorRule("head", "lm_head.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
    ),
    defaults={  # what transformers assumes where config.json is silent
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_bias": True,
    },
)
