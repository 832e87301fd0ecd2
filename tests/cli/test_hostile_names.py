"""Names that come from files are shown as they are: no markup of rich's, no command to the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command import Result, moerge
from tests.helpers.tiny import edit_config, llama_config, llama_tensors, make_models, write_checkpoint, write_recipe

NAMES = {"[/x]": "[/x]", "[red]m": "[red]m", "\x1b]0;owned\x07": r"\x1b]0;owned\x07", "a\x1b[2J\x9b": r"a\x1b[2J\x9b"}

pytestmark = pytest.mark.parametrize(("name", "shown"), NAMES.items(), ids=range(len(NAMES)))


def printed(result: Result, shown: str, *, code: int = 0) -> None:
    both = result.out + result.err
    assert result.code == code, result
    assert shown in both.replace("\n", ""), both
    assert not set(both) & {"\x1b", "\x07", "\x9b"}


def test_inspected_models(tmp_path: Path, name: str, shown: str) -> None:
    config = llama_config(model_type=name)
    write_checkpoint(tmp_path / "m", {**llama_tensors(config), name: np.zeros(3)}, config)
    printed(moerge("inspect", tmp_path / "m"), shown)


def test_keys_of_configs_and_of_recipes(tmp_path: Path, name: str, shown: str) -> None:
    models = make_models(tmp_path)
    edit_config(models["code"], **{name: 5})
    printed(moerge("plan", write_recipe(tmp_path, merge={"method": "ties"})), shown, code=2)
    printed(moerge("plan", write_recipe(tmp_path, merge={"method": "ties", name: 1})), shown, code=2)


def test_shards_and_kinds_of_adapters(tmp_path: Path, name: str, shown: str) -> None:
    folder = make_models(tmp_path)["base"]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    printed(moerge("inspect", folder), shown, code=2)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    recipe = write_recipe(tmp_path, base="math", experts={"base": "base", "code": "code"})
    assert not set(moerge("plan", recipe).err) & {"\x1b", "\x07", "\x9b"}


def test_folders(tmp_path: Path, name: str, shown: str) -> None:
    if "/" in name:
        pytest.skip("no name of a folder")
    make_models(tmp_path)["code"].rename(tmp_path / name)
    recipe = write_recipe(tmp_path, experts={"math": "math", "code": name})
    printed(moerge("plan", recipe), shown)
    printed(moerge("inspect", tmp_path / name), shown)
    printed(moerge("verify", tmp_path / name / "none"), shown, code=2)
