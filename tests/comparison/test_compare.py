"""`moerge compare` against whole models in float64, for every kind of recipe."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge import figures
from moerge.comparison import Comparison, compare, write_comparison
from moerge.comparison.compared import compared_plan, part_of
from moerge.errors import InputError
from moerge.recipe import load_recipe
from tests.comparison import slow
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import EXPERTS, make_models, read_values, write_checkpoint, write_recipe
from tests.helpers.vocabularies import EMBEDDING, SPECIAL, value, write_model

ROLES = {"embed": "embedding", "self_attn": "attention", "mlp": "ffn", "norm": "norm", "lm_head": "head"}


def role_of(name: str) -> str:
    return next(role for part, role in ROLES.items() if part in name)


def regions(names: list[str]) -> dict[tuple[str, int | None, str], list[str]]:
    """The tensors of every region, by (scope, layer, role)."""
    found: dict[tuple[str, int | None, str], list[str]] = {("model", None, "all"): list(names)}
    for name in names:
        match = re.search(r"layers\.(\d+)\.", name)
        layer, role = int(match[1]) if match else None, role_of(name)
        last = name.split(".")[-2].removesuffix("_proj")
        part = {"embed_tokens": "embedding", "lm_head": "head", "input_layernorm": "norm.attention"}.get(last)
        part = part or {"post_attention_layernorm": "norm.ffn", "norm": "norm.final"}.get(last) or f"{role}.{last}"
        for region in (("part", layer, part), ("layer", layer, role), ("role", None, role)):
            found.setdefault(region, []).append(name)
    return found


def by_region(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(row["scope"], row["layer"], row["role"], *(row[key] for key in keys)): row for row in rows}


def assert_equal(row: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, exact in wanted.items():
        assert row[key] == pytest.approx(exact, rel=1e-9, abs=1e-12), (key, row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    make_models(folder, dtype=lambda name: "F32" if "norm" in name else "BF16", shards=2)
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {name: read_values(folder / name) for name in ("base", *EXPERTS)}


@pytest.mark.parametrize("density", [1.0, 0.6])
def test_figures_are_those_of_whole_models(folder: Path, models: slow.Models, density: float) -> None:
    experts = {"math": {"model": "math", "weight": 2.0}, "code": "code", "knowledge": {"model": "knowledge", "weight": -0.5}}
    recipe = write_recipe(folder, experts=experts, merge={"method": "ties", "density": density})
    data = compare(recipe, threads=2).to_json()
    wanted = regions(list(models["base"]))
    pairs, rows = by_region(data["pairs"], "a", "b"), by_region(data["rows"], "expert")
    assert set(pairs) == {(*region, a, b) for region in wanted for a, b in itertools.combinations(EXPERTS, 2)}
    assert set(rows) == {(*region, expert) for region in wanted for expert in EXPERTS}
    for region, names in wanted.items():
        for a, b in itertools.combinations(EXPERTS, 2):
            assert_equal(pairs[*region, a, b], slow.pair(models, a, b, names))
        for expert in EXPERTS:
            assert_equal(rows[*region, expert], slow.expert(models, expert, names, [2.0, 1.0, -0.5], density))
    assert (data["compared"], data["densities"]) == ("task vectors", [density])


def test_without_a_base_parameters_are_compared(folder: Path, models: slow.Models) -> None:
    found = compare(write_recipe(folder, base=None))
    data = found.to_json()
    alone = {name: model for name, model in models.items() if name != "base"}
    pairs = by_region(data["pairs"], "a", "b")
    for region, names in regions(list(models["math"])).items():
        assert_equal(pairs[*region, "math", "code"], slow.pair(alone, "math", "code", names))
    assert (data["compared"], data["densities"]) == ("parameters", [])
    assert {(row["relative_norm"], row["averaged"], row["survives"]) for row in data["rows"]} == {(None, None, None)}


def test_thresholds_of_the_model(folder: Path, models: slow.Models) -> None:
    """With `scope: model` one threshold spans all tensors: as if they were one."""
    merge = {"method": "ties", "density": 0.3, "scope": "model"}
    found = compare(write_recipe(folder, merge=merge))
    flat = {name: {"all": slow.vector(model, list(models["base"])).astype(np.float32)} for name, model in models.items()}
    (row,) = [row for row in found.similarity.rows_of("model") if row.expert == "code"]
    wanted = slow.expert(flat, "code", ["all"], [1, 1, 1], 0.3)
    assert_equal(row.model_dump(), {key: wanted[key] for key in ("trimmed", "outvoted", "survives")})


def rows_of(found: Comparison) -> Any:
    data = found.to_json()
    return data["pairs"], data["rows"], data["verdicts"]


def test_a_moe_is_compared_as_a_whole(folder: Path) -> None:
    """Also what it keeps separate, and at the densities of its own overrides."""
    overrides = [{"match": "embedding", "method": "ties", "density": 0.5}]
    merge = {"method": "ties", "density": 0.9, "overrides": overrides}
    dense = compare(write_recipe(folder, merge=merge))
    moe = compare(write_recipe(folder, "moe.yaml", merge=merge, moe={"router": {"kind": "random"}}))
    assert rows_of(moe) == rows_of(dense)
    assert (moe.separate, dense.separate, moe.similarity.densities) == (("ffn",), (), (0.5, 0.9))


def test_asking_for_a_density(folder: Path) -> None:
    plain = write_recipe(folder, merge={"method": "average"})
    asked, trimmed = compare(plain, density=0.4), write_recipe(folder, "t.yaml", merge={"method": "ties", "density": 0.4})
    assert rows_of(asked) == rows_of(compare(trimmed))
    assert {row.trimmed for row in compare(plain).similarity.rows} == {0}


def test_methods_without_what_they_need(folder: Path) -> None:
    """Statistics, calibration texts and coefficients are for merging; comparing reads models alone."""
    for merge in ({"method": "fisher"}, {"method": "regmean"}):
        recipe = write_recipe(folder, merge=merge, calibration=dict.fromkeys(EXPERTS, "absent.jsonl"))
        assert compare(recipe).similarity.anchored


def test_a_mergekit_file(folder: Path) -> None:
    written = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": {"weight": 1, "density": 0.6}} for name in EXPERTS],
        "dtype": "bfloat16",
    }
    (folder / "mergekit.yaml").write_text(json.dumps(written))
    own = compare(write_recipe(folder, merge={"method": "ties", "density": 0.6}))
    assert rows_of(compare(folder / "mergekit.yaml")) == rows_of(own)


def test_a_mergekit_moe_file(folder: Path) -> None:
    """Its attention is the base's alone, but all that the experts have is compared."""
    experts = [{"source_model": str(folder / name), "positive_prompts": ["w3"]} for name in EXPERTS]
    written = {"base_model": str(folder / "base"), "gate_mode": "random", "experts": experts}
    (folder / "moe-mergekit.yaml").write_text(json.dumps(written))
    assert rows_of(compare(folder / "moe-mergekit.yaml")) == rows_of(compare(write_recipe(folder, merge={"method": "average"})))


def test_slices_compare_the_layers_that_are_stacked(folder: Path, models: slow.Models) -> None:
    """Layer 0 of math with layer 1 of code, then a layer of one model alone, where there is nothing to compare."""
    sources = [{"model": str(folder / "math"), "layer_range": [0, 1]}, {"model": str(folder / "code"), "layer_range": [1, 2]}]
    alone = [{"model": str(folder / "code"), "layer_range": [0, 1]}]
    written = {"merge_method": "linear", "slices": [{"sources": sources}, {"sources": alone}], "parameters": {"weight": 1}}
    (folder / "slices.yaml").write_text(json.dumps(written))
    found = compare(folder / "slices.yaml")
    (pair,) = [pair for pair in found.similarity.pairs_of("part") if pair.role == "ffn.up"]
    up = "model.layers.{}.mlp.up_proj.weight"
    assert pair.layer == 0
    a_N, b_N = models["math"][up.format(0)].ravel(), models["code"][up.format(1)].ravel()
    assert pair.cosine == pytest.approx(slow.cosine(a_N.astype(float), b_N.astype(float)))


def test_families_without_roles(tmp_path: Path) -> None:
    """Layers and roles are taken from names."""
    config = {"model_type": "strange", "num_hidden_layers": 1, "vocab_size": 4, "hidden_size": 4}
    rng = np.random.default_rng(0)
    names = ["transformer.h.0.mixer.in_proj.weight", "transformer.h.0.mixer.out_proj.weight", "transformer.wte.weight"]
    for model in ("base", "a", "b"):
        tensors = {name: rng.standard_normal((4, 4), dtype=np.float32) for name in names}
        write_checkpoint(tmp_path / model, tensors, config, tokenizer=False)
    recipe = load_recipe(write_recipe(tmp_path, experts=["a", "b"]))
    parts = [part_of(output) for output in compared_plan(recipe).outputs]
    assert [(part.layer, part.name, part.role) for part in parts] == [
        (0, "mixer.in_proj", "mixer"),
        (0, "mixer.out_proj", "mixer"),
        (None, "transformer.wte", "transformer"),
    ]
    assert [verdict.role for verdict in compare(recipe).verdicts] == ["mixer", "transformer"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of several chunks, some above a bracket's smallest size."""
    folder = tmp_path_factory.mktemp("large")
    config = {"num_hidden_layers": 1, "intermediate_size": 70_000}
    make_models(folder, experts=["math", "code"], config=config, tokenizer=False)
    return folder


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_threads_change_no_byte(large: Path, tmp_path: Path, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)  # that figures are the same is another test
    recipe = write_recipe(large, experts=["math", "code"], merge={"method": "ties", "density": 0.5, "scope": scope})
    written = [tmp_path / str(threads) for threads in (1, 3)]
    for out in written:
        write_comparison(compare(recipe, threads=int(out.name)), out)
    files = sorted(path.name for path in written[0].iterdir())
    assert len(files) == 4
    for name in files:
        assert (written[0] / name).read_bytes() == (written[1] / name).read_bytes(), name


def test_large_tensors(large: Path) -> None:
    models = {name: read_values(large / name) for name in ("base", "math", "code")}
    found = compare(write_recipe(large, experts=["math", "code"], merge={"method": "ties", "density": 0.5}))
    names = [name for name in models["base"] if "mlp" in name]
    (pair,) = found.similarity.pairs_of("role", "ffn")
    assert_equal(pair.model_dump(), slow.pair(models, "math", "code", names))
    rows = {row.expert: row.model_dump() for row in found.similarity.rows_of("role", "ffn")}
    assert_equal(rows["code"], slow.expert(models, "code", names, [1, 1], 0.5))


def test_progress_counts_what_is_read(large: Path) -> None:
    totals = []
    for merge in ({"method": "average"}, {"method": "ties", "density": 0.5}):
        progress = Recorded()
        compare(write_recipe(large, experts=["math", "code"], merge=merge), progress=progress)
        assert [progress.done["bytes"]] == progress.totals("bytes")
        totals += progress.totals("bytes")
    assert totals[1] == 3 * totals[0]


def test_adapters_are_compared_as_what_they_compute(folder: Path, tmp_path: Path) -> None:
    module, base = "model.layers.1.mlp.up_proj", read_values(folder / "base")
    factors = {name: low_rank(module, (24, 16), rank=4, seed=seed) for seed, name in enumerate(("one", "two"))}
    for name, tensors in factors.items():
        write_adapter(tmp_path / name, tensors, r=4, lora_alpha=4)
    found = compare(write_recipe(tmp_path, base=str(folder / "base"), experts=["one", "two"]))
    a, b = ((t[f"{module}.lora_B.weight"] @ t[f"{module}.lora_A.weight"]).ravel() for t in factors.values())
    (pair,) = found.similarity.pairs_of("role", "ffn")
    assert pair.cosine == pytest.approx(slow.cosine(a.astype(float), b.astype(float)), abs=1e-5)
    (whole,) = found.similarity.pairs_of("model")
    assert (pair.parameters, whole.parameters) == (6 * 16 * 24, sum(value.size for value in base.values()))
    (attention,) = found.similarity.pairs_of("role", "attention")
    assert (attention.cosine, attention.sign_conflict_changed, attention.distance) == (None, None, 0)


def test_vocabularies_that_differ_are_matched_by_token(tmp_path: Path) -> None:
    """A row that an expert lacks counts as unchanged."""
    write_model(tmp_path / "base", ["w3", "w4"])
    write_model(tmp_path / "swapped", ["w4", "w3"])
    write_model(tmp_path / "chat", ["w3", "w4"], added=["<|chat|>"])
    found = compare(write_recipe(tmp_path, experts=["swapped", "chat"], tokenizer="union"))
    (pair,) = found.similarity.pairs_of("role", "embedding")
    names = [*SPECIAL, "w3", "w4"]
    swapped_N, chat_N = (
        np.concatenate([value(model, EMBEDDING, text) - value("base", EMBEDDING, text) for text in names]).astype(np.float64)
        for model in ("swapped", "chat")
    )
    assert pair.cosine == pytest.approx(slow.cosine(swapped_N, chat_N))


def test_nothing_to_compare(folder: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml: there is nothing to compare: it needs two experts that share a tensor"):
        compare(write_recipe(folder, experts=["math"], merge={"method": "task_arithmetic"}))
