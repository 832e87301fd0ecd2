"""`moerge push`, against a server on this machine that speaks as much of the Hub's protocol as huggingface_hub needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moerge import InputError, merge
from moerge.extraction import extract
from moerge.hub import prepare
from tests.checkpoint.hub_server import serving
from tests.checkpoint.hub_uploads import UploadHub
from tests.helpers.command import Result, moerge, start
from tests.helpers.tiny import make_models, write_recipe

pytestmark = pytest.mark.slow

FILES = {"README.md", "config.json", "generation_config.json", "moerge.json", "tokenizer.json", "tokenizer_config.json"}


@dataclass
class World:
    """A Hub that takes uploads, a merged checkpoint in two shards, and the command that takes one to the other."""

    hub: UploadHub
    out: Path
    home: Path

    def push(self, *arguments: object, **env: str) -> Result:
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        process = start("push", self.out, *arguments, env={**settings, "HF_TOKEN": "hf_writer", **env})
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)

    @property
    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.iterdir() if path.is_file()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    make_models(tmp_path, experts=("math", "code"))
    merge(write_recipe(tmp_path, experts=("math", "code")), tmp_path / "out", max_shard_bytes=8000, threads=1)
    with serving(UploadHub({})) as hub:
        yield World(hub, tmp_path / "out", tmp_path / "home")


def test_push_and_push_again(world: World) -> None:
    own = world.content
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert set(own) == FILES | shards | {"model.safetensors.index.json"}
    for stray in (".env", "notes.txt", "optimizer.pt", "model.gguf"):
        (world.out / stray).write_text("mine")
    (world.out / "runs").mkdir()
    (world.out / "runs" / "log.json").write_text("{}")

    result = world.push("me/merged", "--json", "--message", "First try")
    assert result.code == 0, result.err
    repo = world.hub.repos["me/merged"]
    assert {**repo.files(), ".gitattributes": b""} == {**own, ".gitattributes": b""}
    assert (repo.private, repo.log) == (False, ["initial commit", "First try"])
    assert result.json == {
        "checkpoint": str(world.out),
        "repo": "me/merged",
        "revision": "main",
        "url": f"{world.hub.url}/me/merged",
        "commit": repo.branches["main"],
        "files": {name: len(own[name]) for name in sorted(own)},
        "bytes": sum(map(len, own.values())),
        "removed": [],
        "warnings": [],
    }
    sent = [path for method, path in world.hub.requests if method == "PUT"]
    assert len(sent) == 3  # two shards and tokenizer.json: once each

    world.hub.requests.clear()
    again = world.push("me/merged", "--quiet")
    assert (again.code, again.out) == (0, "")
    assert not [path for method, path in world.hub.requests if method == "PUT" or "/commit/" in path]


def test_weights_of_an_earlier_checkpoint_go_in_the_same_commit(world: World) -> None:
    stale = {"model.safetensors": b"old", "model-00003-of-00003.safetensors": b"old", "pytorch_model.bin": b"old"}
    repo = world.hub.new_repo("me/merged", files={**stale, "LICENSE": b"mine", "onnx/model.safetensors": b"other"})
    result = world.push("me/merged", "--revision", "next")
    assert result.code == 0, result.err
    kept = {".gitattributes": b"", "LICENSE": b"mine", "onnx/model.safetensors": b"other"}
    assert repo.files("next") == {**world.content, **kept}
    assert repo.files("main") == {**stale, **kept}
    assert len(repo.log) == 2
    commit = repo.branches["next"]
    removed = "model-00003-of-00003.safetensors, model.safetensors, pytorch_model.bin removed"
    assert f"{world.hub.url}/me/merged: 9 files, 2" in result.out and f"{removed}, commit {commit}" in result.out


def test_private_holds_or_is_refused(world: World) -> None:
    assert world.push("secret", "--private", "--json").json["url"] == f"{world.hub.url}/me/secret"
    assert world.hub.repos["me/secret"].private
    before = world.hub.new_repo("me/public").files()
    result = world.push("me/public", "--private", "--quiet")
    assert (result.code, result.err) == (
        2,
        "moerge: me/public exists and is public: make it private on the Hub, or push without --private\n",
    )
    assert world.hub.repos["me/public"].files() == before


def test_what_the_hub_leaves_out_is_not_passed_over(world: World) -> None:
    world.hub.ignored = frozenset({"tokenizer.json"})
    result = world.push("me/merged", "--quiet")
    assert (result.code, result.err) == (
        2,
        "moerge: me/merged did not take tokenizer.json: look at its .gitignore on the Hub, then push again\n",
    )


REFUSALS = {
    "no token": ("me/m", {"HF_TOKEN": ""}, 2, "no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write"),
    "unknown token": ("me/m", {"HF_TOKEN": "hf_stranger"}, 2, "the Hub does not know this token: run `hf auth login`, or set"),
    "another's": ("you/m", {}, 2, "this token may not write to you/m: use one with write access, or another name"),
    "no answer": ("me/m", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "me/m could not be uploaded, run the same command again: "),
    "offline": ("me/m", {"HF_HUB_OFFLINE": "1"}, 1, "the Hub is switched off by HF_HUB_OFFLINE: unset it to push"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_of_the_hub(world: World, name: str) -> None:
    repo, env, code, message = REFUSALS[name]
    result = world.push(repo, "--quiet", **env)
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result
    assert result.err.startswith(f"moerge: {message}")
    assert world.hub.repos == {}


def test_a_failing_hub_is_the_machines_fault(world: World) -> None:
    world.hub.failing = "/commit/"
    result = world.push("me/merged", "--quiet")
    assert (result.code, result.err.count("\n")) == (1, 1), result
    assert result.err.startswith("moerge: me/merged could not be uploaded, run the same command again: ")
    assert set(world.hub.repos["me/merged"].files()) == {".gitattributes"}  # all files or none
    world.hub.failing = ""
    world.hub.requests.clear()
    assert world.push("me/merged").code == 0
    assert not [path for method, path in world.hub.requests if method == "PUT"]  # what was uploaded is still there


def test_a_dry_run_sends_nothing(world: World) -> None:
    nameless = moerge("push", world.out, "me/merged", "--dry-run", "--revision", "")
    assert nameless.err == "moerge: the revision has no name: leave it out for main, or name a branch\n"
    result = moerge("push", world.out, "me/merged", "--dry-run")
    assert result.code == 0, result.err
    assert "model-00001-of-00002.safetensors" in result.out
    assert result.out.splitlines()[-1].endswith(" would go to me/merged (main); nothing was sent")
    asked = moerge("push", world.out, "me/merged", "--dry-run", "--json").json
    assert (asked["commit"], asked["url"], set(asked["files"])) == (None, None, set(world.content))
    assert world.hub.requests == []


def test_damaged_checkpoints_stay_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = world.out / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (world.out / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    result = moerge("push", world.out, "me/merged", "--quiet")
    assert result.code == 2
    assert result.err.startswith(f"moerge: {world.out} is damaged and is not uploaded: tensor 'lm_head.weight' in model-0000")
    assert "is damaged: its bytes are not those that were merged (and 1 more: see `moerge verify`)" in result.err


@pytest.mark.parametrize("repo", ["", "a/b/c", "me/..", "me/a--b", "me/mit leer", "https://huggingface.co/me/merged"])
def test_names_that_are_no_repositorys(world: World, repo: str) -> None:
    with pytest.raises(InputError, match=r"is not the name of a repository on the Hub: write it as owner/name"):
        prepare(world.out, repo)


def test_nothing_outside_of_the_folder_is_taken(world: World, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cr3t")
    manifest = json.loads((world.out / "moerge.json").read_text())
    (world.out / "moerge.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], "../secret": "0"}}))
    with pytest.raises(InputError, match=r"has no file '../secret' although its manifest lists it: merge again"):
        prepare(world.out, "me/merged")
    (world.out / "moerge.json").write_text(json.dumps(manifest))
    (world.out / "README.md").unlink()
    os.symlink(tmp_path / "secret", world.out / "README.md")
    with pytest.raises(InputError, match=r"README.md is a link to .*/secret, outside of the checkpoint: put the file itself"):
        prepare(world.out, "me/merged")


def test_paths_that_become_public_are_named(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    recipe = write_recipe(tmp_path, base=str(models["base"]), experts={"math": str(models["math"]), "code": "code"})
    merge(recipe, tmp_path / "out", threads=1)
    result = moerge("push", tmp_path / "out", "me/merged", "--dry-run")
    named = f"{models['base']}, {models['math']}"
    warning = f"warning: the model card and moerge.json name folders of this machine ({named}): anyone can read them there\n"
    assert result.err.endswith(warning)


def test_an_adapter(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    extract(str(models["math"]), tmp_path / "lora", base=str(models["base"]), rank=2)
    upload = prepare(tmp_path / "lora", "me/lora")
    assert list(upload.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    named = f"the model card and adapter_config.json name folders of this machine ({models['base']}): anyone can read them there"
    assert upload.warnings == (named,)


def test_a_checkpoint_that_moerge_did_not_make(tmp_path: Path) -> None:
    folder = make_models(tmp_path, experts=("math",))["math"]
    (folder / "notes.txt").write_text("mine")
    upload = prepare(folder, "me/math")
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert list(upload.files) == names
    assert upload.warnings == ("there is no README.md, so the repository gets no model card",)
