"""Random checkpoints in the shape of a real model, written once and kept: for speed, not for quality."""

from __future__ import annotations

import itertools
import json
import os
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moerge.architecture.config import normalized_config
from moerge.architecture.families.llama import LLAMA
from moerge.architecture.family import expected_tensors
from moerge.checkpoint.header import build_header
from moerge.tensors.codec import encode
from moerge.tensors.dtypes import BF16

NAMES = ("base", "math", "code", "knowledge")
VOCABULARY = 32000
BLOCK = 1 << 22
SHAPES = {
    "0.02B": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "heads": (4, 2)},
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "heads": (12, 4)},
    "0.2B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 32, "heads": (12, 4)},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "heads": (16, 4)},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": (32, 4)},
    "2.2B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 47, "heads": (32, 4)},
}
"""1.1B is TinyLlama's shape; 2.2B is that with more layers, twice the parameters in all."""
TWICE = {"0.02B": "0.1B", "0.1B": "0.2B", "0.5B": "1.1B", "1.1B": "2.2B"}
"""For each size one with at least twice the parameters."""


def config_of(size: str) -> dict[str, object]:
    shape = dict(SHAPES[size])
    heads, kv_heads = shape.pop("heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **shape,
    }


def make(folder: Path, size: str, threads: int) -> dict[str, Path]:
    """Checkpoints of `size` under `folder`: the base at random, the experts a small random step away from it.

    Finished ones are kept. A block of values depends on its tensor, its place and its expert alone.
    """
    config = config_of(size)
    paths = {name: folder / size / name for name in NAMES}
    missing = {name: path for name, path in paths.items() if not (path / "config.json").exists()}
    tensors = expected_tensors(LLAMA, normalized_config(config, LLAMA))
    header, offsets = build_header([(t.name, BF16, t.shape) for t in tensors], {"format": "pt"})
    files = {}
    for name, path in missing.items():
        path.mkdir(parents=True, exist_ok=True)
        files[name] = os.open(path / "model.safetensors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.pwrite(files[name], header, 0)

    def write(task: tuple[int, int, int]) -> None:
        number, start, count = task
        for name, encoded in _values(number, start, count, tuple(files)):
            os.pwrite(files[name], encoded, offsets[tensors[number].name] + start * BF16.itemsize)

    sizes = [int(np.prod(tensor.shape)) for tensor in tensors] if missing else []
    tasks = [(i, start, min(BLOCK, n - start)) for i, n in enumerate(sizes) for start in range(0, n, BLOCK)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, tasks))
    for name, descriptor in files.items():
        os.close(descriptor)
        (paths[name] / "config.json").write_text(json.dumps(config, indent=2))
    for path in paths.values():
        add_tokenizer(path)
    return paths


def _values(tensor: int, start: int, count: int, names: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    base = np.random.default_rng([tensor, start, 0]).standard_normal(count, np.float32) * np.float32(0.02)
    for name in names:
        values = base
        if expert := NAMES.index(name):
            values = np.random.default_rng([tensor, start, expert]).standard_normal(count, np.float32)
            values *= np.float32(0.002)
            values += base
        encoded = np.empty(count, BF16.storage)
        encode(values, BF16, encoded)
        yield name, encoded


def add_tokenizer(path: Path) -> None:
    """A byte-pair tokenizer of the usual size: mergekit-moe insists on one, and everyone has to read and copy it."""
    if (path / "tokenizer.json").exists():
        return
    special = ["<unk>", "<s>", "</s>"]
    letters = string.ascii_lowercase
    words = itertools.chain.from_iterable(itertools.product(letters, repeat=length) for length in (1, 2, 3, 4))
    texts = ["".join(word) for word in itertools.islice(words, VOCABULARY - len(special))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, text in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {text: i for i, text in enumerate([*special, *texts])},
            "merges": [[text[:-1], text[-1]] for text in texts if len(text) > 1],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
