"""Recipes and models that cannot be made into a model of whole models: one clear sentence each, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.reader import INDEX
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import edit_config, make_models, read_values, write_checkpoint, write_json, write_recipe
from tests.helpers.whole_models import atomic_write, make_mixed

pytestmark = pytest.mark.slow

MOE = {"format": "moerge", "projectors": "fitted", "router": {"kind": "uniform"}}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    make_mixed(folder, "llama", "gpt_neox")
    return folder


@pytest.fixture
def two(tmp_path: Path, mixed: Path) -> Path:
    """The models of `mixed`, to be damaged."""
    import shutil

    for name in ("llama", "gpt_neox"):
        shutil.copytree(mixed / name, tmp_path / name)
    return tmp_path


def refused(folder: Path, *parts: str, moe: Any = None, experts: Any = ("llama", "gpt_neox"), **sections: Any) -> str:
    return refuses(atomic_write(folder, experts, moe=moe, **sections), folder / "out", *parts)


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "misspelled": ({"moe": {**MOE, "projector": "fitted"}}, "line 9: moe.projector: unknown key, did you mean 'projectors'?"),
    "kind": ({"moe": {**MOE, "projectors": "trained"}}, "line 6: moe.projectors should be 'fitted' or 'random', not 'trained'"),
    "embedding": ({"moe": {**MOE, "embedding": "own"}}, "moe.embedding should be 'shared' or 'separate', not 'own'"),
    "route_on": ({"moe": {**MOE, "route_on": "prompt"}}, "moe.route_on should be 'prefix' or 'sequence', not 'prompt'"),
    "prefix": ({"moe": {**MOE, "prefix_tokens": 0}}, "moe.prefix_tokens should be greater than or equal to 1, not 0"),
    "mix": ({"moe": {**MOE, "mix": "layer"}}, "moe.mix is about parts of experts of one architecture"),
    "parts": ({"moe": {**MOE, "separate": ["ffn"]}}, "moe.separate is about parts of experts of one architecture"),
    "nothing to project": (
        {"moe": {**MOE, "embedding": "separate"}},
        "moe.projectors has no effect with 'embedding: separate', which needs none: remove one of the two",
    ),
    "both": (
        {"moe": {**MOE, "router": {"kind": "perplexity"}, "route_on": "sequence", "prefix_tokens": 8}},
        "moe.prefix_tokens has no effect with 'route_on: sequence': remove one of the two",
    ),
    "nothing to read": ({"moe": {**MOE, "route_on": "prefix"}}, "moe.route_on has no effect on 'uniform' routing"),
    "task vectors": ({"moe": {**MOE, "router": {"kind": "task_vector"}}}, "task_vector compares experts of one architecture"),
    "method": (
        {"moe": MOE, "merge": {"method": "ties"}},
        "merge.method: embedding and head of experts that stay whole models are averaged, so 'ties' does not apply: "
        "choose one of average, linear",
    ),
    "overrides": ({"moe": MOE, "merge": {"overrides": [{"match": "norm"}]}}, "merge.overrides: experts that stay whole models"),
    "learn": ({"moe": MOE, "learn": {}}, "learn: experts that stay whole models have no coefficients to learn: remove 'learn'"),
    "config": ({"moe": MOE, "config": "math"}, "config: experts that stay whole models keep a config each: remove 'config'"),
    "union": ({"moe": MOE, "tokenizer": "union"}, "tokenizer: experts that stay whole models share the tokenizer of one model"),
    "top_k": ({"moe": {**MOE, "top_k": 3, "router": {"kind": "perplexity"}}}, "moe.top_k is 3, but there are only 2 experts"),
    "native": ({"moe": {"embedding": "shared"}}, "moe.embedding is for models that route whole sequences: use 'format: moerge'"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_key_that_does_not_go_with_whole_models_is_refused(case: str, tmp_path: Path) -> None:
    sections, message = RECIPES[case]
    recipe = write_recipe(tmp_path, experts={"math": "math", "code": "code"}, base=None, **sections)
    refuses(recipe, tmp_path / "out", message)


def test_models_of_different_types_have_no_token_routed_format(mixed: Path) -> None:
    recipe = write_recipe(mixed, "native.yaml", experts=["llama", "gpt_neox"], base=None, moe={"format": "auto"})
    refuses(recipe, mixed / "out", "gpt_neox is of type 'gpt_neox', llama of type 'llama'", "with 'format: moerge'")
    result = moerge("compare", atomic_write(mixed, ["llama", "gpt_neox"]))
    assert (result.code, result.out) == (2, "")
    assert "these experts differ in type or shape and stay whole models" in result.err and "format" not in result.err


def test_what_was_not_asked_for_is_refused_once_the_models_are_known(mixed: Path) -> None:
    refused(mixed, "recipe.yaml: moe.mix is about parts of experts of one architecture", moe={"mix": "output"})


@pytest.mark.parametrize(("kind", "what"), [("t5", "an encoder-decoder"), ("bert", "an encoder"), ("vit", "no language model")])
def test_other_kinds_of_models_are_no_experts(kind: str, what: str, two: Path) -> None:
    write_json(two / "gpt_neox" / "config.json", {"model_type": kind})
    refused(two, f"gpt_neox: '{kind}' is {what}", "only decoder-only language models can be experts")


def test_code_from_elsewhere_is_never_run(two: Path) -> None:
    (two / "gpt_neox" / "modeling.py").write_text("raise SystemExit('this ran')")
    write_json(two / "gpt_neox" / "config.json", {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}})
    refused(
        two, "gpt_neox: models of type 'mine' run by code of their own ('auto_map' in config.json), which moerge does not run"
    )


def test_a_quantised_expert_is_refused(two: Path) -> None:
    edit_config(two / "gpt_neox", quantization_config={"bits": 4})
    refused(two, "gpt_neox: ", "is quantised", "merge the unquantised checkpoint it was made from")


def _without(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = {key: value for key, value in read_values(folder).items() if key != name}
    write_checkpoint(folder, tensors, config, dtype="F32", tokenizer=False)


def test_a_model_without_an_input_embedding_is_refused(two: Path) -> None:
    _without(two / "gpt_neox", "gpt_neox.embed_in.weight")
    refused(two, "gpt_neox: ", "has no input embedding ('gpt_neox.embed_in.weight')", "fetch or copy the checkpoint again")


def test_a_missing_tensor_is_named(two: Path) -> None:
    name = "gpt_neox.layers.0.attention.dense.bias"
    _without(two / "gpt_neox", name)
    refused(two, f"gpt_neox: tensor {name!r} is missing in", "fetch or copy the checkpoint again")


def test_a_tensor_of_another_shape_is_named(two: Path) -> None:
    edit_config(two / "gpt_neox", vocab_size=331)
    refused(two, "gpt_neox: tensor 'gpt_neox.embed_in.weight' has shape [330, 48], expected [331, 48]")


def test_a_size_that_is_none_is_named(two: Path) -> None:
    edit_config(two / "gpt_neox", hidden_size=-1)
    refused(two, "gpt_neox: config.json: ", "should be a positive whole number, not -1")


def _without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def test_every_expert_needs_a_tokenizer(two: Path) -> None:
    _without_tokenizer(two / "gpt_neox")
    refused(two, "gpt_neox: ", "has no tokenizer, so which token a row of its embedding is for is not known")
    _without_tokenizer(two / "llama")
    refused(two, "none of these models has a tokenizer", "copy each model's tokenizer.json into its folder")


def test_two_tokenizers_without_a_common_token_are_refused(two: Path) -> None:
    words = {"".join(map(chr, (0x4E00 + i, 0x4E01 + i))): i for i in range(330)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"}}
    write_json(two / "gpt_neox" / "tokenizer.json", tokenizer)
    write_json(two / "gpt_neox" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    refused(two, "the tokenizers of llama and gpt_neox have no token in common")


def test_a_tokenizer_of_a_model_that_is_not_there_is_refused(mixed: Path) -> None:
    refused(mixed, "tokenizer: 'olmo' is not a model of this recipe", tokenizer="olmo")


def test_infinity_in_an_expert_is_refused(two: Path) -> None:
    values = read_values(two / "gpt_neox")
    values["gpt_neox.final_layer_norm.weight"][3] = np.inf
    config = json.loads((two / "gpt_neox" / "config.json").read_text())
    write_checkpoint(two / "gpt_neox", values, config, dtype="F32", tokenizer=False)
    refused(two, "gpt_neox: tensor 'gpt_neox.final_layer_norm.weight' holds NaN or infinity")


def test_a_shard_that_is_missing_is_named(two: Path) -> None:
    write_json(two / "gpt_neox" / INDEX, {"weight_map": {"gpt_neox.embed_in.weight": "gone.safetensors"}})
    (two / "gpt_neox" / "model.safetensors").unlink()
    refused(two, "names gone.safetensors, which is missing: fetch or copy it again")


def test_learning_coefficients_of_whole_models_is_refused(mixed: Path) -> None:
    sections = {"merge": {"method": "task_arithmetic"}, "learn": {}, "base": "llama"}
    recipe = atomic_write(mixed, {"neox": "gpt_neox"}, name="learn.yaml", **sections)
    result = moerge("learn", recipe, mixed / "learned")
    assert (result.code, result.out) == (2, "") and len(result.err.splitlines()) == 1, result.err
    assert "experts that stay whole models have no coefficients to learn: merge them with `moerge merge`" in result.err


def test_an_expert_of_one_architecture_is_merged_as_before(tmp_path: Path) -> None:
    make_models(tmp_path, experts=["math", "code"])
    recipe = write_recipe(tmp_path, experts=["math", "code"], moe={"format": "moerge"})
    result = moerge("plan", recipe, "--json")
    assert result.json["model_type"] == "moerge"
