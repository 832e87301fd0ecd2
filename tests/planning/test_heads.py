"""Heads that config.json says are the embedding, and are not: what transformers 5 runs is what is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moerge
from moerge.extraction import extract
from tests.helpers import hf_models, tiny

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_EXPERTS = ("a", "b")


def _write(folder: Path, *, head: str = "own", tied: bool = True, seed: int = 0, **config: Any) -> Path:
    """A model with a stored head of its `own`, a `copy` of its embedding, or `none`; or with nothing but the head (`alone`)."""
    settings = tiny.llama_config(**{"tie_word_embeddings": tied, **config})
    tensors = tiny.llama_tensors({**settings, "tie_word_embeddings": False}, seed=seed)
    if head == "copy":
        tensors[_HEAD] = tensors[_EMBEDDING]
    elif head == "alone":
        tensors[_HEAD] = tensors.pop(_EMBEDDING)
    elif head == "none":
        del tensors[_HEAD]
    return tiny.write_checkpoint(folder, tensors, settings, dtype="F32")


def _merge(folder: Path, **sections: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], moerge.Plan]:
    plan = moerge.plan(tiny.write_recipe(folder, experts=_EXPERTS, **sections))
    moerge.merge(plan, folder / "out", threads=1)
    assert moerge.verify(folder / "out").problems == ()
    return tiny.read_values(folder / "out"), hf_models.read_config(folder / "out"), plan


@pytest.mark.parametrize("kind", ["llama", "olmo3"])
def test_a_head_that_differs_is_merged_and_the_result_says_untied(tmp_path: Path, kind: str) -> None:
    for seed, name in enumerate(("base", *_EXPERTS)):
        _write(tmp_path / name, seed=seed, model_type=kind)
    found, config, plan = _merge(tmp_path, merge={"method": "average"})
    heads = [tiny.read_values(tmp_path / name)[_HEAD].astype(np.float64) for name in _EXPERTS]
    np.testing.assert_allclose(found[_HEAD], np.mean(heads, axis=0), rtol=1e-6)
    assert config["tie_word_embeddings"] is False
    assert len([text for text in plan.warnings if _HEAD in text and "tie_word_embeddings" in text]) == 3


def test_a_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *_EXPERTS)):
        _write(tmp_path / name, head="copy" if name == "a" else "none", seed=seed)
    found, config, plan = _merge(tmp_path, merge={"method": "average"})
    assert _HEAD not in found and config["tie_word_embeddings"] is True
    assert not [text for text in plan.warnings if _HEAD in text]


@pytest.mark.parametrize("kind", ["llama", "olmo3"])
def test_untied_experts_of_a_tied_base_start_from_its_embedding(tmp_path: Path, kind: str) -> None:
    _write(tmp_path / "base", head="none", model_type=kind)
    for seed, name in enumerate(_EXPERTS):
        _write(tmp_path / name, tied=False, seed=seed + 1, model_type=kind)
    found, config, plan = _merge(tmp_path, merge={"method": "task_arithmetic", "scale": 0.5})
    base = tiny.read_values(tmp_path / "base")[_EMBEDDING].astype(np.float64)
    tau = sum(tiny.read_values(tmp_path / name)[_HEAD] - base for name in _EXPERTS)
    np.testing.assert_allclose(found[_HEAD], base + 0.5 * tau, atol=1e-6)
    assert config["tie_word_embeddings"] is False
    assert [text for text in plan.notes if _HEAD in text and "base" in text]


def test_a_tied_model_stored_under_its_heads_name(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *_EXPERTS)):
        _write(tmp_path / name, head="alone" if name == "a" else "none", seed=seed)
    found, config, _ = _merge(tmp_path, merge={"method": "passthrough", "model": "a"})
    np.testing.assert_array_equal(found[_EMBEDDING], tiny.read_values(tmp_path / "a")[_HEAD])
    assert _HEAD not in found and config["tie_word_embeddings"] is True
    assert all(moerge.verify(tmp_path / name).problems == () for name in ("base", "a"))


def test_a_mixture_of_experts_with_heads_of_their_own(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *_EXPERTS)):
        _write(tmp_path / name, seed=seed)
    found, config, _ = _merge(tmp_path, merge={"method": "passthrough", "model": "b"}, moe={"top_k": 2})
    np.testing.assert_array_equal(found[_HEAD], tiny.read_values(tmp_path / "b")[_HEAD])
    assert config["tie_word_embeddings"] is False


def test_an_extraction_counts_the_head_that_it_leaves_out(tmp_path: Path) -> None:
    _write(tmp_path / "base")
    _write(tmp_path / "a", seed=1)
    made = extract(str(tmp_path / "a"), tmp_path / "adapter", base=str(tmp_path / "base"), rank=2)
    assert any(kept.role == "head" and kept.kind == "left out" for kept in made.roles)


@pytest.mark.parametrize(("family", "top", "inner"), [("qwen2", True, None), ("qwen2_vl", False, True), ("gemma3", True, False)])
def test_a_copy_answers_as_transformers_loads_the_model(tmp_path: Path, family: str, top: bool, inner: bool | None) -> None:
    hf_models.save(hf_models.random_model(hf_models.FAMILIES[family](tie_word_embeddings=False), 1), tmp_path / "a")
    config = hf_models.read_config(tmp_path / "a") | {"tie_word_embeddings": top}
    if inner is not None:
        config["text_config"]["tie_word_embeddings"] = inner
    tiny.write_json(tmp_path / "a" / "config.json", config)
    wanted = hf_models.logits(hf_models.load(tmp_path / "a"))
    recipe = tiny.write_recipe(tmp_path, base=None, experts=["a"], merge={"method": "passthrough", "model": "a"})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    torch.testing.assert_close(hf_models.logits(hf_models.load(tmp_path / "out")), wanted, atol=0, rtol=0)
