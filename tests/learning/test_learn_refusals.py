"""What `moerge learn` cannot work with: one sentence each, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import moerge
from tests.helpers.tiny import edit_config, make_models, write_tokenizer
from tests.learning.learn_models import make_recipe

pytestmark = pytest.mark.slow


def write(folder: Path, models: Mapping[str, Path] | None = None, **sections: Any) -> Path:
    """A recipe that learns; its file."""
    recipe = make_recipe(folder, experts=["math", "code"], models=models, **{"learn": {}, **sections})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.written, sort_keys=False))
    return path


def refused(recipe: Path, *options: object) -> str:
    """The one line that `learn` says before it leaves with nothing written, without the recipe's name in front."""
    before = sorted(recipe.parent.iterdir())
    result = moerge("learn", recipe, recipe.parent / "out", "--quiet", *options)
    assert (result.code, result.out) == (2, ""), result
    assert sorted(recipe.parent.iterdir()) == before
    start = f"moerge: {recipe}"
    assert result.err.startswith(start) and result.err.count("\n") == 1, result.err
    return result.err[len(start) :].rstrip("\n")


NEARER = (
    "from which nothing can be learned: bring temperature, gamma, hidden_weight, task_weights and learning_rate nearer to their "
    "defaults"
)


@pytest.mark.parametrize(
    ("learn", "what"),
    [
        ({"temperature": 1e30}, "the objective on the held-out texts is inf"),
        ({"temperature": 1e30, "heldout": 0}, "the loss in update 1 is inf"),
        ({"gamma": 1e300, "heldout": 0, "epochs": 2}, "the loss in update 1 is nan"),
        ({"gamma": 1e37, "heldout": 0, "accumulation": 1}, "the gradient's norm in update 2 is inf"),
        ({"task_weights": {"math": 1e300}, "heldout": 0}, "the loss in update 1 is inf"),
    ],
)
def test_losses_that_are_no_numbers(tmp_path: Path, learn: dict[str, Any], what: str) -> None:
    assert refused(write(tmp_path, learn=learn)) == f": learn: {what}, {NEARER}"


def test_coefficients_that_a_failed_merge_left(tmp_path: Path) -> None:
    recipe, kept = write(tmp_path, learn={"gamma": float("inf")}), tmp_path / "out.coefficients.json"
    kept.write_text("precious")
    result = moerge("learn", recipe, tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (
        2,
        f"moerge: {kept} lies there, perhaps from a merge that failed: merge with it (method: coefficients), move it away, or "
        "replace it with --force\n",
    )
    assert kept.read_text() == "precious" and not (tmp_path / "out").exists()
    assert moerge("learn", recipe, tmp_path / "out", "--quiet", "--force").code == 0
    assert not kept.exists()


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path: Path, name: str) -> None:
    assert refused(write(tmp_path, learn={"device": name})).startswith(f": learn.device: {name!r} cannot be used here: ")


LAYERS = " learn.hidden_layers should be 'middle' or a list of layers, counted from 1, not "


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learn": {"hidden_layers": []}}, LAYERS + "[]"),
        ({"learn": {"hidden_layers": [0]}}, LAYERS + "[0]"),
        ({"learn": {"hidden_layers": "all"}}, LAYERS + "'all'"),
        ({"learn": {"targets": 0}}, " learn.targets should be 'full' or a whole number of at least 1, not 0"),
        ({"learn": {"threads": 0}}, " learn.threads should be greater than or equal to 1, not 0"),
        ({"learn": {"learning_rate": 1e300}}, " learn.learning_rate should be less than or equal to 1000000, not 1e+300"),
        ({"learn": {"hidden_layers": [3]}}, " learn.hidden_layers: there is no layer 3, the model has 2"),
        ({"learn": {"roles": ["norm"]}}, " no matrix has a role of learn.roles (norm): nothing to learn"),
        (
            {"moe": {"format": "moerge", "separate": ["ffn", "attention"], "include_base": False}},
            " moe.separate (ffn, attention) keeps every matrix of learn.roles (attention, ffn) separate: nothing to learn",
        ),
        (
            {"moe": {"format": "moerge", "separate": ["ffn"], "include_base": False}, "learn": {"roles": ["norm"]}},
            " no matrix has a role of learn.roles (norm): nothing to learn",
        ),
    ],
)
def test_settings(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    recipe = write(tmp_path)
    whole = {**yaml.safe_load(recipe.read_text()), **sections}
    recipe.write_text(yaml.safe_dump(whole, sort_keys=False))
    where, _, told = refused(recipe).partition(":")
    assert (where == "" or where.startswith(", line ")) and told == message


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=["math", "code"], dtype="F32", tied=True)
    assert refused(write(tmp_path, models, learn={"roles": ["head"]})) == (
        ": no matrix has a role of learn.roles (head); the head is the embedding, as tie_word_embeddings says: nothing to learn"
    )


def _no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _damaged_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def _large_tokenizer(model: Path) -> None:
    write_tokenizer(model, ["<unk>", "<s>", "</s>", *(f"w{i * 2}" for i in range(100)), *(f"w{i}" for i in range(3, 63, 2))])


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda model: edit_config(model, **values)


MODEL = ": transformers cannot make a model of the models' config.json: "


@pytest.mark.parametrize(
    ("change", "start", "end"),
    [
        (
            _no_tokenizer,
            ": learning needs a tokenizer, and no model has one: copy a tokenizer.json to the base's folder",
            "",
        ),
        (_damaged_tokenizer, ": transformers cannot load the tokenizer of base: ", ": fetch or copy it again"),
        (
            _large_tokenizer,
            ": calibration.math: the tokenizer makes token ",
            " of a text, but the embedding has 64 rows: give the models their own tokenizer",
        ),
        (_config(hidden_act="zzz"), f"{MODEL}KeyError: 'zzz'", ": check it, or upgrade transformers"),
        (_config(rope_scaling={"rope_type": "zzz"}), f"{MODEL}KeyError: 'zzz'", ": check it, or upgrade transformers"),
        (_config(attn_implementation="zzz"), f"{MODEL}ValueError: ", ": check it, or upgrade transformers"),
        (_config(architectures=["LlamaForCausalLM2"]), ": transformers ", ", so its coefficients cannot be learned"),
        (
            _config(architectures=["AutoConfig"]),
            f"{MODEL}AttributeError: type object 'AutoConfig' has no attribute '_from_config'",
            ": check it, or upgrade transformers",
        ),
    ],
)
def test_models_that_do_not_run(tmp_path: Path, change: Callable[[Path], None], start: str, end: str) -> None:
    models = make_models(tmp_path, experts=["math", "code"], dtype="F32")
    for model in models.values():
        change(model)
    message = refused(write(tmp_path, models))
    assert message.startswith(start) and message.endswith(end), message
