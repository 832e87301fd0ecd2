"""Routers fitted to calibration text: against slow references, and end to end through transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.staging import staging_folder
from moerge.errors import InputError
from moerge.routers.calibrated import collect
from moerge.routers.perplexity import PerplexityRouter
from moerge.routers.regression import normalize_gate, ridge
from moerge.routers.ridge import RidgeRouter
from moerge.runtime.forced_routing import ForcedRoutingModel
from moerge.runtime.replicas import ModelReplicas
from moerge.texts import overlap
from tests.helpers import tiny
from tests.helpers.recorded import Recorded

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

NAMES = ("base", *tiny.EXPERTS)
WORDS = {name: range(3 + 15 * index, 7 + 15 * index) for index, name in enumerate(NAMES)}


def documents(name: str, *, seed: int = 0, count: int = 12) -> list[str]:
    """Lines of the four words that only this expert's text has, of different lengths."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    return [" ".join(f"w{i}" for i in rng.choice(WORDS[name], 6 + number % 5)) for number in range(count)]


def write_texts(folder: Path, names: Sequence[str] = NAMES, **options: Any) -> dict[str, str]:
    for name in names:
        (folder / f"{name}.txt").write_text("\n\n".join(documents(name, **options)))
    return {name: f"{name}.txt" for name in names}


def merge(folder: Path, out: str, router: Mapping[str, Any], **sections: Any) -> dict[str, np.ndarray]:
    """Merge the tiny models in `folder`; the gates by name."""
    sections = {"calibration": {name: f"{name}.txt" for name in NAMES}, **sections}
    recipe = tiny.write_recipe(folder, merge={"method": "average"}, moe={"router": dict(router)}, **sections)
    moerge.merge(recipe, folder / out)
    return gates(folder / out)


def gates(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: value for name, value in tiny.read_values(checkpoint).items() if name.endswith(".gate.weight")}


def gate_name(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tiny.make_models(tmp_path, dtype="F32")
    write_texts(tmp_path)
    return tmp_path


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def by_hand(folder: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    """Of each expert's text through the merged backbone with its own FFN: router inputs a layer, and losses of each text.

    The dense merge is the backbone, and its `mlp` sees what the router would.
    """
    recipe = tiny.write_recipe(folder, "by-hand.yaml", merge={"method": "average"}, moe={})
    moerge.merge(recipe, folder / "by-hand")
    merged = tiny.read_values(folder / "by-hand")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    found = {}
    for name in NAMES:
        model = load(folder / name)
        shared = {key: torch.from_numpy(value) for key, value in merged.items() if "block_sparse_moe" not in key}
        assert not model.load_state_dict(shared, strict=False).unexpected_keys
        seen: list[list[Any]] = [[], []]
        for layer, kept in zip(model.model.layers, seen, strict=True):
            layer.mlp.register_forward_pre_hook(lambda module, inputs, kept=kept: kept.append(inputs[0][0].detach()))
        losses = []
        for document in documents(name):
            ids = tokenizer(document, return_tensors="pt").input_ids
            with torch.no_grad():
                losses.append(model(ids, labels=ids).loss.item())
        found[name] = ([torch.cat(kept).double().numpy() for kept in seen], losses)
    return found


def test_hidden_gates_are_differences_of_mean_router_inputs(models: Path) -> None:
    reference = by_hand(models)
    positive = merge(models, "positive", {"kind": "hidden", "negative": "none", "temperature": 0.5})
    difference = merge(models, "difference", {"kind": "hidden"})
    for layer in range(2):
        means = np.stack([reference[name][0][layer].mean(axis=0) for name in NAMES])
        unit = 2 * means / np.linalg.norm(means, axis=1, keepdims=True)
        np.testing.assert_allclose(positive[gate_name(layer)], unit, atol=1e-5)
        other = np.stack([means[i] - np.delete(means, i, axis=0).mean(axis=0) for i in range(4)])
        expected = other / np.linalg.norm(other, axis=1, keepdims=True)
        np.testing.assert_allclose(difference[gate_name(layer)], expected, atol=1e-4)


def test_ridge_gates_are_the_regression_on_router_inputs(models: Path) -> None:
    reference = by_hand(models)
    found = merge(models, "moe", {"kind": "ridge", "penalty": 0.1})
    for layer in range(2):
        states = [reference[name][0][layer] for name in NAMES]
        rows = np.concatenate([state / np.sqrt(len(state)) for state in states])
        targets = np.concatenate([np.tile(np.eye(4)[i], (len(s), 1)) / np.sqrt(len(s)) for i, s in enumerate(states)])
        strength = 0.1 * np.square(rows).sum() / 16
        solution = np.linalg.lstsq(
            np.concatenate([rows, np.sqrt(strength) * np.eye(16)]), np.concatenate([targets, np.zeros((16, 4))]), rcond=None
        )[0].T
        expected = 10 * solution / np.linalg.norm(solution, axis=1, keepdims=True)
        np.testing.assert_allclose(found[gate_name(layer)], expected, atol=2e-4)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_perplexity_gates_are_the_regression_on_which_expert_was_best(level: str, models: Path) -> None:
    options = {"kind": "perplexity", "level": level, "normalize": "none", "temperature": 1.0, "balance": False}
    found = merge(models, "moe", options)
    model = ForcedRoutingModel(models / "moe", experts=4, layers=2)
    moments, products = np.zeros((2, 16, 16)), np.zeros((2, 16, 4))
    chosen = set()
    for index, name in enumerate(NAMES):
        for document in documents(name):
            ids = model.encode(document, 512)
            losses = np.stack([model.losses(ids, path).numpy() for path in range(4)])
            for position in range(losses.shape[1]):
                best = int(losses.mean(axis=1).argmin() if level == "sequence" else losses[:, position].argmin())
                chosen.add(best)
                for layer, state in enumerate(model.router_inputs(ids, index)):
                    x = state[position].double().numpy()
                    moments[layer] += np.outer(x, x)
                    products[layer, :, best] += x
    assert len(chosen) > 1
    for layer in range(2):
        expected = normalize_gate(ridge(moments[layer], products[layer], 0.01), "none", 1.0)
        np.testing.assert_allclose(found[gate_name(layer)], expected, atol=1e-3)


def test_soft_targets_are_a_softmax_of_losses() -> None:
    losses = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])]
    soft = PerplexityRouter(level="token", target="softmax", softness=0.5).targets(losses)
    torch.testing.assert_close(soft, torch.softmax(torch.tensor([[-2.0, -4.0], [-6.0, -2.0]]), dim=1))
    whole = PerplexityRouter(target="softmax").targets(losses)
    torch.testing.assert_close(whole, torch.softmax(torch.tensor([[-2.0, -1.5]] * 2), dim=1))
    assert PerplexityRouter().targets(losses).tolist() == [[0, 1], [0, 1]]
    assert PerplexityRouter(level="token").targets(losses).tolist() == [[1, 0], [0, 1]]


def test_forced_paths_are_the_backbone_with_one_ffn_or_the_mean_of_all(models: Path) -> None:
    reference = by_hand(models)
    model = ForcedRoutingModel(models / "by-hand", experts=4, layers=2)
    for index, name in enumerate(NAMES):
        losses = [model.losses(model.encode(document, 512), index).mean().item() for document in documents(name)]
        np.testing.assert_allclose(losses, reference[name][1], rtol=1e-5)
    ids = model.encode(documents("math")[0], 512)
    moe = load(models / "by-hand")
    for layer in moe.model.layers:
        experts = layer.mlp.experts
        layer.mlp.forward = lambda x, experts=experts: sum(
            experts(x[0], torch.full((x.shape[1], 1), i), torch.ones(x.shape[1], 1)) / 4 for i in range(4)
        )[None]
    with torch.no_grad():
        uniform = torch.nn.functional.cross_entropy(moe(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(model.losses(ids, None), uniform, atol=1e-5, rtol=0)


def test_forcing_leaves_the_model_as_it_was(models: Path) -> None:
    merge(models, "moe", {"kind": "ridge"})
    model = ForcedRoutingModel(models / "moe", experts=4, layers=2)
    ids = model.encode("w3 w20 w40 w50", 512)
    before = model._model(ids).logits
    for path in (0, 3, None):
        model.router_inputs(ids, path)
        model.losses(ids, path)
    torch.testing.assert_close(model._model(ids).logits, before, atol=0, rtol=0)


def test_long_texts_are_cut(models: Path) -> None:
    merge(models, "moe", {"kind": "hidden"})
    model = ForcedRoutingModel(models / "moe", experts=4, layers=2)
    assert model.encode("w5 " * 40, 8).shape == (1, 8)
    with ModelReplicas(model, 2) as replicas:
        assert collect(replicas, ["w5 " * 40, "w6 w7"], 8, 1).tokens == 10


def test_projection_signs_are_those_of_the_skew_over_random_tokens(models: Path) -> None:
    merge(models, "mean", {"kind": "projection", "sign": "mean"}, calibration={})
    found = merge(models, "skew", {"kind": "projection"}, calibration={})
    model = ForcedRoutingModel(models / "skew", experts=4, layers=2)
    runs = [model.router_inputs(model.random_tokens(seed, 128), None) for seed in range(24)]
    for layer in range(2):
        states = torch.cat([run[layer] for run in runs]).double().numpy()
        gate, mean = found[gate_name(layer)], gates(models / "mean")[gate_name(layer)]
        np.testing.assert_allclose(np.abs(gate), np.abs(mean), rtol=1e-5)
        assert ((states @ gate.T)[:, 1:] ** 3).sum(axis=0).min() > 0


def test_the_same_recipe_gives_the_same_bytes(models: Path) -> None:
    for kind in ("hidden", "ridge", "perplexity", "projection"):
        once, again = (merge(models, f"{kind}-{run}", {"kind": kind}) for run in "ab")
        assert {name: value.tobytes() for name, value in once.items()} == {k: v.tobytes() for k, v in again.items()}
        files = [(models / f"{kind}-{run}" / "model.safetensors").read_bytes() for run in "ab"]
        assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["hidden", "ridge", "perplexity", "projection"])
def test_the_result_is_an_ordinary_mixtral_with_gates(kind: str, models: Path) -> None:
    out = models / "moe"
    calibration = {} if kind == "projection" else {"calibration": {name: f"{name}.txt" for name in NAMES}}
    recipe = tiny.write_recipe(models, moe={"router": {"kind": kind}}, dtype="bfloat16", **calibration)
    moerge.merge(recipe, out, max_shard_bytes=9000)
    assert moerge.verify(out).problems == ()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "MixtralForCausalLM"
    assert len(gates(out)) == 2 and all(np.abs(gate).max() > 0.01 for gate in gates(out).values())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert sorted(path.name for path in out.iterdir() if path.is_file() and "0000" not in path.name) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "moerge.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_ridge_sends_held_out_text_to_its_expert(models: Path) -> None:
    merge(models, "moe", {"kind": "ridge"})
    model, encode = load(models / "moe"), ForcedRoutingModel(models / "moe", experts=4, layers=2).encode
    for index, name in enumerate(NAMES):
        with torch.no_grad():
            routed = [model(encode(text, 512), output_router_logits=True).router_logits for text in documents(name, seed=1)]
        chosen = torch.cat([logits_TE.argmax(dim=1) for layers in routed for logits_TE in layers])
        assert (chosen == index).float().mean() > 0.6  # of random embeddings; 0.25 by chance


def test_manifest_and_card_tell_what_was_calibrated_on(models: Path) -> None:
    merge(models, "moe", {"kind": "ridge", "texts": 5})
    manifest = read_manifest(models / "moe")
    assert manifest is not None
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert {name: entry["location"] for name, entry in manifest["calibration"].items()} == {n: f"{n}.txt" for n in NAMES}
    assert overlap([text for name in NAMES for text in documents(name)], manifest) == 4 * 5
    assert overlap([text for name in NAMES for text in documents(name, seed=1)], manifest) == 0
    card = (models / "moe/README.md").read_text()
    assert "Router: ridge, computed, not trained." in card
    assert "Calibration texts: base 5 from `base.txt`, math 5 from `math.txt`" in card


def test_statistics_stand_for_text_when_an_expert_comes_or_goes(models: Path) -> None:
    kept = {"kind": "ridge", "statistics": "stats"}
    base_first = {"merge": {"method": "task_arithmetic", "scale": 0.0}}  # a backbone that no expert changes

    def run(out: str, experts: Sequence[str], texts: Sequence[str], router: Mapping[str, Any]) -> dict[str, np.ndarray]:
        calibration = {name: f"{name}.txt" for name in texts}
        moe = {"router": dict(router)}
        recipe = tiny.write_recipe(models, experts=experts, moe=moe, calibration=calibration, **base_first)
        result = moerge.merge(recipe, models / out)
        assert result.plan.warnings == ()
        return gates(models / out)

    run("two", ["math", "code"], ["base", "math", "code"], kept)
    assert sorted(path.name for path in (models / "stats").iterdir()) == [f"{n}.safetensors" for n in ("base", "code", "math")]
    added = run("added", tiny.EXPERTS, ["knowledge"], kept)
    whole = run("whole", tiny.EXPERTS, NAMES, {"kind": "ridge"})
    removed = run("removed", ["code", "knowledge"], [], kept)
    never = run("never", ["code", "knowledge"], ["base", "code", "knowledge"], {"kind": "ridge"})
    for one, other in ((added, whole), (removed, never)):
        assert {name: gate.tobytes() for name, gate in one.items()} == {name: gate.tobytes() for name, gate in other.items()}
    manifest = read_manifest(models / "removed")
    assert manifest is not None and overlap(documents("code"), manifest) == 12


@pytest.mark.parametrize("kind", ["ridge", "hidden"])
def test_an_expert_joins_a_mixture_by_its_own_text_alone(models: Path, kind: str) -> None:
    everyone = {"origin": "base", **{name: name for name in tiny.EXPERTS}}
    base = {"method": "passthrough", "model": "origin"}

    def run(out: str, experts: Mapping[str, str], texts: Sequence[str], merge: Mapping[str, Any]) -> Any:
        recipe = {
            "experts": {name: str(models / model) for name, model in experts.items()},
            "merge": dict(merge),
            "moe": {"router": {"kind": kind}, "top_k": 2},
            "calibration": {name: str(models / f"{everyone[name.removeprefix('the_')]}.txt") for name in texts},
        }
        return moerge.merge(recipe, models / out).plan

    three = {f"the_{name}": model for name, model in everyone.items() if name != "knowledge"}
    own = {"method": "passthrough", "model": "the_origin"}
    run("three", three, list(three), own)
    stored = {path.name for path in (models / "three/router_statistics").iterdir()}
    assert stored == {f"{name}.safetensors" for name in three}
    taken = {name.removeprefix("the_"): f"three#{name}" for name in three}
    plan = run("four", {**taken, "knowledge": "knowledge"}, ["knowledge"], base)
    assert plan.warnings == ()
    run("whole", everyone, list(everyone), base)
    whole, four = tiny.read_tensors(models / "whole"), tiny.read_tensors(models / "four")
    assert {name: array.tobytes() for name, array in whole.items()} == {name: array.tobytes() for name, array in four.items()}
    fewer = run("fewer", {"x": "four#math", "y": "four#knowledge"}, [], {"method": "passthrough", "model": "x"})
    assert not fewer.calibration[0].documents and (models / "fewer/router_statistics/x.safetensors").exists()
    shutil.rmtree(models / "three/router_statistics")
    with pytest.raises(InputError, match="math: FILE"):
        run("never", {**taken, "knowledge": "knowledge"}, ["origin", "knowledge"], base)


def test_statistics_of_another_backbone_are_used_with_a_warning(models: Path) -> None:
    router = {"kind": "hidden", "statistics": "stats"}
    merge(models, "first", router)
    recipe = tiny.write_recipe(models, merge={"method": "ties"}, moe={"router": router}, calibration={"base": "base.txt"})
    result = moerge.merge(recipe, models / "second")
    (warning,) = result.plan.warnings
    assert warning.startswith("the router statistics of math, code, knowledge were computed on another merged model")
    assert warning in (models / "second/README.md").read_text()
    assert warning in json.loads((models / "second/moerge.json").read_text())["warnings"]


def test_text_that_changed_is_run_again(models: Path) -> None:
    router = {"kind": "ridge", "statistics": "stats"}
    before = merge(models, "before", router)
    stamps = {path.name: path.stat().st_mtime_ns for path in (models / "stats").iterdir()}
    write_texts(models, ["math"], seed=5)
    after = merge(models, "after", router)
    changed = {path.name for path in (models / "stats").iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert changed == {"math.safetensors"}
    assert any((before[name] != after[name]).any() for name in before)
    np.testing.assert_array_equal(after[gate_name(0)], merge(models, "fresh", {"kind": "ridge"})[gate_name(0)])


def test_interrupted_while_calibrating_resumes_to_the_same_bytes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.write_recipe(models, moe={"router": {"kind": "ridge"}}, calibration={name: f"{name}.txt" for name in NAMES})
    moerge.merge(recipe, models / "whole")

    def interrupted(self: RidgeRouter, context: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RidgeRouter, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            moerge.merge(recipe, models / "moe")
    assert staging_folder(models / "moe").exists() and not (models / "moe").exists()
    moerge.merge(recipe, models / "moe", resume=True)
    for name in ("model.safetensors", "moerge.json", "README.md"):
        assert (models / "moe" / name).read_bytes() == (models / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["ridge", "hidden", "perplexity"])
def test_progress_counts_texts(kind: str, models: Path) -> None:
    (models / "math.txt").write_text("\n\n".join([*documents("math"), "w5"]))  # one too short for the perplexity router
    progress = Recorded()
    router = {"kind": kind, "texts": 13, **({"statistics": "stats"} if kind == "ridge" else {})}
    recipe = tiny.write_recipe(models, moe={"router": router}, calibration={name: f"{name}.txt" for name in NAMES})
    for out in ("once", "again"):  # the second time the ridge router's statistics are at hand
        moerge.merge(recipe, models / out, progress=progress)
    assert progress.totals("texts") == [49, 49] and progress.done["texts"] == 98 and not progress.totals("tokens")
    dense = tiny.write_recipe(models, "dense.yaml")
    moerge.merge(dense, models / "dense", progress=progress)
    assert len(progress.totals("texts")) == 2


def test_the_plan_tells_what_the_router_costs(models: Path) -> None:
    def plan(router: Mapping[str, Any]) -> Any:
        calibration = {} if router["kind"] in ("random", "projection") else {name: f"{name}.txt" for name in NAMES}
        return moerge.plan(tiny.write_recipe(models, moe={"router": dict(router)}, calibration=calibration))

    ridge, random = plan({"kind": "ridge"}), plan({"kind": "random"})
    assert (random.fitting_seconds, random.fitting_bytes()) == (0, 0)
    assert ridge.seconds == pytest.approx(random.seconds + ridge.fitting_seconds)
    tokens = sum(1 + len(document) // 4 for name in NAMES for document in documents(name))
    module, layers, hidden = 2 * 3 * 16 * 24, 2, 16
    shared = ridge.parameters - 4 * module
    reading = 5 + ridge.output_bytes / 2e9
    assert ridge.fitting_seconds == pytest.approx(reading + 2 * tokens * (shared + module + layers * hidden**2) / 2e11)
    perplexity = plan({"kind": "perplexity"}).fitting_seconds - reading
    assert perplexity == pytest.approx(2 * tokens * (5 * (shared + module) + layers * hidden**2) / 2e11)
    uniform = plan({"kind": "ridge", "path": "uniform"}).fitting_seconds - reading
    assert uniform == pytest.approx(2 * tokens * (shared + 4 * module + layers * hidden**2) / 2e11)
    assert plan({"kind": "ridge", "device": "cuda"}).fitting_seconds < ridge.fitting_seconds
    assert plan({"kind": "projection"}).fitting_seconds > plan({"kind": "projection", "sign": "mean"}).fitting_seconds > 0
    more = ridge.fitting_bytes(3) - ridge.fitting_bytes(1)
    assert more == 2 * 512 * (layers * hidden + 3 * tiny.VOCABULARY) * 4
    assert ridge.summary(1)["fitting_seconds_estimated"] == round(ridge.fitting_seconds, 1)


def test_resume_refuses_other_calibration_text(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.write_recipe(models, moe={"router": {"kind": "ridge"}}, calibration={name: f"{name}.txt" for name in NAMES})
    with monkeypatch.context() as patch:
        patch.setattr(ForcedRoutingModel, "router_inputs", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            moerge.merge(recipe, models / "moe")
    write_texts(models, ["code"], seed=9)
    with pytest.raises(InputError, match="had another recipe, other inputs or options"):
        moerge.merge(recipe, models / "moe", resume=True)


def test_without_torch_nothing_is_written(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"the ridge router needs torch: pip install 'moerge\[mod"):
        merge(models, "moe", {"kind": "ridge"})
    assert not (models / "moe").exists() and not staging_folder(models / "moe").exists()


def test_without_a_tokenizer_calibration_is_refused_while_planning(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, tokenizer=False)
    texts = write_texts(tmp_path)
    with pytest.raises(InputError, match="calibration needs a tokenizer, and base has none: name another with 'tokenizer'"):
        moerge.plan(tiny.write_recipe(tmp_path, moe={"router": {"kind": "ridge"}}, calibration=texts))


def test_a_device_that_is_not_there_is_named(models: Path) -> None:
    with pytest.raises(InputError, match=r"moe\.router\.device: 'warp' cannot be used here"):
        merge(models, "moe", {"kind": "ridge", "device": "warp"})
