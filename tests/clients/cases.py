"""The checkpoints that the clients are asked to run: the demo's merged models, and small random MoEs in every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import protocol

import moerge

PROMPT_TOKENS = 40
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}


@dataclass(frozen=True)
class Random:
    """Three random experts of `config(**SIZES, **changes)` near a random base, merged into a MoE as `moe` says, or averaged."""

    name: str
    config: str
    moe: dict[str, Any] | None
    changes: dict[str, Any]
    dtype: str = "float32"


RANDOM = (
    Random("mixtral", "LlamaConfig", {"format": "mixtral"}, {}),
    Random("mixtral, tied", "LlamaConfig", {"format": "mixtral"}, {"tie_word_embeddings": True}),
    Random("mixtral, sliding window", "MistralConfig", {"format": "mixtral"}, {"sliding_window": 16}),
    Random("mixtral, bfloat16", "LlamaConfig", {"format": "mixtral"}, {}, "bfloat16"),
    Random("mixtral, float16", "LlamaConfig", {"format": "mixtral"}, {}, "float16"),
    Random("qwen2_moe", "Qwen2Config", {"format": "qwen2_moe"}, {}),
    Random("qwen2_moe, all experts", "Qwen2Config", {"format": "qwen2_moe", "top_k": 4}, {}),
    Random("qwen2_moe, tied", "Qwen2Config", {"format": "qwen2_moe"}, {"tie_word_embeddings": True}),
    Random("qwen3_moe", "Qwen3Config", {"format": "qwen3_moe"}, {"head_dim": 32}),
    Random("qwen3_moe, tied", "Qwen3Config", {"format": "qwen3_moe"}, {"head_dim": 32, "tie_word_embeddings": True}),
    Random("granitemoe", "GraniteConfig", {"format": "granitemoe"}, GRANITE),
    Random("flex_olmo", "Olmo2Config", {"format": "flex_olmo"}, {}),
    Random("moerge", "LlamaConfig", {"format": "moerge"}, {}),
    Random("dense mistral", "MistralConfig", None, {"sliding_window": None}),
    Random("dense qwen2", "Qwen2Config", None, {}),
    Random("dense qwen3", "Qwen3Config", None, {"head_dim": 32}),
    Random("dense olmo2", "Olmo2Config", None, {}),
    Random("dense granite", "GraniteConfig", None, GRANITE),
    Random("dense gemma", "GemmaConfig", None, {"head_dim": 32}),
    Random("dense gemma2", "Gemma2Config", None, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    Random("dense gemma3_text", "Gemma3TextConfig", None, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    Random("dense phi3", "Phi3Config", None, {}),
    Random("dense gpt_neox", "GPTNeoXConfig", None, {}),
    Random("dense gpt2", "GPT2Config", None, {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 256}),
)


def write_cases(demo: Path, folder: Path) -> Iterator[protocol.Case]:
    """Every case, with prompts from the demo's held-out texts."""
    texts = [text for domain in ("general", "math", "code", "knowledge") for text in heldout(demo / "text" / domain)[:2]]
    for merged in ("ties-moe", "ties-dense"):
        recipe = demo / "recipes" / f"{merged}.yaml"
        yield write_case(folder, f"demo {merged}", texts, demo, lambda out, recipe=recipe: moerge.merge(recipe, out))
    for random in RANDOM:
        yield write_case(folder, f"random {random.name}", texts, demo, lambda out, random=random: merge(random, demo, out))


def heldout(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "heldout.jsonl").read_text().splitlines()]


def write_case(folder: Path, name: str, texts: list[str], demo: Path, make: Callable[[Path], object]) -> protocol.Case:
    """A case's folder; `make` writes the checkpoint."""
    from transformers import AutoTokenizer

    case = folder / name.replace(",", "").replace(" ", "-")
    if not (case / "case.json").exists():
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        make(case / "model")
        tokenizer = AutoTokenizer.from_pretrained(demo / "models" / "base")
        prompts = [tokenizer.encode(text, add_special_tokens=False)[:PROMPT_TOKENS] for text in texts]
        stored = {"name": name, "texts": [tokenizer.decode(prompt) for prompt in prompts], "prompts": prompts}
        (case / "case.json").write_text(json.dumps(stored))
    return protocol.read_case(case)


def merge(random: Random, demo: Path, out: Path) -> None:
    section = {"moe": {"top_k": 2, **random.moe}} if random.moe is not None else {}
    models = out.parent / "experts"
    config, experts = dense_config(random), {}
    base = save(config, models / "base", 0, random.dtype, demo)
    for index in range(3):
        save(config, models / f"expert{index}", index + 1, random.dtype, demo, near=base)
        experts[f"expert{index}"] = str(models / f"expert{index}")
    moerge.merge({"base": str(models / "base"), "experts": experts, **section}, out)


def dense_config(random: Random) -> Any:
    import transformers

    sizes = {key: size for key, size in SIZES.items() if not (key == "num_key_value_heads" and "GPT" in random.config)}
    return getattr(transformers, random.config)(**{**sizes, **random.changes})


def save(config: Any, folder: Path, seed: int, dtype: str, demo: Path, *, near: Any = None) -> Any:
    """A model whose every weight is random, with the demo's tokenizer; `near` another one if that is given.

    Weights are large enough for the probabilities to be far from uniform.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        start = near[name] if near is not None else torch.zeros_like(tensor) + ("norm" in name)
        scale = 0.3 if "embed" in name or "lm_head" in name else 0.15
        tensor.copy_(start + torch.randn_like(tensor) * (0.3 * scale if near is not None else scale))
    model.tie_weights()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(demo / "models" / "base").save_pretrained(folder)
    return state
