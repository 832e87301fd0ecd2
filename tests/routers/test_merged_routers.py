"""Routers of a merge of mixtures: what each choice writes, and HARC's fit measured with transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moerge
from moerge.errors import InputError
from moerge.routers.calibration import Routed, agreement
from tests.helpers.hf_models import CASES, load, random_model, save
from tests.helpers.tiny import VOCABULARY, make_models, read_tensors, read_values

KINDS = ["mixtral", "qwen3_moe", "granitemoe", "olmoe"]


def mixtures(folder: Path, case: str, dtype: Any = torch.float32) -> dict[str, Any]:
    """A base and two fine-tunes of it, with a text for each."""
    base = random_model(CASES[case](), seed=1)
    for seed, name in enumerate(("base", "math", "code")):
        save(base if name == "base" else random_model(CASES[case](), seed=seed + 5, near=base, dtype=dtype), folder / name)
    rng = np.random.default_rng(0)
    for name, words in (("math", range(3, 33)), ("code", range(33, VOCABULARY))):
        lines = [" ".join(f"w{word}" for word in rng.choice(list(words), 40)) for _ in range(12)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return {
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in ("math", "code")},
        "merge": {"method": "task_arithmetic", "scale": 1.0},
        "calibration": {name: str(folder / f"{name}.txt") for name in ("math", "code")},
    }


def gates(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The routers' matrices."""
    return {name: array for name, array in values.items() if name.endswith(("gate.weight", "router.layer.weight"))}


def test_each_choice_without_text(tmp_path: Path) -> None:
    recipe = mixtures(tmp_path, "mixtral")
    del recipe["calibration"]
    sources = {name: gates(read_values(tmp_path / name)) for name in ("base", "math", "code")}
    formulas = {
        "base": lambda base, math, code: base,
        "average": lambda base, math, code: (math + code) / 2,
        "merged": lambda base, math, code: math + code - base,
    }
    for kind, formula in formulas.items():
        result = moerge.merge({**recipe, "routers": {"kind": kind}}, tmp_path / f"out-{kind}")
        assert result.plan.warnings == ()
        for name, gate in gates(read_values(tmp_path / f"out-{kind}")).items():
            np.testing.assert_allclose(gate, formula(*(source[name] for source in sources.values())), rtol=1e-5, atol=1e-6)
    plain = moerge.merge(recipe, tmp_path / "plain")
    assert any("calibrated" in warning for warning in plain.plan.warnings)
    before, after = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "out-merged")
    assert {name: array.tobytes() for name, array in before.items()} == {name: array.tobytes() for name, array in after.items()}


@pytest.mark.parametrize("case", KINDS)
def test_calibrated_routers_route_as_the_sources_do(case: str, tmp_path: Path) -> None:
    recipe = mixtures(tmp_path, case)
    result = moerge.merge({**recipe, "routers": {"kind": "calibrated", "newton": 6}}, tmp_path / "out")
    assert moerge.verify(tmp_path / "out").problems == ()
    (remark,) = result.plan.warnings
    assert "KL" in remark
    rows = json.loads((tmp_path / "out/router_statistics/calibration.json").read_text())["layers"]
    assert {(row["layer"], row["expert"]) for row in rows} == {(layer, name) for layer in (0, 1) for name in ("math", "code")}
    for layer in (0, 1):
        before, after = (sum(row[when]["kl"] for row in rows if row["layer"] == layer) for when in ("before", "after"))
        assert after < before
    merged, tokenizer = load(tmp_path / "out"), moerge_tokenizer(tmp_path / "out")
    for name in ("math", "code"):
        inputs, k = router_inputs(merged, [tokenizer(text) for text in (tmp_path / f"{name}.txt").read_text().split("\n\n")])
        own, fitted = (list(gates(read_values(tmp_path / place)).values()) for place in (name, "out"))
        for layer in (0, 1):
            measured = agreement(Routed(inputs[layer], own[layer]), fitted[layer], k)
            row = next(row for row in rows if (row["layer"], row["expert"]) == (layer, name))
            assert measured.kl == pytest.approx(row["after"]["kl"], rel=1e-3, abs=1e-7)
            assert measured.overlap == pytest.approx(row["after"]["overlap"], abs=0.01)


def moerge_tokenizer(folder: Path) -> Any:
    """Tokens of a text, as transformers reads them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text)["input_ids"]


def router_inputs(model: Any, texts: list[list[int]]) -> tuple[list[np.ndarray], int]:
    """The inputs of each layer's router in transformers' own model, and its top_k."""
    found: list[list[Any]] = [[] for _ in model.model.layers]
    for number, layer in enumerate(model.model.layers):
        gate = next(m for n, m in layer.named_modules() if n.endswith((".gate", ".router")) and hasattr(m, "weight"))
        gate.register_forward_pre_hook(lambda m, a, number=number: found[number].append(a[0].reshape(-1, a[0].shape[-1])))
    with torch.no_grad():
        for ids in texts:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return [torch.cat(states).numpy() for states in found], model.config.num_experts_per_tok


def test_one_experts_own_router_comes_back(tmp_path: Path) -> None:
    recipe = mixtures(tmp_path, "mixtral")
    recipe["experts"] = {"math": recipe["experts"]["math"]}
    recipe["calibration"] = {"math": recipe["calibration"]["math"]}
    moerge.merge({**recipe, "routers": {"kind": "calibrated", "start": "base", "newton": 10}}, tmp_path / "out")
    rows = json.loads((tmp_path / "out/router_statistics/calibration.json").read_text())["layers"]
    assert all(row["after"]["kl"] < 1e-6 < row["before"]["kl"] for row in rows)
    assert all(row["after"]["overlap"] > 0.99 for row in rows)


def test_what_is_no_choice_is_refused(tmp_path: Path) -> None:
    recipe = mixtures(tmp_path, "mixtral")
    refused: list[tuple[dict[str, Any], str]] = [
        ({**recipe, "routers": {"kind": "calibratd"}}, "calibrated"),
        ({**recipe, "routers": {"kind": "calibrated"}, "calibration": {}}, "math"),
        ({**{k: v for k, v in recipe.items() if k != "base"}, "merge": {}, "routers": {"kind": "base"}}, "base"),
        ({**recipe, "routers": {"kind": "average"}, "moe": {"router": {"kind": "random"}}}, "routers"),
    ]
    dense = make_models(tmp_path / "dense", experts=("a", "b"))
    experts = {"a": str(dense["a"]), "b": str(dense["b"])}
    refused.append(({"experts": experts, "routers": {"kind": "average"}}, "no mixture"))
    for bad, says in refused:
        with pytest.raises(InputError, match=says):
            moerge.plan(bad)
