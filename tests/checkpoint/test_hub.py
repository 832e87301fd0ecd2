"""Hub ids, against a server on this machine that speaks as much of the Hub's protocol as huggingface_hub needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moerge.checkpoint.header import read_header
from moerge.merging.pipeline import merge
from tests.checkpoint.hub_server import COMMIT, Hub, serving
from tests.helpers.command import Result, start
from tests.helpers.tiny import edit_config, make_models, write_recipe

pytestmark = pytest.mark.slow

ON_HUB = {"base": "org/base", "experts": {"math": "org/math@main", "code": "org/code"}}


@dataclass
class World:
    """A Hub with three models, an empty cache, and commands that use both."""

    hub: Hub
    models: dict[str, Path]
    cache: Path

    def moerge(self, *arguments: object, **env: str) -> Result:
        self.hub.requests.clear()
        self.hub.sent.clear()
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": "0", **env}
        process = start(*arguments, env=settings)
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)

    def sent(self, suffix: str) -> dict[str, int]:
        """Bytes sent of files with this ending, by model and file."""
        files = {path: size for path, size in self.hub.sent.items() if path.endswith(suffix)}
        return {path.replace(f"/resolve/{COMMIT}", "").removeprefix("/org/"): size for path, size in files.items()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    # large enough that the 100 kB that the client fetches to find a header is not the whole file
    models = make_models(tmp_path / "hub", experts=("math", "code"), config={"vocab_size": 9000})
    sharded = make_models(tmp_path / "sharded", experts=("math",), config={"vocab_size": 9000}, shards=2)["math"]
    shutil.rmtree(models["math"])
    sharded.rename(models["math"])
    (models["base"] / "onnx").mkdir()
    (models["base"] / "onnx" / "model.safetensors").write_bytes(b"other weights")
    (models["base"] / "pytorch_model.bin").write_bytes(b"the same weights again")
    hub = Hub({f"org/{name}": folder for name, folder in models.items()})
    with serving(hub):
        yield World(hub, models, tmp_path / "cache")


def test_plan_merge_and_plan_again(world: World, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **ON_HUB)

    planned = world.moerge("plan", recipe, "--json")
    assert (planned.code, planned.err) == (0, "")
    assert planned.json["to_download"] == ["org/base", "org/math@main", "org/code"]
    fetched = world.sent(".safetensors")
    assert set(fetched) == {
        "base/model.safetensors",
        "math/model-00001-of-00002.safetensors",
        "math/model-00002-of-00002.safetensors",
        "code/model.safetensors",
    }
    assert all(size <= 100_001 for size in fetched.values())  # the headers' range, not the files
    assert not any("onnx" in path or path.endswith(".bin") for path in world.hub.sent)

    merged = world.moerge("merge", recipe, tmp_path / "out", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["to_download"] == []
    downloaded = world.sent(".safetensors")
    assert all(downloaded[path] >= (tmp_path / "hub" / path).stat().st_size for path in fetched)
    assert not any("onnx" in path or path.endswith(".bin") for path in world.hub.sent)

    merge(write_recipe(tmp_path / "hub", experts={"math": "math", "code": "code"}), tmp_path / "local")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "moerge.json").read_text())
    assert {name: (model["location"], model["revision"]) for name, model in manifest["models"].items()} == {
        "base": ("org/base", COMMIT),
        "math": ("org/math@main", COMMIT),
        "code": ("org/code", COMMIT),
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/math\n- org/code\n" in card
    assert f"| math | `org/math@main` | {COMMIT} |" in card

    again = world.moerge("plan", recipe, "--json", HF_HUB_OFFLINE="1")  # everything is in the cache now
    assert (again.code, again.err, again.json["to_download"]) == (0, "", [])
    assert world.hub.requests == []
    assert {**again.json, "to_download": planned.json["to_download"]} == planned.json


def test_code_and_numbered_folders_are_fetched(world: World, tmp_path: Path) -> None:
    """Other formats' weights, in folders of other names, are not."""
    base = world.models["base"]
    edit_config(base, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (base / "modeling_mine.py").write_text("class Mine: ...\n")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    for folder, file in (("1_Pooling", "config.json"), ("additional_chat_templates", "rag.jinja"), ("openvino", "config.json")):
        (base / folder).mkdir()
        (base / folder / file).write_text("{}")
    merged = world.moerge("merge", write_recipe(tmp_path, **ON_HUB), tmp_path / "out", "--quiet")
    assert merged.code == 0, merged.err
    for name in ("modeling_mine.py", "preprocessor_config.json", "1_Pooling/config.json", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert not any("onnx" in path or "openvino" in path for path in world.hub.sent)


def test_an_existing_target_is_seen_before_anything_is_downloaded(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = world.moerge("merge", write_recipe(tmp_path, **ON_HUB), tmp_path / "out")
    assert (result.code, "already exists" in result.err) == (2, True)
    assert all(size <= 100_001 for size in world.sent(".safetensors").values())


def test_a_damaged_file_on_the_hub(world: World, tmp_path: Path) -> None:
    path = world.models["code"] / "model.safetensors"
    content = path.read_bytes()
    tensor = read_header(path)["model.norm.weight"]
    assert tensor.shape == (16,)
    path.write_bytes(content.replace(b'"shape":[16],', b'"shape":[17],', 1))
    result = world.moerge("plan", write_recipe(tmp_path, **ON_HUB))
    assert result.code == 2
    assert "lies about its size: shape [17] of BF16 needs 34 bytes, the header gives it 32" in result.err
    path.write_bytes(content.replace(b'"dtype":"BF16"', b'"dtype":"XX16"', 1))
    result = world.moerge("plan", write_recipe(tmp_path, **ON_HUB), HF_HOME=str(tmp_path / "other"))
    assert (result.code, "has the element type 'XX16', which moerge does not read" in result.err) == (2, True)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not JSON at all!")
    result = world.moerge("plan", write_recipe(tmp_path, **ON_HUB), HF_HOME=str(tmp_path / "third"))
    assert (result.code, result.err) == (
        2,
        "moerge: code: org/code has a damaged safetensors file on the Hub: use another revision\n",
    )


@pytest.mark.parametrize(
    ("location", "code", "message"),
    [
        (
            "org/nothing",
            2,
            "base: org/nothing is neither a folder ({f}/org/nothing) nor a model on the Hub: check the path or the id",
        ),
        (
            "org/base@v9",
            2,
            "base: org/base@v9 is neither a folder ({f}/org/base@v9) nor a revision on the Hub: check what stands",
        ),
        ("org/gated", 2, "base: org/gated is gated on the Hub: accept its terms there, then run `hf auth login`"),
        ("org/pickled", 2, "base: org/pickled has no safetensors weights on the Hub: convert it and name the local folder"),
        ("a--b/c..d", 2, "base: a--b/c..d is neither a folder ({f}/a--b/c..d) nor a model on the Hub"),
    ],
)
def test_models_that_cannot_be_had(world: World, tmp_path: Path, location: str, code: int, message: str) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(world.models["base"], pickled)
    (pickled / "model.safetensors").unlink()
    world.hub.models = {**world.hub.models, "org/gated": pickled, "org/pickled": pickled}
    world.hub.gated = frozenset({"org/gated"})
    result = world.moerge("plan", write_recipe(tmp_path, base=location, experts={"code": "org/code"}))
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result
    assert message.replace("{f}", str(tmp_path)) in result.err


@pytest.mark.parametrize(
    "settings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "no answer"]
)
def test_a_hub_that_cannot_be_reached(world: World, tmp_path: Path, settings: dict[str, str]) -> None:
    result = world.moerge("merge", write_recipe(tmp_path, **ON_HUB), tmp_path / "out", **settings)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
    assert result.err.startswith(f"moerge: base: org/base is not a folder ({tmp_path}/org/base)")
    assert "cannot be reached: check the connection and HF_HUB_OFFLINE" in result.err
    assert not (tmp_path / "out").exists()


def test_a_folder_comes_before_the_hub(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.models["base"], tmp_path / "org" / "base", ignore=shutil.ignore_patterns("*.bin", "onnx"))
    recipe = write_recipe(tmp_path, base=None, experts={"math": "org/base"})
    assert world.moerge("plan", recipe, "--json").json["to_download"] == []
    assert world.hub.requests == []


def test_the_commit_of_the_plan_is_what_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` may move between a plan and its merge."""
    from moerge.checkpoint import locate
    from moerge.merging.pipeline import plan

    models = make_models(tmp_path, base=False, experts=("math", "code"))
    asked = []

    def fetch(repo: str, revision: str | None, weights: bool) -> object:
        asked.append((repo, revision, weights))
        snapshot = tmp_path / f"snapshot-{repo.replace('/', '-')}" / COMMIT
        if not snapshot.exists():
            shutil.copytree(models[repo.split("/")[1]], snapshot)
        if weights:
            return snapshot, None
        tensors = read_header(snapshot / "model.safetensors").values()
        start = min(tensor.offset for tensor in tensors)
        return snapshot, {
            tensor.name: (
                "model.safetensors",
                {
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "data_offsets": [tensor.offset - start, tensor.offset - start + tensor.nbytes],
                },
            )
            for tensor in tensors
        }

    monkeypatch.setattr(locate, "_fetch", fetch)
    planned = plan({"experts": {"math": "org/math", "code": "org/code@main"}})
    assert not planned.complete
    merge(planned, tmp_path / "out")
    assert asked == [
        ("org/math", None, False),
        ("org/code", "main", False),
        ("org/math", COMMIT, True),
        ("org/code", COMMIT, True),
    ]
