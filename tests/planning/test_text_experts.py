"""Text models merged into the language model of a multimodal one, and the other way round, as transformers' modules say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moerge
from moerge.errors import InputError
from tests.helpers import hf_models, tiny
from tests.helpers.multimodal import VISION_LANGUAGE, language_model, picture, text_config

_OF_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


def _models(folder: Path, kind: str, expert: Any = None) -> tuple[Any, Any]:
    """A multimodal model and a text model, saved as `vision` and `text`."""
    config = VISION_LANGUAGE[kind]()
    vision = hf_models.random_model(config, 1)
    text = hf_models.random_model(expert or text_config(config), 2)
    for name, model in (("vision", vision), ("text", text)):
        hf_models.save(model, folder / name)
    return vision, text


def _recipe(folder: Path, base: str, expert: str, **more: Any) -> Path:
    merge = {"method": "task_arithmetic", "scale": 0.25}
    return tiny.write_recipe(folder, base=base, experts=[expert], **{"merge": merge, "config": "base", **more})


def _towards(model: Any, other: Any, *, scale: float) -> None:
    """Move the parameters of a module in float64 towards those of another with the same names."""
    values = dict(other.double().named_parameters())
    moved = dict(model.double().named_parameters())
    assert moved.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in moved.items():
            parameter += scale * (values[name] - parameter)


def _run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(**inputs, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_a_text_expert_moves_the_language_model_alone(tmp_path: Path, kind: str) -> None:
    vision, text = _models(tmp_path, kind)
    plan = moerge.plan(_recipe(tmp_path, "vision", "text"))
    moerge.merge(plan, tmp_path / "out", threads=1)
    assert any(warning.startswith("text: its ") and "of base" in warning for warning in plan.warnings)
    _towards(language_model(vision), text.model, scale=0.25)
    if not vision.config.tie_word_embeddings:
        _towards(vision.get_output_embeddings(), text.lm_head, scale=0.25)
    found = hf_models.load(tmp_path / "out")
    inputs = [{"input_ids": torch.arange(3, 19).reshape(2, 8)}, *([picture(vision.config)] if kind in _OF_QWEN else [])]
    for given in inputs:
        torch.testing.assert_close(_run(found, given), _run(vision, given), atol=2e-5, rtol=1e-5)
    own, result = tiny.read_tensors(tmp_path / "vision"), tiny.read_tensors(tmp_path / "out")
    assert own.keys() == result.keys()
    beside = [
        name for name in own if not any(word in name for word in ("language_model", "text_model", "lm_head", "model.layers"))
    ]
    assert all(own[name].tobytes() == result[name].tobytes() for name in beside if "vis" in name) and beside
    assert moerge.verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_5", "llava"])
def test_the_language_model_of_a_multimodal_expert_moves_a_text_model(tmp_path: Path, kind: str) -> None:
    vision, text = _models(tmp_path, kind)
    plan = moerge.plan(_recipe(tmp_path, "text", "vision"))
    moerge.merge(plan, tmp_path / "out", threads=1)
    assert any("are left out" in warning and "'config: vision' keeps them" in warning for warning in plan.warnings)
    _towards(text.model, language_model(vision), scale=0.25)
    if not vision.config.tie_word_embeddings:
        _towards(text.lm_head, vision.get_output_embeddings(), scale=0.25)
    found, given = hf_models.load(tmp_path / "out"), {"input_ids": torch.arange(3, 19).reshape(2, 8)}
    assert type(found) is type(text)
    torch.testing.assert_close(_run(found, given), _run(text, given), atol=2e-5, rtol=1e-5)
    both = moerge.plan(_recipe(tmp_path, "text", "vision", config="vision"))
    assert {output.name for output in both.outputs} == tiny.read_tensors(tmp_path / "vision").keys()


def test_adapted_and_multimodal_experts_stand_beside_text_experts(tmp_path: Path) -> None:
    vision, _ = _models(tmp_path, "qwen2_5_vl")
    hf_models.save(hf_models.random_model(vision.config, 3, near=vision), tmp_path / "other")
    recipe = _recipe(tmp_path, "vision", "text")
    plan = moerge.plan(
        tiny.write_recipe(tmp_path, base="vision", experts=["text", "other"], config="base", merge={"method": "ties"})
    )
    by_name = {output.name: output.operation for output in plan.outputs}
    assert [source.model for source in by_name["visual.patch_embed.proj.weight"].sources] == ["base"]
    assert {source.model for source in by_name["model.norm.weight"].sources} == {"base", "text", "other"}
    taken = moerge.plan(_recipe(tmp_path, "vision", "text", parts={"vision": "base"}))
    assert not [text for text in taken.warnings if "not all models share" in text] and recipe.exists()


def test_names_of_other_versions_meet(tmp_path: Path) -> None:
    vision, _ = _models(tmp_path, "llava")
    for seed, name in enumerate(("a", "b"), 2):
        hf_models.save(hf_models.random_model(vision.config, seed), tmp_path / name)
    weights = tiny.read_values(tmp_path / "b")
    spelled = {re_spelled(name): values for name, values in weights.items()}
    assert not spelled.keys() & {name for name in weights if "norm.weight" in name and "language_model" in name}
    tiny.write_checkpoint(tmp_path / "c", spelled, hf_models.read_config(tmp_path / "b"), dtype="F32")
    for out, expert in (("same", "b"), ("other", "c")):
        moerge.merge(
            tiny.write_recipe(tmp_path, base="vision", experts=["a", expert], merge={"method": "average"}), tmp_path / out
        )
    assert_same(tmp_path / "same", tmp_path / "other")


def re_spelled(name: str) -> str:
    """A tensor's name as transformers 5 has it in memory."""
    inner = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
    return inner if inner.startswith(("model.", "lm_head")) else f"model.{inner}"


def assert_same(one: Path, other: Path) -> None:
    """Both folders hold the same tensors."""
    left, right = tiny.read_tensors(one), tiny.read_tensors(other)
    assert left.keys() == right.keys()
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)


@pytest.mark.parametrize(
    ("changes", "words"), [({"hidden_size": 48}, ["hidden_size", "text: 48"]), ({"num_hidden_layers": 3}, ["text: 3"])]
)
def test_a_text_expert_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    config = hf_models.FAMILIES["qwen2"](**changes)
    _models(tmp_path, "qwen2_5_vl", config)
    with pytest.raises(InputError) as raised:
        moerge.plan(_recipe(tmp_path, "vision", "text"))
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_configs_that_differ_are_told_apart_in_families_without_a_table(tmp_path: Path, kind: str) -> None:
    config = VISION_LANGUAGE[kind]()
    hf_models.save(hf_models.random_model(config, 1), tmp_path / "vision")
    config.text_config.rope_parameters["rope_theta"] = 3e5
    hf_models.save(hf_models.random_model(config, 2), tmp_path / "other")
    with pytest.raises(InputError, match=r"rope_theta \(base: [\d.]+, other: 300000"):
        moerge.plan(tiny.write_recipe(tmp_path, base="vision", experts=["other"], merge={"method": "task_arithmetic"}))


def test_a_language_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    _models(tmp_path, "qwen2_5_vl", hf_models.FAMILIES["mistral"](sliding_window=None))
    with pytest.raises(InputError, match="text is of type 'mistral', base of type 'qwen2_5_vl'"):
        moerge.plan(_recipe(tmp_path, "vision", "text"))


def test_vision_has_a_projector_of_its_own_name(tmp_path: Path) -> None:
    vision, _ = _models(tmp_path, "llava")
    hf_models.save(hf_models.random_model(vision.config, 3), tmp_path / "other")
    plan = moerge.plan(
        tiny.write_recipe(
            tmp_path,
            base="vision",
            experts=["other"],
            merge={"method": "task_arithmetic"},
            parts={"vision": "base", "projector": "other"},
        )
    )
    owners = {
        name: output.operation.sources[0].model for output in plan.outputs for name in [output.name] if "language" not in name
    }
    assert {owner for name, owner in owners.items() if name.startswith("multi_modal_projector.")} == {"other"}
    assert {owner for name, owner in owners.items() if name.startswith("vision_tower.")} == {"base"}
    with pytest.raises(InputError, match="'audio' is no part of a model here"):
        moerge.plan(_recipe(tmp_path, "vision", "other", parts={"audio": "drop"}))
