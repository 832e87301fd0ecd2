"""The ridge gate for whole sequences: against a dense regression, and on text that it was not fitted to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.routers.sequence import sequence_router
from moerge.routers.sequence_ridge import PENALTIES, SHARPNESS, Samples, cut_windows, mean_embeddings, window_length
from moerge.tensors.dtypes import F32
from moerge.tensors.tables import Table
from moerge.tensors.tensor import ArrayTensor
from tests.helpers import tiny
from tests.helpers.command import moerge as command
from tests.helpers.command import refuses

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

from moerge.modeling import register  # noqa: E402

pytestmark = pytest.mark.slow

NAMES = ("base", *tiny.EXPERTS)


def documents(name: str, *, seed: int = 0, count: int = 10) -> list[str]:
    """Mostly words that only this expert's text has, some that all have."""
    rng, index = np.random.default_rng([seed, NAMES.index(name)]), NAMES.index(name)
    own, common = range(3 + 15 * index, 12 + 15 * index), range(3, 63)
    return [
        " ".join(f"w{rng.choice(own if rng.random() < 0.6 else common)}" for _ in range(rng.integers(30, 90)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    folder = tmp_path_factory.mktemp("models")
    tiny.make_models(folder, dtype="F32", config={"torch_dtype": "float32"})
    for name in NAMES:
        (folder / f"{name}.txt").write_text("\n\n".join(documents(name)))
    return folder


def merge(models: Path, out: str, *, moe: Mapping[str, Any] | None = None, **router: Any) -> Path:
    section = {"format": "moerge", "top_k": 1, "router": {"kind": "ridge", **router}, **(moe or {})}
    calibration = {name: f"{name}.txt" for name in NAMES}
    recipe = tiny.write_recipe(models, f"{out}.yaml", merge={"method": "average"}, moe=section, calibration=calibration)
    moerge.merge(recipe, models / out, threads=1)
    return models / out


def accuracy(folder: Path, tokens: int) -> float:
    """How many beginnings of other texts, of so many tokens, the saved model sends to their own expert."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for index, name in enumerate(NAMES):
        for text in documents(name, seed=1):
            ids = torch.tensor([tokenizer(text)["input_ids"][:tokens]])
            found.append(int(model.route(ids).alpha[0].argmax()) == index)
    return float(np.mean(found))


def test_it_sends_other_text_to_its_expert(models: Path) -> None:
    out = merge(models, "homogeneous")
    config = json.loads((out / "config.json").read_text())
    assert config["routing"] == {"kind": "learned", "top_k": 1, "temperature": 1.0}
    assert accuracy(out, 64) >= 0.95
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(out)(documents("code", seed=1)[0])["input_ids"]])
    assert model.route(ids).scores[0].softmax(-1).max() > 0.9  # decisive


@pytest.mark.parametrize("embedding", ["shared", "separate"])
def test_experts_that_stay_whole_models(models: Path, embedding: str) -> None:
    out = merge(models, f"whole-{embedding}", moe={"embedding": embedding, "prefix_tokens": 24})
    routing = json.loads((out / "config.json").read_text())["routing"]
    assert (routing["kind"], routing["prefix_tokens"]) == ("learned", 24)
    gate = tiny.read_values(out)["router.weight"]
    assert gate.shape == (4, 16 if embedding == "shared" else 64) and gate.any()
    assert accuracy(out, 24) >= 0.9


def test_the_gate_is_the_regression_on_mean_embeddings(models: Path) -> None:
    """By hand, with the penalty given: what is left to find is one number, by which all of W is divided."""
    out = merge(models, "by-hand", penalty=0.1)
    values, tokenizer = tiny.read_values(out), transformers.AutoTokenizer.from_pretrained(out)
    rows, targets = [], []
    for index, name in enumerate(NAMES):
        means = []
        for text in documents(name):
            ids = tokenizer(text)["input_ids"]
            means += [values["model.embed_tokens.0.weight"][ids[s : s + 64]].mean(axis=0) for s in range(0, len(ids), 64)[:1]]
            if len(ids) >= 64 + 16:
                means.append(values["model.embed_tokens.0.weight"][ids[64:128]].mean(axis=0))
        rows.append(np.stack(means).astype(np.float64) / np.sqrt(len(means)))
        targets.append(np.tile(np.eye(4)[index], (len(means), 1)) / np.sqrt(len(means)))
    x, y = np.concatenate(rows), np.concatenate(targets)
    strength = 0.1 * np.square(x).sum() / 16
    expected = np.linalg.solve(x.T @ x + strength * np.eye(16), x.T @ y).T
    gate = values["router.weight"]
    ratio = float((gate * expected).sum() / np.square(expected).sum())
    assert np.isclose(1 / ratio, SHARPNESS, rtol=1e-4).sum() == 1
    np.testing.assert_allclose(gate, ratio * expected, atol=1e-4 * np.abs(gate).max())


def samples(count: int, width: int, *, apart: float = 1.0) -> Samples:
    rng = np.random.default_rng(0)
    expert, document = np.arange(count) % 2, np.arange(count) // 4
    features = rng.standard_normal((count, width))
    features[:, 0] += apart * (2 * expert - 1)
    return Samples(features, expert, document, 2)


@pytest.mark.parametrize(("count", "width"), [(40, 5), (12, 30)], ids=["many samples", "many features"])
def test_either_decomposition_solves_the_regression(count: int, width: int) -> None:
    some = samples(count, width)
    x = some.feature_SH * np.sqrt(some.weight_S)[:, None]
    y = np.eye(2)[some.expert_S] * np.sqrt(some.weight_S)[:, None]
    for penalty in (1e-3, 1.0):
        strength = penalty * np.square(x).sum() / width
        expected = np.linalg.solve(x.T @ x + strength * np.eye(width), x.T @ y).T
        np.testing.assert_allclose(some.regression()(penalty), expected, rtol=1e-6, atol=1e-9)


def test_text_decides_penalty_and_sharpness() -> None:
    router = sequence_router("ridge")()
    noisy, clear = samples(60, 40, apart=0.3), samples(400, 3, apart=8.0)
    assert router._strengths(noisy)[0] > router._strengths(clear)[0]  # type: ignore[attr-defined]
    assert router._strengths(noisy)[1] > router._strengths(clear)[1]  # type: ignore[attr-defined]
    assert router._strengths(noisy)[0] in PENALTIES  # type: ignore[attr-defined]
    assert router._strengths(samples(16, 3)) == (0.01, 0.1)  # type: ignore[attr-defined]
    assert sequence_router("ridge")(penalty=3.0)._strengths(samples(16, 3)) == (3.0, 0.1)  # type: ignore[attr-defined]


def test_windows() -> None:
    ids = np.arange(90)
    assert [len(window) for window in cut_windows(ids, 64)] == [64, 26]
    assert [len(window) for window in cut_windows(ids[:70], 64)] == [64]
    assert [len(window) for window in cut_windows(ids[:5], 64)] == [5]
    assert [len(window) for window in cut_windows(ids[:9], 4)] == [4, 4]
    assert cut_windows(ids[:0], 64) == []
    assert window_length({"routing": {"on": "prefix", "prefix_tokens": 7}}) == 7
    assert window_length({"routing": {"on": "sequence", "prefix_tokens": 7}}) == window_length({"routing": {}}) == 64


def test_mean_embeddings_read_the_rows_that_occur() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((5000, width)).astype(np.float32) for width in (3, 2)]
    arrays[0][4] = np.nan  # which no window has
    tables = [Table(ArrayTensor("t", F32, a.shape, a.reshape(-1)), "merged") for a in arrays]
    windows = [rng.integers(5, 5000, 60) for _ in range(30)] + [np.array([7, 7, 7])]
    actual = mean_embeddings(windows, [(tables[0], 1.0), (tables[1], 3.0)])
    expected = [np.concatenate([arrays[0][window].mean(axis=0), 3 * arrays[1][window].mean(axis=0)]) for window in windows]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_what_is_missing_is_said(models: Path) -> None:
    recipe = tiny.write_recipe(
        models, "lacking.yaml", moe={"format": "moerge", "router": {"kind": "ridge"}}, calibration={"base": "base.txt"}
    )
    refuses(recipe, models / "lacking", "the ridge router needs text for every expert: add 'math: FILE' to 'calibration'")


def test_the_plan_and_the_card_tell_of_it(models: Path) -> None:
    result = command("plan", models / "homogeneous.yaml")
    out = " ".join(result.out.split())
    assert result.code == 0 and result.err == ""
    assert "fit 1" in out and "ridge, temperature 1.0, texts 200" in out
    assert "the ridge router is computed after merging with a few tensors in memory" in out
    card = (models / "homogeneous" / "README.md").read_text()
    assert "ridge" in card and "untrained" not in card and "Calibration texts" in card
