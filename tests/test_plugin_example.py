"""The package under examples/plugin, installed as a user would and used through the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moerge.architecture.registry import tabled_family
from tests.helpers import tiny
from tests.helpers.command import Result, start

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed in, beside the environment's own."""
    if find_spec("hatchling") is None or find_spec("pip") is None:
        pytest.skip("installing a package offline needs pip and hatchling in this environment")
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", site]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, PLUGIN], check=True, env={**os.environ, "PIP_CONFIG_FILE": ""}
    )
    return site


def moerge(site: Path, *arguments: object) -> Result:
    process = start(*arguments, env={"PYTHONPATH": str(site)})
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def test_a_method_and_a_router(site: Path, tmp_path: Path) -> None:
    """The recipe of the example's README."""
    models = tiny.make_models(tmp_path / "models", dtype="F32")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (PLUGIN / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = moerge(site, "merge", tmp_path / "recipe.yaml", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert result.json["operations"] == {"median": 15, "fit": 2, "copy": 24}
    assert "the orthogonal router is untrained" in result.json["warnings"][0]
    base, *experts = (tiny.read_values(folder) for folder in models.values())
    merged = tiny.read_values(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    median = np.median(np.stack([expert[name] - base[name] for expert in experts]), axis=0)
    np.testing.assert_allclose(merged[name], base[name] + np.float32(0.7) * median, rtol=0, atol=1e-7)
    gates = [merged[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]
    for gate_EH in gates:
        np.testing.assert_allclose(gate_EH @ gate_EH.T, np.eye(4), atol=1e-6)
    assert np.abs(gates[0] - gates[1]).max() > 0.1
    wrong = moerge(site, "plan", tiny.write_recipe(tmp_path / "models", merge={"method": "median", "sclae": 1}))
    assert (wrong.code, "did you mean 'scale'?" in wrong.err) == (2, True)


@pytest.fixture(scope="module")
def starcoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two experts, as transformers writes them."""
    torch = pytest.importorskip("torch", reason="needs moerge[models]")
    transformers = pytest.importorskip("transformers", reason="needs moerge[models]")
    folder = tmp_path_factory.mktemp("starcoders")
    sizes = {key: value for key, value in tiny.llama_config().items() if type(value) is int}
    folders = {}
    for seed, name in enumerate(("base", "math", "code")):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(transformers.Starcoder2Config(**sizes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = folder / name
        model.save_pretrained(folders[name])
        tiny.write_tokenizer(folders[name])
    return folders


def test_a_family(site: Path, starcoders: Mapping[str, Path], tmp_path: Path) -> None:
    import torch
    import transformers

    found = moerge(site, "inspect", starcoders["base"], "--json").json
    assert found["family"] == "starcoder2"
    roles = {role["role"]: role["tensors"] for role in found["roles"]}
    assert roles["layers.*.attention.q.bias"] == roles["layers.*.ffn.up"] == 2
    assert not [role for role in roles if role.startswith("(no role)")]
    recipe = {
        "base": str(starcoders["base"]),
        "experts": {name: str(starcoders[name]) for name in ("math", "code")},
        "merge": {"method": "task_arithmetic", "scale": 0.5, "overrides": [{"match": "attention", "method": "average"}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = moerge(site, "merge", tmp_path / "recipe.yaml", tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, "")
    assert (result.json["operations"], result.json["warnings"]) == ({"task_arithmetic": 19, "average": 16}, [])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "Starcoder2ForCausalLM"
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    states: dict[str, Any] = {
        name: transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for name, folder in starcoders.items()
    }
    for name, tensor in model.state_dict().items():
        base, math, code = (states[each][name] for each in ("base", "math", "code"))
        expected = (math + code) / 2 if "self_attn" in name else base + 0.5 * ((math - base) + (code - base))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_without_the_plugin_its_names_are_unknown(starcoders: Mapping[str, Path], tmp_path: Path) -> None:
    from tests.helpers.command import moerge as command

    tiny.make_models(tmp_path)
    refused = command("plan", tiny.write_recipe(tmp_path, merge={"method": "median"}))
    assert (refused.code, "unknown merge method 'median'" in refused.err) == (2, True)
    refused = command("plan", tiny.write_recipe(tmp_path, moe={"router": {"kind": "orthogonal"}}))
    assert (refused.code, "unknown router kind 'orthogonal'" in refused.err) == (2, True)
    assert tabled_family(json.loads((starcoders["base"] / "config.json").read_text())) is None


def test_the_page_shows_the_files_as_they_are() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    shown = dict(re.findall(r"`examples/plugin/([\w/.]+)`:\n\n```\w+ file=\S+\n(.*?)```", page, flags=re.DOTALL))
    files = ["pyproject.toml", *(f"src/moerge_example/{name}.py" for name in ("median", "starcoder2", "orthogonal"))]
    assert sorted(shown) == sorted(files)
    for name, text in shown.items():
        assert text == (PLUGIN / name).read_text(), f"docs/plugins.md shows another {name}"
