"""Models that do not go together: refused with the key or tensor that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moerge import plan
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import (
    edit_config,
    llama_config,
    llama_tensors,
    make_models,
    read_tensors,
    write_checkpoint,
    write_recipe,
    write_tokenizer,
)

ROPE_OF_TRANSFORMERS_5 = {"rope_type": "default", "rope_theta": 10000.0}


def _config(**changes: object) -> Callable[[Path], None]:
    return lambda code: edit_config(code, **changes)


def _tensors(**changes: np.ndarray | None) -> Callable[[Path], None]:
    def write(code: Path) -> None:
        tensors = {**llama_tensors(llama_config()), **{name.replace("__", "."): array for name, array in changes.items()}}
        write_checkpoint(code, {name: array for name, array in tensors.items() if array is not None})

    return write


def _bias(code: Path) -> None:
    write_checkpoint(code, llama_tensors(llama_config(attention_bias=True)))


def _bias_and_config(code: Path) -> None:
    config = llama_config(attention_bias=True)
    write_checkpoint(code, llama_tensors(config), config)


def _deeper(code: Path) -> None:
    config = llama_config(num_hidden_layers=3)
    write_checkpoint(code, llama_tensors(config), config)


def _tokens(code: Path) -> None:
    write_tokenizer(code, ["<unk>", "<s>", "</s>", "new", *(f"w{i}" for i in range(4, 64))])


def _other_order(code: Path) -> None:
    write_tokenizer(code, ["<unk>", "<s>", "</s>", "w4", "w3", *(f"w{i}" for i in range(5, 64))])


def _other_roles(code: Path) -> None:
    write_tokenizer(code, ["<unk>", "</s>", "<s>", *(f"w{i}" for i in range(3, 64))])


NOT_A_SIZE = "config.json: {} should be a positive whole number, not {}"
SHAPE = "config.json: these models do not have the same shape: "
BAD: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "family": (_config(model_type="mistral"), ["code is of type 'mistral', base of type 'llama'", "one architecture"]),
    "quantised": (_config(quantization_config={"bits": 4}), ["code: ", "is quantised", "merge the unquantised checkpoint"]),
    "heads": (_config(num_attention_heads=2), [SHAPE, "num_attention_heads (base: 4, math: 4, code: 2, knowledge: 4)"]),
    "kv heads": (_config(num_key_value_heads=4), [SHAPE + "num_key_value_heads (base: 2, math: 2, code: 4, knowledge: 2)"]),
    "layers": (_deeper, [SHAPE + "num_hidden_layers (base: 2, math: 2, code: 3, knowledge: 2)"]),
    "vocabulary size": (_config(vocab_size=65), ["code: tensor 'lm_head.weight' has shape [64, 16], expected [65, 16]"]),
    "vocabulary size garbled": (_config(vocab_size="65"), [SHAPE + "vocab_size (base: 64, math: 64, code: '65', knowledge: 64)"]),
    "bias in the config": (_bias_and_config, [SHAPE + "attention_bias (base: False, math: False, code: True"]),
    "rope theta": (
        _config(rope_theta=5e5),
        [
            "config.json differs in what changes results: rope_theta (base: 10000.0, math: 10000.0, code: 500000.0",
            "'config: base'",
        ],
    ),
    "rope theta of transformers 5": (
        _config(rope_theta=None, rope_parameters={**ROPE_OF_TRANSFORMERS_5, "rope_theta": 5e5}),
        ["rope_theta (base: 10000.0", "code: 500000.0"],
    ),
    "rope scaling": (_config(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling (base: None", "'factor': 2.0"]),
    "context length": (_config(max_position_embeddings=4096), ["max_position_embeddings (base: 128, math: 128, code: 4096"]),
    "epsilon": (_config(rms_norm_eps=1e-5), ["rms_norm_eps (base: 1e-06, math: 1e-06, code: 1e-05"]),
    "rope scaling garbled": (_config(rope_scaling="x"), ["code: config.json: rope_scaling should be a mapping, not 'x'"]),
    "a size as text": (_config(hidden_size="16"), [SHAPE, "hidden_size (base: 16, math: 16, code: '16'"]),
    "tokens": (_tokens, ['the vocabularies of base and code differ: only base has "w3"; only code has "new"; say whose tokens']),
    "token order": (_other_order, ['the vocabularies of base and code differ: "w3", "w4" have other ids; say whose tokens']),
    "token roles": (
        _other_roles,
        ["'</s>' is the eos_token of base and the bos_token of code: name the model whose special tokens the result has"],
    ),
    "tokenizer garbled": (lambda code: (code / "tokenizer.json").write_text('{"model": null}'), ["tokenizer.json is damaged"]),
    "shape": (
        _tensors(lm_head__weight=np.zeros((63, 16), np.float32)),
        ["code: tensor 'lm_head.weight' has shape [63, 16], expected [64, 16]"],
    ),
    "missing tensor": (
        _tensors(model__norm__weight=None),
        ["tensor 'model.norm.weight' is in base, math, knowledge but not in code: merging would drop it"],
    ),
    "bias without config": (
        _bias,
        ["tensor 'model.layers.0.self_attn.k_proj.bias' is in code but not in base, math, knowledge: merging would drop it"],
    ),
    "integers for floats": (
        _tensors(model__norm__weight=np.zeros(16, np.int64)),
        ["tensor 'model.norm.weight' is stored as BF16 in base but as I64 in code"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_models_that_do_not_match(tmp_path: Path, case: str) -> None:
    damage, parts = BAD[case]
    models = make_models(tmp_path)
    damage(models["code"])
    refuses(write_recipe(tmp_path), tmp_path / "out", *parts)


GARBLED = [
    ("hidden_size", -1),
    ("num_attention_heads", 0),
    ("num_hidden_layers", "two"),
    ("vocab_size", [64]),
    ("hidden_size", True),
]


@pytest.mark.parametrize(("key", "value"), [*GARBLED, ("num_key_value_heads", 1.5), ("intermediate_size", None)])
def test_sizes_that_are_none(tmp_path: Path, key: str, value: object) -> None:
    for folder in make_models(tmp_path).values():
        edit_config(folder, **{key: value})
    refuses(write_recipe(tmp_path), tmp_path / "out", "base: " + NOT_A_SIZE.format(key, repr(value)))


def test_a_config_with_a_billion_layers(tmp_path: Path) -> None:
    for folder in make_models(tmp_path).values():
        edit_config(folder, num_hidden_layers=10**9)
    refuses(write_recipe(tmp_path), tmp_path / "out", "base: config.json: num_hidden_layers is 1,000,000,000, which no model has")


def test_a_config_that_calls_for_more_than_the_folders_have(tmp_path: Path) -> None:
    for folder in make_models(tmp_path).values():
        edit_config(folder, num_hidden_layers=3)
    refuses(
        write_recipe(tmp_path), tmp_path / "out", "base: tensor 'model.layers.2.input_layernorm.weight' is missing in", "/base"
    )


def test_naming_the_config_settles_a_difference(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    edit_config(models["code"], rope_theta=5e5, max_position_embeddings=4096)
    result = moerge("merge", write_recipe(tmp_path, config="code"), tmp_path / "out")
    assert result.code == 0
    assert "warning: config.json differs, code's is used: max_position_embeddings (base: 128, " in result.err
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (merged["rope_theta"], merged["max_position_embeddings"]) == (5e5, 4096)
    assert merged["rope_parameters"]["rope_theta"] == 5e5


def test_a_named_config_does_not_settle_a_difference_in_shape(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    edit_config(models["code"], num_attention_heads=2)
    refuses(write_recipe(tmp_path, config="code"), tmp_path / "out", SHAPE, "num_attention_heads")


@pytest.mark.parametrize(
    "same",
    [
        {"rope_theta": None, "rope_parameters": ROPE_OF_TRANSFORMERS_5},
        {"rope_theta": None},  # Llama's default
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"head_dim": 4},
        {"transformers_version": "5.23.0", "torch_dtype": "float32", "use_cache": False, "eos_token_id": [2, 3]},
    ],
    ids=str,
)
def test_ways_to_write_the_same_config(tmp_path: Path, same: dict[str, object]) -> None:
    models = make_models(tmp_path)
    edit_config(models["code"], **same)
    assert moerge("plan", write_recipe(tmp_path)).err == ""


def test_the_same_vocabulary_written_differently(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    tokenizer = json.loads((models["code"] / "tokenizer.json").read_text())
    (models["code"] / "tokenizer.json").write_text(json.dumps({**tokenizer, "padding": {"strategy": "BatchLongest"}}))
    assert moerge("plan", write_recipe(tmp_path)).err == ""


def test_models_without_a_tokenizer(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models["code"] / "tokenizer.json").unlink()
    recipe = write_recipe(tmp_path)
    assert moerge("plan", recipe).err == "warning: code: no tokenizer, assumed to be that of base\n"
    for folder in models.values():
        (folder / "tokenizer.json").unlink(missing_ok=True)
    assert moerge("plan", recipe).err == "warning: no model has a tokenizer: the merged checkpoint will have none either\n"


def test_an_unknown_model_type_is_merged_by_name(tmp_path: Path) -> None:
    config = {"model_type": "novel", "hidden_size": [1, 2], "num_attention_heads": "many"}
    for index, name in enumerate(("base", "math", "code")):
        tensors = {"a.weight": np.full((2, 3), index, np.float32), "b": np.full(5, -index, np.float32)}
        write_checkpoint(tmp_path / name, tensors, config, dtype="F32")
    result = moerge("merge", write_recipe(tmp_path, experts=("math", "code")), tmp_path / "out")
    assert (result.code, "warning: unknown model type 'novel': merged by tensor name" in result.err) == (0, True)
    merged = read_tensors(tmp_path / "out")
    assert merged["a.weight"].tolist() == [[1.5] * 3] * 2
    assert merged["b"].tolist() == [-1.5] * 5


def test_integers_scalars_and_empty_tensors(tmp_path: Path) -> None:
    for index, folder in enumerate(make_models(tmp_path).values()):
        extra = {
            "ids": np.arange(5) + index,
            "flags": np.array([index == 0, True]),
            "scalar": np.float32(index),
            "empty": np.zeros((0, 4), np.float32),
        }
        write_checkpoint(folder, {**llama_tensors(llama_config()), **extra}, dtype="F32")
    for method in ("average", "ties", "dare"):
        result = moerge("merge", write_recipe(tmp_path, merge={"method": method}), tmp_path / method)
        assert result.code == 0, result.err
        assert "4 tensors that llama does not use are merged by name: " in result.err
        merged = read_tensors(tmp_path / method)
        assert merged["ids"].tolist() == [0, 1, 2, 3, 4]  # copied from the base, whose config it is
        assert merged["ids"].dtype == np.int64
        assert merged["flags"].tolist() == [True, True]
        assert merged["empty"].shape == (0, 4)
        assert merged["scalar"].shape == ()
    assert read_tensors(tmp_path / "average")["scalar"] == 2
    assert moerge("verify", tmp_path / "average").code == 0


def test_a_moe_has_no_place_for_extra_tensors(tmp_path: Path) -> None:
    for folder in make_models(tmp_path).values():
        write_checkpoint(folder, {**llama_tensors(llama_config()), "extra": np.zeros(3, np.float32)})
    refuses(write_recipe(tmp_path, moe={}), tmp_path / "out", "cannot build a mixtral model: it has no place for tensor 'extra'")


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    for folder in models.values():
        write_tokenizer(folder, ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 64)), "late"])
    (warning,) = (text for text in plan(write_recipe(tmp_path)).warnings if "rows" in text)
    assert all(part in warning for part in ("base", "64 rows", "'late'")), warning
