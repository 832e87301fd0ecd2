"""`moerge stats`, and merging with what it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.manifest import read_manifest
from moerge.statistics import files
from moerge.texts import overlap
from tests.gather import gathered_texts as texts
from tests.helpers import tiny
from tests.helpers.command import moerge, refuses

torch = pytest.importorskip("torch", reason="needs moerge[models]")
pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tiny.make_models(tmp_path, dtype="F32")
    return tmp_path


def fails(*arguments: object) -> str:
    """The one line that the command says, which writes nothing."""
    result = moerge(*arguments)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1), result
    return result.err.strip().removeprefix("moerge: ")


def arrays(path: Path) -> dict[str, np.ndarray]:
    found = files.open_statistics(path)
    return {name: tensor.open().read(0, np.empty(tensor.size, np.float32)) for name, tensor in found.stored.items()}


def one_expert(folder: Path, **sections: Any) -> Path:
    return texts.recipe(folder, experts=["math"], base=None, calibration=texts.write_texts(folder, ["math"]), **sections)


def test_fisher_from_text_to_checkpoint(models: Path) -> None:
    recipe = texts.recipe(
        models,
        experts={"math": {"model": "math", "weight": 2.0}, "code": "code"},
        calibration=texts.write_texts(models, ["math", "code"]),
    )
    result = moerge("stats", recipe, models / "stats", "--json")
    assert result.code == 0, result.err
    assert result.err.splitlines() == [
        "math: one pass over 52 tokens, 47.7 kB for the model and sums",
        "code: one pass over 52 tokens, 47.7 kB for the model and sums",
    ]
    told = result.json
    assert told["folder"] == str(models / "stats")
    assert list(told["experts"]) == ["math", "code"]
    expected = {"gathered": True, "sequences": 9, "tokens": 52, "fisher": 21, "grams": 0, "without": {"fisher": []}, "passes": 1}
    assert {key: told["experts"]["math"][key] for key in expected} == expected
    assert moerge("merge", recipe, models / "out").code == 0
    values = {name: tiny.read_values(models / name) for name in ("math", "code")}
    found = {name: texts.of(models / "stats", name) for name in values}
    for name, merged in tiny.read_values(models / "out").items():
        shares = []
        for weight, statistics in zip((2, 1), found.values(), strict=True):
            square = texts.read(statistics, "fisher", name).astype(np.float64) / 9
            shares.append(weight * np.maximum(square, 1e-6 * statistics.fisher_mean / 9))
        mean = sum(share * values[model][name] for share, model in zip(shares, values, strict=True)) / sum(shares)
        np.testing.assert_allclose(merged, mean, rtol=1e-5, atol=1e-6)


def test_regmean_from_text_to_checkpoint(models: Path) -> None:
    recipe = texts.recipe(models, "regmean")
    assert moerge("stats", recipe, models / "stats").code == 0
    result = moerge("plan", recipe, "--json")
    assert result.json["operations"] == {"average": 6, "regmean": 15}
    assert result.json["warnings"] == []
    assert moerge("merge", recipe, models / "out").code == 0
    values = {name: tiny.read_values(models / name) for name in tiny.EXPERTS}
    merged = tiny.read_values(models / "out")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        grams = [texts.gram(texts.of(models / "stats", expert), name) / 52 for expert in tiny.EXPERTS]
        grams = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
        right = sum(gram @ values[expert][name].T for gram, expert in zip(grams, tiny.EXPERTS, strict=True))
        np.testing.assert_allclose(merged[name], np.linalg.solve(sum(grams), right).T, atol=1e-4)
    norm = "model.norm.weight"
    np.testing.assert_allclose(merged[norm], np.mean([values[e][norm] for e in tiny.EXPERTS], axis=0), rtol=1e-6)


def test_the_manifest_knows_the_text(models: Path) -> None:
    recipe = texts.recipe(models)
    moerge("stats", recipe, models / "stats", "--texts", 5)
    assert moerge("merge", recipe, models / "out").code == 0
    manifest = read_manifest(models / "out")
    assert manifest is not None
    entry = manifest["statistics"]["math"]
    assert entry["file"] == str(models / "stats" / "math.safetensors")
    assert (entry["sequences"], entry["settings"]["tokens"], len(entry["documents"])) == (5, 512, 5)
    assert overlap(texts.documents("math"), manifest) == 5
    assert moerge("verify", models / "out").code == 0


def test_running_it_again_does_nothing(models: Path) -> None:
    recipe = one_expert(models)
    moerge("stats", recipe, models / "stats")
    path = models / "stats" / "math.safetensors"
    before = path.stat()
    result = moerge("stats", recipe, models / "stats", "--json")
    assert (result.json["experts"]["math"]["gathered"], result.err) == (False, "")
    assert "were there already" in " ".join(moerge("stats", recipe, models / "stats").out.split())
    os.utime(models / "math" / "model.safetensors")  # another time, the same bytes
    assert moerge("stats", recipe, models / "stats").code == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert moerge("stats", recipe, models / "stats", "--force").code == 0
    assert path.stat().st_ino != before.st_ino


def test_other_inputs_need_force(models: Path) -> None:
    recipe = one_expert(models)
    moerge("stats", recipe, models / "stats", "--texts", 3)
    path = models / "stats" / "math.safetensors"

    def differs(what: str, *options: object) -> None:
        expected = f"{path} holds statistics of other {what}: choose another folder, or replace it with --force"
        assert fails("stats", recipe, models / "stats", *options) == expected

    differs("text", "--texts", 4)
    differs("text", "--texts", 3, "--part", "1/2")
    differs("settings", "--texts", 3, "--tokens", 5)
    differs("settings", "--texts", 3, "--labels", "sampled")
    differs("tensors", "--texts", 3, "--kind", "all")
    tensors = {name: array + 1 for name, array in tiny.read_values(models / "math").items()}
    tiny.write_checkpoint(models / "math", tensors, dtype="F32")
    differs("weights", "--texts", 3)
    assert moerge("stats", recipe, models / "stats", "--texts", 4, "--force").code == 0


def test_parts_add_up_to_the_whole(models: Path) -> None:
    recipe = texts.recipe(models, calibration=texts.write_texts(models))
    assert moerge("stats", recipe, models / "whole", "--kind", "all", "--quiet").out == ""
    for part in (1, 2, 3):
        moerge("stats", recipe, models / str(part), "--kind", "all", "--part", f"{part}/3")
    added = [option for part in (1, 2, 3) for option in ("--add", models / str(part))]
    result = moerge("stats", recipe, models / "sum", *added, "--json")
    assert (result.code, list(result.json["experts"])) == (0, list(tiny.EXPERTS))
    whole, total = texts.of(models / "whole"), texts.of(models / "sum")
    assert (whole.facts.sequences, whole.facts.tokens) == (total.facts.sequences, total.facts.tokens)
    assert sorted(whole.facts.documents) == sorted(total.facts.documents)
    one, other = arrays(whole.path), arrays(total.path)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6 * np.abs(one[name]).max())
    again = moerge("stats", recipe, models / "sum", *added, "--json").json["experts"]
    assert [expert["gathered"] for expert in again.values()] == [False] * 3
    assert fails("stats", recipe, models / "sum", *added[:4], "--expert", "math").endswith(
        "holds another sum: choose another folder, or replace it with --force"
    )
    once_more = fails("stats", recipe, models / "more", "--add", models / "sum", "--add", models / "1")
    assert "of its texts are counted in another file too" in once_more


def test_statistics_of_different_experts_may_lie_in_different_folders(models: Path) -> None:
    recipe = texts.recipe(models, merge={"method": "fisher", "statistics": ["a", "b"]})
    moerge("stats", recipe, models / "a", "--expert", "math", "--expert", "code")
    moerge("stats", recipe, models / "b", "--expert", "knowledge")
    assert sorted(path.name for path in (models / "a").iterdir()) == ["code.safetensors", "math.safetensors"]
    assert moerge("plan", recipe).code == 0
    moerge("stats", recipe, models / "b", "--expert", "math")
    line = refuses(recipe, models / "out", "statistics of math lie in")
    assert line.endswith(
        f"name one of these folders, or add them up with 'moerge stats {recipe} OUT --expert math "
        f"--add {models / 'a'} --add {models / 'b'}'\n".rstrip()
    )


def test_a_moe_needs_only_what_is_merged(models: Path) -> None:
    """Feed-forward layers are copied, so their Gram matrices, the largest ones, are not gathered; the base is an expert."""
    recipe = texts.recipe(models, "regmean", moe={"router": {"kind": "random"}})
    assert moerge("stats", recipe, models / "stats").code == 0
    assert sorted(path.stem for path in (models / "stats").iterdir()) == ["base", "code", "knowledge", "math"]
    grams = texts.of(models / "stats", "base").facts.grams
    assert grams and not any("mlp" in name for name in grams)
    result = moerge("plan", recipe, "--json")
    assert result.json["operations"] == {"average": 6, "regmean": 9, "copy": 24, "draw": 2}
    assert moerge("merge", recipe, models / "out").code == 0
    dense = texts.recipe(models, "regmean", "dense.yaml")
    line = refuses(dense, models / "dense", "has no Gram matrix of tensor 'model.layers.0.mlp.gate_proj.weight'")
    assert "--expert math --kind regmean --force'" in line


def test_overrides_gather_what_they_need(models: Path) -> None:
    merge = {"method": "average", "overrides": [{"match": "attention", "method": "regmean", "statistics": "stats"}]}
    merge["overrides"].append({"match": "norm", "method": "fisher", "statistics": "stats"})
    recipe = texts.recipe(models, merge=merge)
    assert moerge("stats", recipe, models / "stats").code == 0
    facts = texts.of(models / "stats").facts
    assert {name.rpartition(".self_attn.")[2] for name in facts.grams} == {f"{part}_proj.weight" for part in "qkvo"}
    assert all("norm" in name for name in facts.fisher) and len(facts.fisher) == 5
    assert moerge("plan", recipe, "--json").json["operations"] == {"average": 8, "regmean": 8, "fisher": 5}


def test_tied_embeddings(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, tied=True)
    for method in ("fisher", "regmean"):
        recipe = texts.recipe(tmp_path, name=f"{method}.yaml", merge={"method": method, "statistics": method})
        assert moerge("stats", recipe, tmp_path / method).code == 0
        assert moerge("merge", recipe, tmp_path / f"out-{method}").code == 0
    settings = texts.of(tmp_path / "fisher").facts.settings
    assert settings.dtype == "bfloat16"  # as stored


def test_float16_runs_in_float32(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, dtype="F16", config={"torch_dtype": "float16"}, experts=["math"])
    recipe = one_expert(tmp_path)
    assert moerge("stats", recipe, tmp_path / "stats").code == 0
    assert texts.of(tmp_path / "stats").facts.settings.dtype == "float32"


def test_interrupting_it_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = texts.recipe(models)
    moerge("stats", recipe, models / "stats", "--expert", "math")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moerge.gather.gather.check_finite", interrupt)
    result = moerge("stats", recipe, models / "stats", "--quiet")
    assert (result.code, result.err) == (130, "moerge: interrupted\n")
    assert [path.name for path in (models / "stats").iterdir()] == ["math.safetensors"]


def test_a_full_gpu_is_the_machines_fault(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moerge.gather.gather.fisher_sums", full)
    result = moerge("stats", one_expert(models), models / "stats", "--quiet")
    assert (result.code, result.err) == (
        1,
        "moerge: math: the GPU's memory does not suffice: try more --passes, fewer --tokens, --dtype bfloat16 or --device cpu\n",
    )
    assert list((models / "stats").iterdir()) == []


def test_models_that_compute_nan_are_refused(models: Path) -> None:
    tensors = tiny.read_values(models / "math")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(np.inf)
    tiny.write_checkpoint(models / "math", tensors, dtype="F32")
    result = moerge("stats", one_expert(models), models / "stats", "--quiet")
    assert result.code == 2
    assert "math: the sums for 'model.embed_tokens.weight' are not finite: gather with --dtype float32" in result.err
    assert list((models / "stats").iterdir()) == []


def test_refusals(models: Path) -> None:
    out = models / "stats"
    plain = texts.recipe(models, "average", "plain.yaml")
    recipe = texts.recipe(models, calibration={"math": "math.txt"})
    none = "uses no statistics: choose 'method: fisher' or 'method: regmean', or say which to gather with --kind"
    assert fails("stats", plain, out) == f"{plain} {none}"
    assert fails("stats", recipe, out, "--expert", "base") == f"{recipe} {none.replace('statistics', 'statistics of base', 1)}"
    assert (
        fails("stats", recipe, out, "--expert", "maths") == f"--expert 'maths' is not a model of {recipe}, did you mean 'math'?"
    )
    assert fails("stats", recipe, out) == f"{recipe}: statistics of code need its text: add 'code: FILE' to 'calibration'"
    for part in ("3/2", "0/2", "2", "1/x"):
        assert fails("stats", recipe, out, "--part", part) == f"--part {part!r} should be I/N with I from 1 to N, such as 1/4"
    assert fails("stats", recipe, out, "--expert", "math", "--part", "11/12") == (
        "calibration.math: there are only 9 texts, so part 11 has none"
    )
    only = "--add only adds up what was gathered: of the other options it takes --expert and --force alone"
    assert fails("stats", recipe, out, "--add", models, "--texts", 5) == only
    assert fails("stats", recipe, out, "--add", models) == (
        f"there are no statistics of any expert of this recipe in {models}: check the folders"
    )
    assert fails("stats", recipe, out, "--expert", "math", "--device", "nonsense").startswith(
        "the device 'nonsense' cannot be used here: "
    )
    (models / "math.txt").write_text("w5\n\nw6\n")
    assert fails("stats", recipe, out, "--expert", "math") == (
        "calibration.math: no text has two tokens: name a file with longer ones"
    )
    assert not out.exists()


def test_force_never_replaces_a_model(models: Path) -> None:
    """An expert called `model` would have its statistics where a checkpoint has its weights."""
    recipe = texts.recipe(models, experts={"model": "math"}, calibration={"model": "math.txt"})
    weights = models / "code" / "model.safetensors"
    before = weights.read_bytes()
    assert fails("stats", recipe, models / "code", "--force") == (
        f"{weights} is no statistics file, so --force does not replace it: remove it yourself, or choose another folder"
    )
    assert fails("stats", recipe, models / "code").startswith(f"{weights} holds no statistics that this moerge can read")
    assert weights.read_bytes() == before


def test_what_a_plan_needs_and_does_not_find(models: Path) -> None:
    recipe = texts.recipe(models)
    gather = f"moerge stats {recipe} {models / 'stats'} --expert math --kind fisher"
    assert (
        fails("plan", recipe) == f"{recipe}: there are no statistics of math in {models / 'stats'}: gather them with '{gather}'"
    )
    unnamed = texts.recipe(models, name="unnamed.yaml", merge={"method": "fisher"})
    assert fails("plan", unnamed) == (
        f"{unnamed}: fisher needs 'statistics': name the folder OUT that 'moerge stats {unnamed} OUT' writes"
    )
    moerge("stats", recipe, models / "stats", "--kind", "regmean")
    path = models / "stats" / "math.safetensors"
    assert fails("plan", recipe) == (
        f"{path} has no Fisher information of tensor 'model.embed_tokens.weight': gather it with "
        f"'moerge stats {recipe} {models / 'stats'} --expert math --kind all --force'"
    )
    moerge("stats", recipe, models / "stats", "--force")
    experts = {"math": {"model": "math", "weight": -3.0}, "code": "code"}
    negative = texts.recipe(models, name="negative.yaml", experts=experts, calibration={})
    assert fails("plan", negative) == f"{negative}: fisher needs weights of at least 0, but math has -3"


def test_statistics_of_another_model(models: Path) -> None:
    recipe = texts.recipe(models)
    moerge("stats", recipe, models / "stats")
    wider = models / "wider"
    tiny.make_models(wider, dtype="F32", config={"intermediate_size": 32})
    other = texts.recipe(wider, merge={"method": "fisher", "statistics": str(models / "stats")})
    assert fails("plan", other) == (
        f"{models / 'stats' / 'math.safetensors'} is of another model: its Fisher information does not fit tensor "
        "'model.layers.0.mlp.gate_proj.weight', whose shape is [32, 16] in math: gather it with "
        f"'moerge stats {other} {models / 'stats'} --expert math --kind fisher --force'"
    )
    tensors = {name: array * 2 for name, array in tiny.read_values(models / "math").items()}
    tiny.write_checkpoint(models / "math", tensors, dtype="F32")
    older = f"the statistics of math in {models / 'stats' / 'math.safetensors'} are older than its weights: gather them again"
    assert moerge("plan", recipe, "--json").json["warnings"] == [f"{older} if the weights differ"]
    result = moerge("merge", recipe, models / "out")
    assert result.code == 0
    assert (
        f"warning: the statistics of math in {models / 'stats' / 'math.safetensors'} were gathered on other weights than were "
        "merged, such as model.embed_tokens.weight: gather them again"
    ) in result.err
    manifest = json.loads((models / "out" / "moerge.json").read_text())
    assert len(manifest["warnings"]) == 2


def test_copies_elsewhere_are_the_same_model(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = texts.recipe(models)
    moerge("stats", recipe, models / "stats")
    copy = tmp_path_factory.mktemp("copy")
    tiny.make_models(copy, dtype="F32")
    other = texts.recipe(copy, merge={"method": "fisher", "statistics": str(models / "stats")})
    assert moerge("plan", other, "--json").json["warnings"] == []
    result = moerge("merge", other, copy / "out")
    assert (result.code, result.err) == (0, "")


def test_resuming_with_other_statistics_is_refused(models: Path) -> None:
    from moerge import plan

    recipe = texts.recipe(models)
    moerge("stats", recipe, models / "stats")
    first = plan(recipe).fingerprint
    assert plan(recipe).fingerprint == first
    moerge("stats", recipe, models / "stats", "--texts", 3, "--force")
    assert plan(recipe).fingerprint != first


def test_a_model_that_changes_while_it_runs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, source = one_expert(models), models / "math" / "model.safetensors"
    add = files.StatisticsWriter.add
    monkeypatch.setattr(files.StatisticsWriter, "add", lambda self, *rest: (os.utime(source), add(self, *rest))[1])
    result = moerge("stats", recipe, models / "stats", "--quiet")
    assert result.code == 1 and str(source) in result.err
    assert not list((models / "stats").iterdir())
