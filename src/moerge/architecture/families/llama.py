"""Llama and Mistral, and what many families share with them to the letter."""

from __future__ import annotations

from moerge.architecture.family import Family, TensorRule

BLOCK = "layers.{layer}"
LAYER = f"model.{BLOCK}"


def attention(biased: str = "", when: str = "") -> tuple[TensorRule, ...]:
    """q, k, v, o of a layer, and the biases of those named (`"qkv"`), where config key `when` says so."""
    shapes = {"q": ("q", "hidden"), "k": ("kv", "hidden"), "v": ("kv", "hidden"), "o": ("hidden", "q")}
    weights = [(p, TensorRule(f"{BLOCK}.attention.{p}", f"{LAYER}.self_attn.{p}_proj.weight", shapes[p])) for p in shapes]
    return (
        *(weight for _, weight in weights),
        *(
            TensorRule(f"{weight.role}.bias", f"{LAYER}.self_attn.{p}_proj.bias", shapes[p][:1], when)
            for p, weight in weights
            if p in biased
        ),
    )


def head_norms(q: str = "head", k: str = "head") -> tuple[TensorRule, ...]:
    """The norms of queries and keys, of these sizes."""
    return tuple(
        TensorRule(f"{BLOCK}.attention.{p}_norm", f"{LAYER}.self_attn.{p}_norm.weight", (size,))
        for p, size in (("q", q), ("k", k))
    )


def norm(use: str, module: str) -> TensorRule:
    """One of a layer's norms: what it is before or after, and the module's name."""
    return TensorRule(f"{BLOCK}.norm.{use}", f"{LAYER}.{module}.weight", ("hidden",))


def ffn(
    size: str = "intermediate", *, role: str = "ffn", module: str = "mlp", when: str = "", bias: str = ""
) -> tuple[TensorRule, ...]:
    """gate, up, down of a gated feed-forward module, in layers where `when` holds; with biases where the config has `bias`."""
    shapes = {"gate": (size, "hidden"), "up": (size, "hidden"), "down": ("hidden", size)}
    return (
        *(TensorRule(f"{BLOCK}.{role}.{p}", f"{LAYER}.{module}.{p}_proj.weight", shape, when) for p, shape in shapes.items()),
        *(
            TensorRule(f"{BLOCK}.{role}.{p}.bias", f"{LAYER}.{module}.{p}_proj.bias", shape[:1], bias)
            for p, shape in shapes.items()
            if bias
        ),
    )


EMBEDDING = TensorRule("embedding", "model.embed_tokens.weight", ("vocab", "hidden"))
BEFORE_ATTENTION = norm("attention", "input_layernorm")
BEFORE_FFN = norm("ffn", "post_attention_layernorm")
"""transformers names it by the place, moerge by the use."""
FINAL = (
    TensorRule("norm.final", "model.norm.weight", ("hidden",)),
    TensorRule("head", "lm_head.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
)
BACKBONE = (EMBEDDING, BEFORE_ATTENTION, *attention(), BEFORE_FFN, *FINAL)
"""All that is not feed-forward; Mixtral shares it to the letter."""

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=(
        EMBEDDING,
        BEFORE_ATTENTION,
        *attention("qkvo", "attention_bias"),
        BEFORE_FFN,
        *ffn(bias="mlp_bias"),
        *FINAL,
    ),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=(*BACKBONE, *ffn()),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
