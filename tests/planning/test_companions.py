"""Files beside the weights: what a result has of them, what it says that it lacks, and links that lead out of a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import moerge as api
from moerge.checkpoint.companions import is_inside
from moerge.checkpoint.reader import open_folder
from moerge.hub import own_files
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import edit_config, make_models, write_json, write_recipe

AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}


def with_code(folder: Path) -> None:
    (folder / "configuration_mine.py").write_text("class MineConfig: ...\n")
    (folder / "modeling_mine.py").write_text("from .configuration_mine import MineConfig\nfrom .layers_mine import Layer\n")
    (folder / "layers_mine.py").write_text("class Layer: ...\n")
    (folder / "handler.py").write_text("raise SystemExit\n")
    edit_config(folder, model_type="mine", auto_map=AUTO_MAP)


def test_code_goes_along(tmp_path: Path) -> None:
    for folder in make_models(tmp_path, experts=("math",)).values():
        with_code(folder)
    plan = api.plan(write_recipe(tmp_path, experts=("math",), merge={"method": "average"}))
    out = api.merge(plan, tmp_path / "out").folder
    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert sorted(path.name for path in out.glob("*.py")) == ["configuration_mine.py", "layers_mine.py", "modeling_mine.py"]
    warnings = " ".join(plan.warnings)
    assert "base runs by code of its own" in warnings and "modeling_mine.py" in warnings
    assert "the result lacks: handler.py" in warnings


def test_code_that_is_not_there_or_elsewhere(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    recipe = write_recipe(tmp_path, experts=("math",), merge={"method": "average"})
    for folder in models.values():
        edit_config(folder, auto_map=AUTO_MAP)
    plan = api.plan(recipe)
    assert "auto_map" not in plan.config and any("names code that its folder lacks" in text for text in plan.warnings)
    elsewhere = {"AutoModelForCausalLM": "owner/name--modeling_mine.Mine"}
    for folder in models.values():
        edit_config(folder, auto_map=elsewhere)
    plan = api.plan(recipe)
    assert plan.config["auto_map"] == elsewhere and plan.warnings == ()


def test_a_tokenizers_own_code(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    (models["math"] / "tokenization_mine.py").write_text("class Mine: ...\n")
    settings = json.loads((models["math"] / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    write_json(models["math"] / "tokenizer_config.json", settings)
    plan = api.plan(write_recipe(tmp_path, experts=("math",), tokenizer="math"))
    assert "tokenization_mine.py" in plan.files


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def test_processors_and_poolings(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    base = models["base"]
    for name in (*PROCESSORS, "config_sentence_transformers.json", "sentence_bert_config.json"):
        (base / name).write_text(f'{{"of": "{name}"}}')
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../outside"}]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    for stale in (
        "pytorch_model.bin",
        "training_args.bin",
        "README.md",
        "LICENSE",
        "trainer_state.json",
        "figure.png",
        ".gitattributes",
    ):
        (base / stale).write_bytes(b"stale")
    for folder in ("onnx", "runs", "checkpoint-500", "assets"):
        (base / folder).mkdir()
        (base / folder / "model.onnx").write_bytes(b"stale")
    (base / "bias.dat").write_bytes(b"1")
    recipe = write_recipe(tmp_path, experts=("math",))
    plan = api.plan(recipe)
    out = api.merge(plan, tmp_path / "out").folder
    for name in (
        *PROCESSORS,
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "modules.json",
        "1_Pooling/config.json",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert [text for text in plan.warnings if "lacks" in text] == ["files of base that the result lacks: assets/, bias.dat"]
    assert moerge("verify", out, "--quiet").code == 0
    assert "1_Pooling/config.json" in own_files(open_folder(out))
    (out / "1_Pooling" / "config.json").write_text("{}")
    assert "1_Pooling/config.json was changed" in moerge("verify", out).err
    api.merge(recipe, out, force=True)
    assert moerge("verify", out, "--quiet").code == 0


def test_what_a_mixture_lacks_is_named(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    (models["base"] / "preprocessor_config.json").write_text("{}")
    plan = api.plan(write_recipe(tmp_path, experts=("math",), moe={"router": {"kind": "random"}}))
    assert "files of base that the result lacks: preprocessor_config.json" in plan.warnings


NAMES = ("chat_template.jinja", "generation_config.json", "preprocessor_config.json", "added_tokens.json")


@pytest.mark.parametrize("name", NAMES)
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    models = make_models(tmp_path, experts=("math",))
    (tmp_path / "secret").write_text('{"secret": 1}')
    (models["base"] / name).unlink(missing_ok=True)
    (models["base"] / name).symlink_to(tmp_path / "secret")
    refuses(write_recipe(tmp_path, experts=("math",)), tmp_path / "out", name, "is a link to", "outside of the model's folder")


@pytest.mark.parametrize("hostile", [False, True])
def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, hostile: bool) -> None:
    """Snapshots hold links to blobs beside them; blobs that are links themselves lead elsewhere."""
    models = make_models(tmp_path, experts=("math",))
    snapshot = tmp_path / "models--org--base" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    if hostile:
        (tmp_path / "elsewhere").mkdir()
        blobs.symlink_to(tmp_path / "elsewhere")
    else:
        blobs.mkdir()
    snapshot.mkdir()
    for path in models["base"].iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"blob-{path.name}", snapshot))
    recipe = write_recipe(tmp_path, base=str(snapshot), experts=("math",))
    if hostile:
        refuses(recipe, tmp_path / "out", "is a link to", "outside of the model's folder")
    else:
        assert "tokenizer.json" in api.plan(recipe).files


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a\\b", "a//b", "./a", "a\0b"])
def test_names_that_lead_out(name: str) -> None:
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json", "a..b"])
def test_names_that_do_not(name: str) -> None:
    assert is_inside(name)
