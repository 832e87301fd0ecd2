"""Adapters on the Hub: a plan fetches their settings and headers, a merge their weights, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.hub_server import COMMIT, Hub, serving
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import Result, start
from tests.helpers.tiny import make_models, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    models = make_models(tmp_path / "hub", experts=())
    wide = low_rank("model.layers.0.mlp.up_proj", (24, 16), rank=4)
    adapter = write_adapter(tmp_path / "hub" / "math", wide, r=4, lora_alpha=4, base_model_name_or_path="org/base")
    pickled = write_adapter(tmp_path / "hub" / "old", wide, r=4)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (adapter / "checkpoint-500").mkdir()
    (adapter / "checkpoint-500" / "adapter_model.safetensors").write_bytes(b"an earlier one")
    both = write_adapter(tmp_path / "hub" / "both", wide, r=4)
    (both / "adapter_model.safetensors").unlink()
    for file in ("model.safetensors", "config.json"):
        (both / file).write_bytes((models["base"] / file).read_bytes())
    with serving(Hub({f"org/{path.name}": path for path in (models["base"], adapter, pickled, both)})) as server:
        yield server


def command(hub: Hub, tmp_path: Path, *arguments: object) -> Result:
    hub.sent.clear()
    process = start(*arguments, env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"})
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def test_plan_and_merge(hub: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base="org/base", experts={"math": "org/math", "both": "org/both"})
    planned = command(hub, tmp_path, "plan", recipe, "--json")
    assert (planned.code, planned.err) == (0, "")
    assert (planned.json["to_download"], planned.json["warnings"]) == (
        ["org/base", "org/math", "org/both"],
        ["both: no tokenizer, assumed to be that of base"],
    )
    merged = command(hub, tmp_path, "merge", recipe, tmp_path / "out", "--json")
    assert (merged.code, merged.json["to_download"]) == (0, [])
    assert not any("checkpoint-500" in path or path.endswith(".bin") for path in hub.sent)
    model = json.loads((tmp_path / "out" / "moerge.json").read_text())["models"]["math"]
    assert (model["location"], model["revision"]) == ("org/math", COMMIT)


def test_a_pickled_adapter(hub: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base="org/base", experts={"old": "org/old", "math": "org/math"})
    result = command(hub, tmp_path, "plan", recipe)
    message = "moerge: old: org/old has no adapter_model.safetensors on the Hub: convert it and name the local folder\n"
    assert (result.code, result.out, result.err) == (2, "", message)
