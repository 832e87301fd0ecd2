"""Inputs that are wrong in ways nobody expects: one sentence that names the culprit, or the right result; found by mutation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import moerge as package
from moerge import cli
from moerge.checkpoint.staging import JOURNAL, staging_folder
from moerge.errors import InputError
from moerge.merging.card import code
from moerge.progress import Progress
from moerge.tuning.settings import load_tuning
from tests.helpers.command import Result, moerge, refuses
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import EXPERTS, edit_config, llama_config, llama_shapes, make_models, read_tensors, write_recipe

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"attention_bias": [True]}, ("attention_bias", "each layer")),
        ({"architectures": 5}, ("base/config.json", "architectures", "5")),
        ({"architectures": "LlamaForCausalLM"}, ("base/config.json", "architectures", "a list of names")),
        ({"architectures": [None]}, ("base/config.json", "architectures")),
        ({"model_type": ["llama"]}, ("base/config.json", "model_type")),
    ],
)
def test_configs(tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    for folder in make_models(tmp_path).values():
        edit_config(folder, **changes)
    refuses(write_recipe(tmp_path), tmp_path / "out", *parts)


def test_halves_of_characters_in_a_config_are_kept(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    for name, folder in models.items():
        clean = moerge("merge", write_recipe(tmp_path), tmp_path / "clean", "--force") if name == "base" else None
        assert clean is None or clean.code == 0
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "finetuning_task": "\ud800"}))
    assert moerge("merge", write_recipe(tmp_path, config="base"), tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["finetuning_task"] == "\ud800"
    assert moerge("verify", tmp_path / "out").code == 0
    assert all(np.array_equal(a, b) for a, b in zip(*map(list, values(tmp_path, "clean", "out")), strict=True))


def values(folder: Path, *names: str) -> list[Any]:
    return [read_tensors(folder / name).values() for name in names]


@pytest.mark.parametrize("vocabulary", ["abc", 5, [1], [[]], {"a": "b"}, {"a": -1}, None])
def test_vocabularies(tmp_path: Path, vocabulary: Any) -> None:
    folder = make_models(tmp_path)["code"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuses(write_recipe(tmp_path), tmp_path / "out", "code/tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"merge_method": ["ties"]}, "merge_method"),
        ({"merge_method": {"a": 1}}, "merge_method"),
        ({"parameters": {"weight": 10**400}}, "weight"),
        ({"parameters": {"density": -(10**400)}}, "density"),
    ],
)
def test_mergekit(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    make_models(tmp_path)
    whole = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "math"}],
        "parameters": {"weight": 1, "density": 1},
    }
    (tmp_path / "kit.yaml").write_text(yaml.safe_dump({**whole, **changes}))
    refuses(tmp_path / "kit.yaml", tmp_path / "out", part)


LONG = "x" * 300


@pytest.mark.parametrize(
    "sections",
    [
        {"merge": {"method": "fisher", "statistics": LONG}},
        {"experts": {LONG: "math", "code": "code"}, "merge": {"method": "fisher", "statistics": "s"}},
        {"experts": {"math": LONG, "code": "code"}},
        {"merge": {"method": "coefficients", "file": LONG}},
        {"calibration": dict.fromkeys(["base", *EXPERTS], LONG), "moe": {"router": {"kind": "hidden"}}},
        {"tokenizer": LONG},
    ],
)
def test_long_names(tmp_path: Path, sections: dict[str, Any]) -> None:
    make_models(tmp_path)
    line = refuses(write_recipe(tmp_path, **sections), tmp_path / "out", "xxx")
    assert len(line) < 1300


def test_long_names_of_data(tmp_path: Path) -> None:
    tuning = {"model": "m", "data": {LONG: "a.txt"}, "steps": 1}
    with pytest.raises(InputError, match=r"data: the name 'xxx.* should be shorter"):
        load_tuning(tuning)


def statistics(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, Path]:
    """A recipe for each method on statistics whose sums `change` has changed."""
    make_models(folder, experts=["math", "code"])
    (folder / "a.txt").write_text("w3 w4 w5 w6 w7 w8 w9 w10\n")
    texts = {"math": "a.txt", "code": "a.txt"}
    recipes = {
        method: write_recipe(
            folder, f"{method}.yaml", experts=["math", "code"], merge={"method": method, "statistics": "s"}, calibration=texts
        )
        for method in ("fisher", "regmean")
    }
    assert moerge("stats", recipes["fisher"], folder / "s", "--kind", "all").code == 0
    path = folder / "s" / "math.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, metadata)
    return recipes


def test_negative_statistics(tmp_path: Path) -> None:
    def negate(arrays: dict[str, np.ndarray]) -> None:
        for array in arrays.values():
            array[:] = -1

    recipes = statistics(tmp_path, negate)
    refuses(recipes["fisher"], tmp_path / "out", "s/math.safetensors", "negative", options=("--quiet",))
    refuses(recipes["regmean"], tmp_path / "out", "regmean", "moerge stats", options=("--quiet",))


def test_a_single_negative_number_is_noticed(tmp_path: Path) -> None:
    recipes = statistics(tmp_path, lambda arrays: arrays[f"fisher:{UP}"].__setitem__((3, 4), -1e-6))
    refuses(recipes["fisher"], tmp_path / "out", "s/math.safetensors", UP, "negative", options=("--quiet",))


@pytest.mark.parametrize("change", [{"nonfinite": [["x"]]}, {"inputs": {"math:model.norm.weight": [1]}}])
def test_entries_of_finished_tensors(tmp_path: Path, change: dict[str, Any]) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, merge={"method": "ties"})

    def stop(amount: int) -> None:
        if progress.done["bytes"] > 60_000:
            raise KeyboardInterrupt

    progress = Recorded(stop)
    with pytest.raises(KeyboardInterrupt):
        package.merge(recipe, tmp_path / "out", threads=1, progress=progress)
    journal = staging_folder(tmp_path / "out") / JOURNAL
    *lines, last = journal.read_text().splitlines()
    assert len(lines) > 2
    journal.write_text("\n".join([*lines, json.dumps({**json.loads(last), **change})]) + "\n")
    package.merge(recipe, tmp_path / "out", threads=1, resume=True)
    package.merge(recipe, tmp_path / "whole", threads=1)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("lines", [[[1, 2]], [{"fingerprint": 5}], [None, {"tensor": 3}, []], ["x"], [{}, {}]])
@pytest.mark.parametrize("first", [True, False])
def test_journals(tmp_path: Path, lines: list[Any], first: bool) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, merge={"method": "ties"})

    stop = mock.Mock(spec=Progress, **{"phase.return_value": mock.Mock(side_effect=KeyboardInterrupt)})
    stop.__enter__ = lambda self: self
    stop.__exit__ = lambda self, *_: None
    with pytest.raises(KeyboardInterrupt):
        package.merge(recipe, tmp_path / "out", threads=1, progress=stop)
    journal = staging_folder(tmp_path / "out") / JOURNAL
    kept = "" if first else journal.read_text()
    journal.write_text(kept + "".join(json.dumps(line) + "\n" for line in lines))
    package.merge(recipe, tmp_path / "out", threads=1, resume=True)
    package.merge(recipe, tmp_path / "whole", threads=1)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "wrong", [5, None, ["a.yaml"], b"a.yaml", "\0", object()], ids=["number", "none", "list", "bytes", "null", "object"]
)
def test_what_is_no_recipe(wrong: Any, tmp_path: Path) -> None:
    for call in (package.plan, load_tuning, lambda value: package.merge(value, tmp_path / "out")):
        with pytest.raises(InputError):
            call(wrong)


def test_recipes_that_contain_themselves() -> None:
    round_: dict[str, Any] = {"base": "base"}
    round_["experts"] = round_
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"merge": nested}
    for wrong in (round_, nested):
        for call in (package.plan, load_tuning):
            with pytest.raises(InputError, match="nested too deeply"):
                call(wrong)


def test_outputs_that_are_no_path(tmp_path: Path) -> None:
    make_models(tmp_path)
    with pytest.raises(InputError, match="the output should be a path, not '5'"):
        package.merge(write_recipe(tmp_path), 5)  # type: ignore[arg-type]


def test_verify_covers_the_manifests_own_facts(tmp_path: Path) -> None:
    make_models(tmp_path)
    assert moerge("merge", write_recipe(tmp_path), tmp_path / "out").code == 0
    path = tmp_path / "out" / "moerge.json"
    whole = path.read_text()
    for before, after in (('"location": "math"', '"location": "moth"'), ('"python": "3', '"python": "4')):
        assert before in whole
        path.write_text(whole.replace(before, after))
        result = moerge("verify", tmp_path / "out")
        assert result.code == 2 and "moerge.json was changed" in result.err
    path.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != "manifest_digest"}))
    assert moerge("verify", tmp_path / "out").code == 0  # as older versions wrote it


def test_verify_notices_lost_metadata(tmp_path: Path) -> None:
    make_models(tmp_path)
    assert moerge("merge", write_recipe(tmp_path), tmp_path / "out").code == 0
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"format":"pt"', b'"format":"qt"'))
    result = moerge("verify", tmp_path / "out")
    assert result.code == 2 and "model.safetensors lost its metadata" in result.err


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`<img>`", "a|b", "a\nb"])
def test_code_in_cards(text: str) -> None:
    shown = code(text)
    fence = shown[: len(shown) - len(shown.lstrip("`"))]
    inside = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence) and fence not in inside.split() and "\n" not in shown
    assert inside.strip().replace("\\|", "|") == " ".join(text.split())


def test_settings_of_every_tensor_are_one_row(tmp_path: Path) -> None:
    make_models(tmp_path, experts=["math", "code"])
    rows = {name: [[0.1 + i / 100], [0.2]] for i, name in enumerate(llama_shapes(llama_config()))}
    whole = {"format": 1, "experts": ["math", "code"], "directions": {"method": "task_arithmetic"}, "fixed": 0.3}
    (tmp_path / "k.json").write_text(json.dumps({**whole, "coefficients": rows, "chunk_sizes": {}, "learning": {}}))
    recipe = write_recipe(tmp_path, experts=["math", "code"], merge={"method": "coefficients", "file": "k.json"})
    assert len(package.plan(recipe).operations) == 1
    result: Result = moerge("merge", recipe, tmp_path / "out")
    assert result.code == 0
    card, manifest = (tmp_path / "out" / "README.md").read_text(), (tmp_path / "out" / "moerge.json").read_text()
    assert "4611686018427387904" not in moerge("plan", recipe).out + card + manifest and "0.1," not in card


def test_running_out_of_memory_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("can't start new thread"), ImportError("x.so: Cannot allocate memory")):
        monkeypatch.setattr(cli, "app", mock.Mock(side_effect=error))
        result = moerge("doctor")
        assert result.code == 1 and result.err.startswith("moerge: out of memory") and len(result.err.splitlines()) == 1
