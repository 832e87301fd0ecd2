"""Recipes with adapters as experts: the same bytes as with the full models they stand for, through every kind of result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.checkpoint.header import read_header
from tests.helpers.adapters import low_rank, merged, write_adapter
from tests.helpers.command import moerge as run
from tests.helpers.command import refuses
from tests.helpers.tiny import (
    llama_config,
    llama_shapes,
    make_models,
    read_tensors,
    read_values,
    write_checkpoint,
    write_recipe,
    write_tokenizer,
)

SCALE, RANK = 2.0, 4


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Path]:
    """A base and the expert `code`; the adapter `math`; and `full`, the float32 model that base and `math` amount to."""
    models = make_models(tmp_path, experts=("code",))
    shapes = llama_shapes(llama_config())
    names = [name for name in shapes if "layers" in name and len(shapes[name]) == 2 and "k_proj" not in name]
    factors: dict[str, np.ndarray] = {}
    for name in names:
        rows, columns = shapes[name]
        factors |= low_rank(name.removesuffix(".weight"), (rows, columns), rank=RANK)
    adapter = write_adapter(tmp_path / "math", factors, r=RANK, lora_alpha=SCALE * RANK)
    values = read_values(models["base"])
    for name in names:
        module = name.removesuffix(".weight")
        a, b = (factors[f"{module}.lora_{part}.weight"] for part in "AB")
        change = np.zeros(shapes[name], np.float32)
        for k in range(RANK):
            change += b[:, k : k + 1] * a[k]
        values[name] = values[name] + np.float32(SCALE) * change
        np.testing.assert_allclose(values[name], merged(read_values(models["base"])[name], a, b, SCALE), rtol=1e-5, atol=1e-6)
    write_checkpoint(tmp_path / "full", values, dtype="F32")
    return {**models, "math": adapter, "full": tmp_path / "full"}


RECIPES: dict[str, dict[str, Any]] = {
    "average": {"merge": {"method": "average"}},
    "linear": {"merge": {"method": "linear"}},
    "task_arithmetic": {"merge": {"method": "task_arithmetic", "scale": 0.5}},
    "ties": {"merge": {"method": "ties", "density": 0.4}},
    "ties_model": {"merge": {"method": "ties", "density": 0.4, "scope": "model"}},
    "dare": {"merge": {"method": "dare", "density": 0.5, "seed": 3}},
    "slerp": {"merge": {"method": "slerp"}, "base": "base"},
    "float32": {"merge": {"method": "average"}, "dtype": "float32"},
    "moe": {"merge": {"method": "ties"}, "moe": {"router": {"kind": "projection", "sign": "mean"}}},
    "sequence_routed": {"merge": {"method": "average"}, "moe": {"format": "moerge", "separate": ["ffn", "attention"]}},
}


@pytest.mark.parametrize("kind", RECIPES)
def test_an_adapter_gives_the_bytes_of_the_model_it_stands_for(world: dict[str, Path], kind: str, tmp_path: Path) -> None:
    outs = {}
    for expert in ("math", "full"):
        recipe = write_recipe(tmp_path, f"{expert}.yaml", experts={"math": expert, "code": "code"}, **RECIPES[kind])
        moerge.merge(recipe, tmp_path / f"out-{expert}", threads=2)
        outs[expert] = read_tensors(tmp_path / f"out-{expert}")
        assert moerge.verify(tmp_path / f"out-{expert}", threads=1).problems == ()
    assert outs["math"].keys() == outs["full"].keys()
    for name, stored in outs["full"].items():
        np.testing.assert_array_equal(outs["math"][name], stored, err_msg=name)
    digests = [json.loads((tmp_path / f"out-{e}" / "moerge.json").read_text())["tensors"] for e in outs]
    assert digests[0] == digests[1]


def test_threads_and_shards_do_not_matter(world: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, experts={"math": "math", "code": "code"}, merge={"method": "ties"})
    manifests = []
    for threads, shard in ((1, 10**9), (4, 3000)):
        out = tmp_path / f"out-{threads}"
        moerge.merge(recipe, out, threads=threads, max_shard_bytes=shard)
        manifest = json.loads((out / "moerge.json").read_text())
        manifests.append((manifest["tensors"], manifest["models"]))
    assert manifests[0] == manifests[1]
    assert manifests[0][1]["math"]["tensors_read"] == 21


def test_feed_forward_layers_that_the_adapter_leaves_alone_are_copied(world: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "thin", low_rank("model.layers.1.mlp.up_proj", (24, 16), rank=8))
    recipe = write_recipe(tmp_path, experts={"thin": "thin", "code": "code"}, moe={"include_base": False, "top_k": 1})
    operations = moerge.plan(recipe).summary(1)["operations"]
    assert operations == {"average": 15, "draw": 2, "copy": 11, "convert": 1}


def test_what_the_plan_says(world: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, experts={"math": "math", "code": "code"}, merge={"method": "ties"})
    result = run("plan", recipe)
    size = sum(tensor.nbytes for tensor in read_header(world["math"] / "adapter_model.safetensors").values())
    assert (result.code, result.err) == (0, "")
    row = next(line for line in result.out.splitlines() if line.startswith("math"))
    assert row.split() == ["math", "math", "llama", f"{size / 1000:.3g}", "kB", "LoRA", "F32"]
    assert moerge.plan(recipe).output_bytes == 2 * moerge.plan(recipe).parameters  # the base's bfloat16, not float32
    with_config = write_recipe(tmp_path, experts={"math": "math", "code": "code"}, config="math")
    assert moerge.plan(with_config).output_bytes == moerge.plan(recipe).output_bytes


def test_a_plan_reads_no_tensor(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moerge.checkpoint.header import StoredTensor

    monkeypatch.setattr(StoredTensor, "open", lambda self: pytest.fail(f"{self.name} was opened"))
    assert run("plan", write_recipe(tmp_path, experts={"math": "math", "code": "code"}), "--json").code == 0


def test_the_adapters_tokenizer_can_be_named(world: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(world["math"])
    (world["math"] / "chat_template.jinja").write_text("{{ messages }}")
    moerge.merge(write_recipe(tmp_path, experts={"math": "math", "code": "code"}, tokenizer="math"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_adapter_needs_a_base(world: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base=None, experts={"math": "math", "code": "code"})
    refuses(recipe, tmp_path / "out", "math is an adapter, so the recipe needs a 'base'")
    recipe = write_recipe(tmp_path, base="math", experts={"code": "code"})
    refuses(recipe, tmp_path / "out", "math is an adapter: name the model that it was trained on (base)")


def test_the_warning_about_another_base_is_shown_and_written(world: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "odd", low_rank("model.layers.1.mlp.up_proj", (24, 16), rank=8), base_model_name_or_path="org/x")
    recipe = write_recipe(tmp_path, experts={"odd": "odd", "code": "code"})
    result = run("merge", recipe, tmp_path / "out", "--quiet")
    warning = "odd: the adapter was trained on 'org/x'; is 'base' the same model?"
    assert (result.code, result.err) == (0, f"warning: {warning}\n")
    assert warning in json.loads((tmp_path / "out" / "moerge.json").read_text())["warnings"]


def test_nonfinite_factors_are_named(world: dict[str, Path], tmp_path: Path) -> None:
    factors = low_rank("model.layers.1.mlp.up_proj", (24, 16), rank=8)
    factors["model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = np.nan
    write_adapter(tmp_path / "bad", factors)
    recipe = write_recipe(tmp_path, experts={"bad": "bad", "code": "code"})
    refuses(recipe, tmp_path / "out", "bad: tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinity")


def test_the_adapters_folder_is_not_overwritten(world: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, experts={"math": "math", "code": "code"})
    result = run("merge", recipe, world["math"] / "out")
    assert (result.code, "lies in math's own folder" in result.err) == (2, True)


def test_inspect_and_verify_an_adapter(world: dict[str, Path], tmp_path: Path) -> None:
    found = run("inspect", world["math"], "--json").json
    assert found["adapter"] == {
        "type": "LORA",
        "variants": [],
        "base": "base",
        "ranks": [4],
        "alpha": 8.0,
        "modules": ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "modules_to_save": [],
        "problem": None,
    }
    assert found["roles"][0]["role"].startswith("(adapter) model.layers.*.")
    text = run("inspect", world["math"]).out
    for part in ("LORA, rank 4, alpha 8", "of the base  base", "down_proj, gate_proj"):
        assert part in text, part
    assert run("inspect", world["base"], "--json").json["adapter"] is None
    assert run("verify", world["math"]).code == 0


@pytest.mark.parametrize("changes", [{"peft_type": "IA3"}, {"use_rslora": True, "layer_replication": [[0, 1]]}])
def test_inspect_an_adapter_of_no_use(world: dict[str, Path], tmp_path: Path, changes: Mapping[str, Any]) -> None:
    write_adapter(tmp_path / "odd", {"model.norm.weight": np.ones(3, np.float32)}, **changes)
    found = run("inspect", tmp_path / "odd", "--json").json["adapter"]
    assert (found["type"], bool(found["problem"]), found["ranks"]) == (changes.get("peft_type", "LORA"), True, [])
    assert "not usable" in run("inspect", tmp_path / "odd").out
