"""Tiny real checkpoints for tests: a base and experts of the Llama family that transformers loads, written without torch.

    models = make_models(tmp_path)                       # tmp_path/base, math, code, knowledge
    recipe = write_recipe(tmp_path, merge={"method": "ties"})
    make_models(tmp_path, dtype=lambda name: "F32" if "norm" in name else "BF16", shards=3, tied=True)
    edit_config(models["code"], rope_theta=5e5)          # damage one of them
    write_checkpoint(folder, {**llama_tensors(config, seed=7), "extra": np.zeros(3, np.int64)}, config)

Values depend on the seed and the tensor's name alone. Float arrays are float32 here and are stored as `dtype` says; integer
and bool arrays are stored as they are. `read_tensors` gives the stored bits back, `read_values` float32.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moerge.checkpoint.header import StoredTensor, build_header, read_header
from moerge.tensors.dtypes import DTYPES, DType

EXPERTS = ("math", "code", "knowledge")
VOCABULARY = 64
DTypeOf = str | Callable[[str], str]
Tensors = Mapping[str, np.ndarray]


def llama_config(**changes: Any) -> dict[str, Any]:
    """config.json of a two-layer Llama with grouped queries; `changes` replace or add keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **changes,
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with this config and its shape, in the model's order."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    ffn = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for module, parts, biased in (
            ("self_attn", attention, config.get("attention_bias")),
            ("mlp", ffn, config.get("mlp_bias")),
        ):
            for part, shape in parts.items():
                shapes[f"model.layers.{layer}.{module}.{part}_proj.weight"] = shape
                if biased:
                    shapes[f"model.layers.{layer}.{module}.{part}_proj.bias"] = shape[:1]
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def llama_tensors(config: Mapping[str, Any], *, seed: int = 0, expert: int | None = None) -> dict[str, np.ndarray]:
    """float32 weights of the base with this seed, or of its expert number `expert`: the base plus something smaller."""

    def draw(name: str, shape: tuple[int, ...], stream: int) -> np.ndarray:
        rng = np.random.default_rng([seed, stream, zlib.crc32(name.encode())])
        return rng.standard_normal(shape, dtype=np.float32)

    tensors = {}
    for name, shape in llama_shapes(config).items():
        tensors[name] = 0.1 * draw(name, shape, 0) + np.float32("norm" in name)
        if expert is not None:
            tensors[name] = tensors[name] + np.float32(0.01) * draw(name, shape, 1 + expert)
    return tensors


def make_models(
    folder: Path,
    *,
    experts: Sequence[str] = EXPERTS,
    base: bool = True,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeOf = "BF16",
    shards: int = 1,
    tied: bool = False,
    tokenizer: bool = True,
    seed: int = 0,
) -> dict[str, Path]:
    """Write `folder/base` and a folder for each expert; the folders by model name.

    `config` are changes to `llama_config`. An expert's weights do not depend on the other experts.
    """
    whole = llama_config(**{"tie_word_embeddings": tied, **(config or {})})
    folders = {}
    for index, name in enumerate((["base"] if base else []) + list(experts)):
        tensors = llama_tensors(whole, seed=seed, expert=None if name == "base" else index - base)
        folders[name] = write_checkpoint(folder / name, tensors, whole, dtype=dtype, shards=shards, tokenizer=tokenizer)
    return folders


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: DTypeOf = "BF16",
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """An ordinary Hugging Face folder with these tensors, in `shards` files with an index if more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config if config is not None else llama_config())
    if tokenizer:
        write_tokenizer(folder)
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype=dtype)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype=dtype)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_safetensors(path: Path, tensors: Tensors, *, dtype: DTypeOf = "BF16") -> None:
    """One safetensors file, tensors in the order given, wide elements first."""
    types = {name: _stored_type(array, dtype(name) if callable(dtype) else dtype) for name, array in tensors.items()}
    names = sorted(tensors, key=lambda name: -types[name].itemsize)
    header, _ = build_header([(name, types[name], tensors[name].shape) for name in names], {"format": "pt"})
    path.write_bytes(header + b"".join(encode(tensors[name], types[name]).tobytes() for name in names))


def _stored_type(array: np.ndarray, wanted: str) -> DType:
    if array.dtype.kind == "f":
        return DTYPES[wanted]
    return DTYPES["BOOL" if array.dtype.kind == "b" else f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}"]


def encode(array: np.ndarray, dtype: DType) -> np.ndarray:
    """An array in the storage type of `dtype`; bfloat16 rounds to nearest even."""
    if dtype.name != "BF16":
        return array.astype(dtype.storage)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def decode(stored: np.ndarray, dtype: DType) -> np.ndarray:
    """Stored elements as float32 where they are floats."""
    if dtype.name == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32) if dtype.is_float else stored


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Stored bits of every tensor in a checkpoint folder by name, in its shape (bfloat16 as uint16)."""
    return {tensor.name: array for tensor, array in _stored(folder)}


def read_values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in a checkpoint folder as float32."""
    return {tensor.name: decode(array, tensor.dtype) for tensor, array in _stored(folder)}


def _stored(folder: Path) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in read_header(path).values():
            array = np.fromfile(path, tensor.dtype.storage, count=tensor.size, offset=tensor.offset)
            yield tensor, array.reshape(tensor.shape)


def write_tokenizer(folder: Path, tokens: Sequence[str] | None = None) -> None:
    """tokenizer.json of whole words (VOCABULARY of them by default), its config, and a generation config."""
    tokens = tokens or ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    special = [
        {
            "id": i,
            "content": tokens[i],
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in range(3)
    ]
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {token: index for index, token in enumerate(tokens)},
                "unk_token": tokens[0],
            },
        },
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token"), tokens, strict=False))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def write_recipe(
    folder: Path, name: str = "recipe.yaml", *, experts: Any = None, base: str | None = "base", **sections: Any
) -> Path:
    """A recipe beside the models of `make_models(folder)`; `sections` are its other top-level keys, as in the file."""
    experts = {expert: expert for expert in EXPERTS} if experts is None else experts
    if not isinstance(experts, Mapping):
        experts = {expert: expert for expert in experts}
    recipe = {**({"base": base} if base else {}), "experts": dict(experts), **sections}
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes a key."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})
