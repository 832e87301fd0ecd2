"""Tiny real models of different architectures, widths, depths and tokenizers, as experts that stay whole models.

models = make_mixed(tmp_path)                          # tmp_path/llama, olmo2, gpt_neox, qwen2: each with its own tokenizer
recipe = write_mixed(tmp_path, embedding="separate")   # a recipe beside them, these keys under moe
model = make_model(tmp_path / "gemma2", FAMILIES["gemma2"](), vocabulary=300, seed=3)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import moerge
from tests.helpers.hf_models import FAMILIES, random_model
from tests.helpers.tiny import write_json

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

MIXED: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (300, {"hidden_size": 32}),
    "olmo2": (280, {"hidden_size": 24, "num_hidden_layers": 3}),
    "gpt_neox": (330, {"hidden_size": 48, "num_hidden_layers": 1}),
    "qwen2": (310, {"hidden_size": 40, "tie_word_embeddings": True}),
}
"""By model type: tokens of its tokenizer, and what its config changes."""

WORDS = (
    "the",
    "merged",
    "model",
    "reads",
    "a",
    "sum",
    "of",
    "two",
    "numbers",
    "and",
    "writes",
    "what",
    "follows",
    "from",
    "them",
)
TEXT = "the sum of two numbers follows from what the model reads and writes"


def _texts(seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (40, 9), generator=generator).tolist()
    return [" ".join(WORDS[pick] for pick in row) + "." for row in picks]


@cache
def _trained(size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        _texts(size), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    )
    return str(tokenizer.to_str())


def write_bpe(folder: Path, size: int) -> int:
    """A byte-level BPE tokenizer of at most `size` tokens, trained on a text of its own; how many it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_trained(size), encoding="utf-8")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return size


def make_model(folder: Path, config: Any, *, vocabulary: int, seed: int = 0, dtype: Any = None) -> Path:
    """A random model of this config with a tokenizer of so many tokens."""
    transformers.utils.logging.disable_progress_bar()
    config.vocab_size = write_bpe(folder, vocabulary)
    random_model(config, seed, dtype=dtype).save_pretrained(folder)
    return folder


def make_mixed(folder: Path, *names: str) -> dict[str, Path]:
    """The models of MIXED, or those of these names."""
    found = {}
    for seed, (name, (vocabulary, changes)) in enumerate(MIXED.items()):
        if not names or name in names:
            found[name] = make_model(folder / name, FAMILIES[name](**changes), vocabulary=vocabulary, seed=seed)
    return found


def atomic_write(
    folder: Path, experts: Any = tuple(MIXED), *, name: str = "recipe.yaml", moe: Any = None, **sections: Any
) -> Path:
    """A recipe beside models, which stay whole; `moe` are keys of its section."""
    experts = dict(experts) if isinstance(experts, dict) else {expert: expert for expert in experts}
    recipe = {"experts": experts, "moe": {"format": "moerge", "router": {"kind": "uniform"}, **(moe or {})}, **sections}
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def built(folder: Path, out: Path, experts: Any = tuple(MIXED), **sections: Any) -> Path:
    """A merge by the command, verified."""
    result = moerge("merge", atomic_write(folder, experts, **sections), out)
    assert result.code == 0, result.err
    checked = moerge("verify", out, "--json")
    assert checked.json["intact"], checked.out
    return out


def ids_of(folder: Path, text: str = TEXT) -> Any:
    """The tokens of a text, [1, T]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([tokenizer(text)["input_ids"]])
