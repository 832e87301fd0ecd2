"""mergekit's `modules`: parts of a model, each merged from models of its own by its own parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.errors import InputError
from moerge.planning.equivalent import equivalent_recipe
from moerge.recipe.mergekit.modules import module_of
from tests.helpers import tiny

VISION = "model.visual.blocks.{}.attn.weight"
MERGER = "model.visual.merger.mlp.weight"
MODULES: dict[str, Any] = {
    "text_decoder": {
        "models": [{"model": "math", "parameters": {"weight": [0.2, 0.8]}}, {"model": "code", "parameters": {"weight": 0.5}}],
        "parameters": {"lambda": 0.5},
    },
    "vision_tower": {"models": [{"model": "code", "parameters": {"weight": [0, 1]}}]},
    "multi_modal_projector": {"models": [{"model": "math", "parameters": {"weight": 2}}]},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = tiny.llama_config(model_type="novel", num_hidden_layers=2)
    for index, name in enumerate(("base", "math", "code")):
        tensors = tiny.llama_tensors(config, expert=index or None)
        rng = np.random.default_rng(index)
        names = [*(VISION.format(layer) for layer in range(3)), MERGER]
        tensors |= {name: rng.standard_normal((3, 4), np.float32) for name in names}
        tiny.write_checkpoint(tmp_path / name, tensors, config, dtype="F32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(**modules: Any) -> dict[str, Any]:
    return {"modules": modules, "base_model": "base", "merge_method": "task_arithmetic", "parameters": {"weight": 1}}


def test_each_module_has_its_models_and_parameters(here: Path) -> None:
    moerge.merge(document(**MODULES), "out")
    base, math, code, merged = (tiny.read_values(here / name) for name in ("base", "math", "code", "out"))
    for name, values in merged.items():
        of_math, of_code = math[name] - base[name], code[name] - base[name]
        if name == MERGER:
            tau = 2 * of_math
        elif "visual" in name:  # a gradient over its own three layers
            tau = int(name.split(".")[3]) / 2 * of_code
        else:
            depth = int(name.split(".")[2]) if ".layers." in name else 0
            tau = 0.5 * ((0.2 + 0.6 * depth) * of_math + 0.5 * of_code)
        np.testing.assert_allclose(values, base[name] + tau, rtol=1e-5, atol=1e-6, err_msg=name)
    with pytest.raises(InputError, match="the same models"):
        equivalent_recipe(moerge.plan(document(**MODULES)))


def test_a_single_module_is_the_model(here: Path) -> None:
    models = MODULES["text_decoder"]["models"]
    moerge.merge(document(default={"models": models, "parameters": {"lambda": 0.5}}), "one")
    plain = {**document(), "models": models, "parameters": {"weight": 1, "lambda": 0.5}}
    plain.pop("modules")
    moerge.merge(plain, "two")
    one, two = tiny.read_tensors(here / "one"), tiny.read_tensors(here / "two")
    assert all(np.array_equal(one[name], two[name]) for name in two) and one.keys() == two.keys()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("visual.blocks.0.attn.qkv.weight", "vision_tower"),
        ("model.visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "multi_modal_projector"),
        ("multi_modal_projector.linear_1.weight", "multi_modal_projector"),
        ("vision_tower.transformer.layers.0.ffn_norm.weight", "vision_tower"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "text_decoder"),
        ("lm_head.weight", "text_decoder"),
    ],
)
def test_names_of_mergekits_tables(name: str, module: str) -> None:
    assert module_of(name, ["text_decoder", "vision_tower", "multi_modal_projector"]) == module


def test_names_without_a_table_are_beginnings() -> None:
    modules = ["model.encoder", "decoder", "default"]
    assert module_of("model.encoder.layers.0.fc1.weight", modules) == "model.encoder"
    assert module_of("decoder.layers.0.fc1.weight", modules) == "decoder"
    assert module_of("encoders.weight", modules) == "default"
    assert module_of("shared.weight", modules[:2]) is None


BAD = [
    ({}, "'modules'.*is empty|modules is empty"),
    ({"default": {}}, r"modules\.default\.models should be a list"),
    ({"default": {"models": [{"model": "math"}], "slices": []}}, r"modules\.default\.slices"),
    ({"default": {"models": [{"model": "math"}], "filter": 1}}, r"modules\.default\.filter: unknown key"),
    ({"decoder": {"models": [{"model": "math"}]}, "vision_tower": {"models": [{"model": "math"}]}}, "no part for tensor"),
    (
        {"default": {"slices": [{"sources": []}]}, "vision_tower": {"models": [{"model": "math"}]}},
        r"modules\.default\.slices are for a model of one module",
    ),
]


@pytest.mark.parametrize(("modules", "message"), BAD, ids=range(len(BAD)))
def test_bad_modules_are_refused(here: Path, modules: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        moerge.plan(document(**modules))
