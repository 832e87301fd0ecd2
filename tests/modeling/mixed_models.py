"""Tiny experts of different architectures and the models made of them, in memory and as checkpoints written by hand.

model = mixed("llama", "gpt_neox", embedding="shared", routing={"kind": "uniform"})      # projectors drawn
model = mixed("llama", "llama", exact=True)                                  # every path is its expert
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moerge.modeling import HETEROGENEOUS_AUTO_MAP, MoergeHeterogeneousConfig, MoergeHeterogeneousForCausalLM

VOCABULARY = 64
WIDTH = 6
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
_SIZES = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_SMALL = {**_SIZES, "hidden_size": 24, "num_attention_heads": 2}
_MOE = {**_SMALL, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT = {**_IDS, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_ctx": 64, **_UNDROPPED}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "olmo2": {**_SMALL, "num_hidden_layers": 3},
    "gpt_neox": _SMALL,
    "qwen2": {**_SMALL, "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "head_dim": 8},
    "mistral": {**_SIZES, "sliding_window": 4},
    "gpt2": _GPT,
    "phi": _SMALL,
    "gemma2": {**_SMALL, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {**_SMALL, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {**_SMALL, "logit_scale": 0.3},
    "bloom": {**_IDS, "hidden_size": 24, "n_layer": 2, "n_head": 2},
    "mpt": {**_IDS, "d_model": 24, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "mixtral": {**_SMALL, "num_local_experts": 3},
    "mamba": {**_IDS, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},
    "lfm2": {**_SMALL, "full_attn_idxs": [1], "block_multiple_of": 8},
    "falcon_h1": {
        **_SMALL,
        "mamba_d_ssm": 24,
        "mamba_n_heads": 2,
        "mamba_d_head": 12,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
    },
    "openai-gpt": _GPT,
    "llama4_text": {**_SMALL, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
}
FOUR = ("llama", "olmo2", "gpt_neox", "qwen2")
"""The four that have to work together."""


@cache
def expert(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a family that differs from others in every matrix; it is shared between tests, which must not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some families draw vectors too
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**CONFIGS[family], **changes})).eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return model


def names(count: int) -> list[str]:
    """What the experts are called."""
    return ["math", "code", "facts", "poems", "plays"][:count]


def is_table(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor is the input embedding or belongs to the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    prefixes = [f"{path}." for path, module in model.named_modules() if module in ends]
    return name.startswith((*prefixes, "embed_out."))


def tables(model: PreTrainedModel, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an expert's embedding puts out for every token, and a head that gives its logits, padded to a width; the bias."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    scale = getattr(model.config, "logit_scale", None) or 1 / (getattr(model.config, "logits_scaling", None) or 1)
    with torch.no_grad():
        rows, logits = embedding(torch.arange(embedding.num_embeddings)), scale * head.weight
    padded = [functional.pad(table, (0, width - table.shape[1])).clone() for table in (rows, logits)]
    return padded[0], padded[1], None if head.bias is None else head.bias.detach().clone()


def widths(model: PreTrainedModel) -> tuple[int, int]:
    """Of the input embedding and of what the head takes."""
    return model.get_input_embeddings().embedding_dim, model.get_output_embeddings().in_features


def config_of(experts: Sequence[PreTrainedModel], embedding: str, **changes: Any) -> dict[str, Any]:
    """What config.json says."""
    shared = embedding == "shared"
    return {
        "expert_configs": [model.config.to_dict() for model in experts],
        "expert_names": names(len(experts)),
        "vocab_size": VOCABULARY,
        "hidden_size": max(max(widths(model)) for model in experts),
        "embedding": embedding,
        "projectors": {"linear": True, "width": WIDTH} if shared else None,
        "head_bias": shared and any(model.get_output_embeddings().bias is not None for model in experts),
        **{key: _IDS[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **changes,
    }


def shared_tensors(experts: Sequence[PreTrainedModel], config: dict[str, Any], *, exact: bool) -> dict[str, Tensor]:
    """Embedding, head and projectors: the first expert's and exact, else drawn."""
    source = torch.Generator().manual_seed(5)
    width, linear = config["hidden_size"], config["projectors"]["linear"]

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=source)

    rows, head, bias = tables(experts[0], width)
    found = {"model.embed_tokens.weight": rows, "lm_head.weight": head}
    if config["head_bias"]:
        found["lm_head.bias"] = torch.zeros(VOCABULARY) if bias is None else bias
    for number, model in enumerate(experts):
        inner, outer = widths(model)
        for side, out, into in (("in", inner, width), ("out", width, outer)):
            prefix = f"model.projectors_{side}.{number}"
            parts = {"up": (WIDTH, into), "down": (out, WIDTH), **({"linear": (out, into)} if linear else {})}
            for part, shape in parts.items():
                weight, offset = draw(*shape), draw(shape[0])
                if exact and part != "up":
                    weight, offset = torch.eye(*shape) if part == "linear" else torch.zeros(shape), torch.zeros(shape[0])
                found |= {f"{prefix}.{part}.weight": weight, f"{prefix}.{part}.bias": offset}
    return found


def router(experts: Sequence[PreTrainedModel], config: dict[str, Any]) -> dict[str, Tensor]:
    """The gate, where the routing is learned."""
    if (config.get("routing") or {}).get("kind") != "learned":
        return {}
    inputs = config["hidden_size"] if config["embedding"] == "shared" else sum(widths(model)[0] for model in experts)
    return {"router.weight": torch.randn(len(experts), inputs, generator=torch.Generator().manual_seed(9))}


def mixed(
    *families: str | PreTrainedModel, embedding: str = "shared", exact: bool = False, **changes: Any
) -> MoergeHeterogeneousForCausalLM:
    """A model of these experts, one seed each; with `exact` every expert's path is that expert on the first one's tables."""
    experts = [expert(one, seed) if isinstance(one, str) else one for seed, one in enumerate(families)]
    config = config_of(experts, embedding, **changes)
    model = MoergeHeterogeneousForCausalLM(MoergeHeterogeneousConfig(**config)).eval()
    found = router(experts, config)
    for number, one in enumerate(experts):
        own = {name: tensor for name, tensor in one.state_dict().items() if embedding == "separate" or not is_table(name, one)}
        found |= {f"model.experts.{number}.{name}": tensor for name, tensor in own.items()}
    if embedding == "shared":
        found |= shared_tensors(experts, config, exact=exact)
    model.load_state_dict(found)
    return model


def write_by_hand(folder: Path, experts: Sequence[PreTrainedModel], embedding: str, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint as a merge writes it, from the experts' own checkpoints; its tensors."""
    config = config_of(experts, embedding, **changes)
    stored = router(experts, config)
    if embedding == "shared":
        stored |= shared_tensors(experts, config, exact=True)
    for number, one in enumerate(experts):
        one.save_pretrained(folder / str(number))
        config["expert_configs"][number] = json.loads((folder / str(number) / "config.json").read_text())
        for path in (folder / str(number)).glob("*.safetensors"):
            own = {name: tensor for name, tensor in load_file(path).items() if embedding == "separate" or not is_table(name, one)}
            stored |= {f"model.experts.{number}.{name}": tensor for name, tensor in own.items()}
    half = len(stored) // 2
    weight_map = {}
    for shard, chosen in enumerate((sorted(stored)[:half], sorted(stored)[half:]), start=1):
        file = f"model-{shard:05d}-of-00002.safetensors"
        save_file({name: stored[name].contiguous() for name in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    facts = {"model_type": "moerge_heterogeneous", "architectures": ["MoergeHeterogeneousForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**config, **facts, "auto_map": HETEROGENEOUS_AUTO_MAP}))
    return stored


def positions(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """Positions that do not count padding, where a model takes any."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}
