"""Reduce a mixture of random weights that may be larger than the memory, and measure time and peak anonymous memory.

    python benchmarks/reducing.py --gigabytes 30 --work DIR

The mixture has the layers of Qwen3-30B-A3B: 128 experts of 768 neurons at a width of 2048, as many layers as the size asks for.
It is kept in DIR; what is written from it is not.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from checkpoints import VOCABULARY, add_tokenizer
from processes import run

from moerge.architecture.config import normalized_config
from moerge.architecture.families.qwen_moe import QWEN3_MOE
from moerge.architecture.family import ExpectedTensor, expected_tensors
from moerge.checkpoint.header import build_header
from moerge.checkpoint.staging import assign_shards
from moerge.tensors.codec import encode
from moerge.tensors.dtypes import BF16
from moerge.tensors.spec import TensorSpec

SHARD_BYTES, BLOCK = 4_000_000_000, 1 << 22
WAYS: dict[str, dict[str, Any]] = {
    "pruned": {},
    "pruned, fitted router": {"router": "fit"},
    "folded": {"merge": "average"},
}


def main() -> None:
    """Write the mixture, reduce it in every way, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=30.0)
    parser.add_argument("--experts", type=int, default=96, help="that stay, of 128")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["pruned"])
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    model = write_mixture(options.work / f"{options.gigabytes:g}GB", options.gigabytes)
    rng = np.random.default_rng(0)
    lines = [{"text": " ".join(chr(97 + n) for n in rng.integers(0, 26, options.tokens))} for _ in range(options.texts)]
    (options.work / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for way in options.ways:
        print(json.dumps({"way": way, "bytes": size_of(model), **reduce(model, options, WAYS[way])}), flush=True)


def config_of(layers: int) -> dict[str, Any]:
    """config.json of so many layers."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def tensors_of(config: dict[str, Any]) -> list[ExpectedTensor]:
    """All tensors of the model."""
    return expected_tensors(QWEN3_MOE, normalized_config(config, QWEN3_MOE))


def write_mixture(folder: Path, gigabytes: float) -> Path:
    """The mixture, unless it is there. Every block is a part of the same random numbers, from another place on."""
    if (folder / "config.json").exists():
        return folder
    one, two = (sum(math.prod(t.shape) for t in tensors_of(config_of(n))) * BF16.itemsize for n in (1, 2))
    config = config_of(max(1, round((gigabytes * 1e9 - 2 * one + two) / (two - one))))
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal(3 * BLOCK, np.float32) * np.float32(0.02)
    random_N, ones_N = np.empty(noise.size, BF16.storage), np.empty(1 << 16, BF16.storage)
    encode(noise, BF16, random_N)
    encode(np.ones(ones_N.size, np.float32), BF16, ones_N)
    specs = [TensorSpec(tensor.name, tensor.role, BF16, tensor.shape) for tensor in tensors_of(config)]
    shards = assign_shards(specs, SHARD_BYTES)
    for file, outputs in shards.items():
        header, _ = build_header([(spec.name, BF16, spec.shape) for spec in outputs], {"format": "pt"})
        with open(folder / file, "wb") as opened:
            opened.write(header)
            for number, spec in enumerate(outputs):
                for start in range(0, spec.size, BLOCK):
                    place = (7919 * number + start) % (2 * BLOCK)
                    source = ones_N if "norm" in spec.role else random_N[place:]
                    opened.write(source[: min(BLOCK, spec.size - start)].data)
    weight_map = {spec.name: file for file, outputs in shards.items() for spec in outputs}
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    add_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def size_of(folder: Path) -> int:
    """Bytes of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def reduce(model: Path, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the command in a process of its own; what it wrote is removed."""
    out, recipe = options.work / "reduced", options.work / "reduce.yaml"
    whole = {"experts": options.experts, "texts": options.texts, "tokens": options.tokens, "similarity_tokens": 256, **settings}
    written = {
        "model": str(model.absolute()),
        "reduce": whole,
        "calibration": {"random": str((options.work / "text.jsonl").absolute())},
    }
    recipe.write_text(yaml.safe_dump(written))
    for folder in (out, Path(f"{out}.statistics")):
        shutil.rmtree(folder, ignore_errors=True)
    finished = run([sys.executable, "-m", "moerge", "reduce", recipe, out, "--json", "--quiet"])
    result = size_of(out)
    for folder in (out, Path(f"{out}.statistics")):
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "result_bytes": result,
        "seconds": round(finished.seconds, 1),
        "cpu_seconds": round(finished.cpu_seconds, 1),
        "peak_anonymous_bytes": finished.peak_anonymous_bytes,
        "tokens": json.loads(finished.stdout)["tokens"]["random"],
    }


if __name__ == "__main__":
    main()
