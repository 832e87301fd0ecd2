"""`moerge learn` on documents with images: the language model learns, transformers' modules are the judge."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moerge.recipe.coefficients import read_coefficients
from moerge.runtime.inputs import loaded_inputs, model_inputs
from moerge.runtime.loading import load, load_tokenizer
from moerge.texts import read_documents
from tests.helpers import hf_models
from tests.helpers.command import moerge
from tests.helpers.multimodal import VISION_LANGUAGE, save_with_processor, write_pictures

pytestmark = pytest.mark.slow
SCALE, TEXTS = 0.3, 3


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with models and what was learned from three documents of each expert; the models."""
    folder = tmp_path_factory.mktemp(request.param)
    models = save_with_processor(VISION_LANGUAGE[request.param](), folder, ("base", "math", "code"))
    recipe = {
        "base": "base",
        "experts": {"math": "math", "code": "code"},
        "merge": {"method": "task_arithmetic", "scale": SCALE},
        "calibration": {name: write_pictures(folder, name, TEXTS, seed=i).name for i, name in enumerate(("math", "code"))},
        "learn": {"objective": "entropy", "heldout": 0.0, "gamma": 0.0, "texts": TEXTS, "accumulation": 2 * TEXTS, "epochs": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = moerge("learn", folder / "recipe.yaml", folder / "out", "--json")
    assert done.code == 0, done.err
    return folder, models


def _merged(models: dict[str, Any], coefficients: Any) -> Any:
    """The base in float64 with the experts' task vectors added; `coefficients` gives those of a parameter."""
    base = hf_models.random_model(models["base"].config, 0).double()
    states = {name: model.double().state_dict() for name, model in models.items()}
    state = {}
    for name, value in states["base"].items():
        weights = coefficients(name)
        state[name] = value + sum(c * (states[e][name] - value) for c, e in zip(weights, ("math", "code"), strict=True))
    base.load_state_dict(state)
    return base.eval()


def _inputs(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    tokenizer = load_tokenizer(folder / "base")
    found = [model_inputs(tokenizer, document) for document in read_documents(str(folder / f"{name}.jsonl"))]
    return [{key: value.double() if value.is_floating_point() else value for key, value in one.items()} for one in found]


def test_the_first_loss_is_that_of_the_merge_on_images(learned: tuple[Path, dict[str, Any]]) -> None:
    folder, models = learned
    model, losses = _merged(models, lambda name: (SCALE, SCALE)), []
    for name in ("math", "code"):
        for inputs in _inputs(folder, name):
            assert "pixel_values" in inputs
            with torch.no_grad():
                log = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
            losses.append(float(-(log.exp() * log).sum(-1).mean()))
    with open(folder / "out" / "learning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = next(float(row["train"]) for row in rows if row["train"])
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_result_with_its_processor_gives_the_logits_of_the_merge(learned: tuple[Path, dict[str, Any]]) -> None:
    folder, models = learned
    found = read_coefficients(folder / "out" / "coefficients.json")
    assert found.by_tensor and not any("vis" in name for name in found.by_tensor)
    rows = {name.rpartition("layers.")[2]: [row[0] for row in values] for name, values in found.by_tensor.items()}
    assert any(abs(c - SCALE) > 1e-3 for row in rows.values() for c in row)

    def coefficients(name: str) -> Any:
        inside = "language_model.layers." in name
        return rows.get(name.rpartition("layers.")[2], (SCALE, SCALE)) if inside else (SCALE, SCALE)

    model, loaded = _merged(models, coefficients), load(folder / "out", dtype="float32")
    assert type(loaded.model) is type(models["base"])
    document = next(iter(read_documents(str(folder / "math.jsonl"))))
    inputs = loaded_inputs(loaded, document)
    with torch.no_grad():
        ours = loaded.model(**inputs, use_cache=False).logits
        wanted = model(**_inputs(folder, "math")[0], use_cache=False).logits
    torch.testing.assert_close(ours.double(), wanted, atol=2e-5, rtol=1e-5)


def test_an_image_that_cannot_be_read_ends_with_its_name(learned: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = learned
    picture = folder / "math1.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:40])
    done = moerge("learn", folder / "recipe.yaml", folder / "again")
    picture.write_bytes(content)
    assert done.code == 2 and "calibration.math" in done.err and "math1.png" in done.err, done.err
    assert not (folder / "again").exists()
