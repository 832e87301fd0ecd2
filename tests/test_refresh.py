"""`moerge refresh`: published folders get the code of this moerge, whole or not at all, and stay verifiable."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moerge
from moerge.checkpoint.manifest import sealed
from moerge.modeling import AUTO_MAP, code_files
from moerge.tensors.digest import file_digest
from tests.helpers.command import moerge as command
from tests.helpers.tiny import edit_config, make_models, write_recipe

pytestmark = pytest.mark.slow

CURRENT = {name: path.read_bytes() for name, path in code_files().items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an older moerge left: other content, a file that is gone since, and one that it did not have."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    out = folder / "out"
    moerge.merge(write_recipe(folder, merge={"method": "average"}, moe={"format": "moerge"}), out, threads=1)
    manifest = json.loads((out / "moerge.json").read_text())
    (out / "versions_moerge.py").unlink()
    del manifest["files"]["versions_moerge.py"]
    for name in ("routed_moerge.py", "older_moerge.py"):
        (out / name).write_text("raise ImportError('old')\n")
        manifest["files"][name] = file_digest((out / name).read_bytes())
    (out / "moerge.json").write_bytes(sealed(manifest))
    assert command("verify", out).code == 0
    return out


@pytest.fixture
def old(published: Path, tmp_path: Path) -> Path:
    shutil.copytree(published, tmp_path / "out")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_code_is_current_and_the_rest_stays(old: Path) -> None:
    before, result = contents(old), command("refresh", old, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["written"] == ["routed_moerge.py", "versions_moerge.py"] and result.json["removed"] == ["older_moerge.py"]
    after = contents(old)
    assert {name: content for name, content in after.items() if name.endswith(".py")} == CURRENT
    kept = before.keys() - CURRENT.keys() - {"older_moerge.py", "moerge.json"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() == kept | CURRENT.keys() | {"moerge.json"}
    assert command("verify", old).code == 0
    assert json.loads(after["moerge.json"])["refreshed"] == {"moerge": moerge.__version__}
    again = command("refresh", old)
    assert again.code == 0 and again.out.split()[-2:] == ["nothing", "written"] and contents(old) == after


def test_a_folder_that_transformers_saved_has_no_manifest(old: Path) -> None:
    (old / "moerge.json").unlink()
    edit_config(old, auto_map={key: f"someone/else--{name}" for key, name in AUTO_MAP.items()})
    assert command("refresh", old).code == 0
    assert json.loads((old / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not (old / "moerge.json").exists() and contents(old).items() >= CURRENT.items()


def test_changes_by_hand_are_named(old: Path) -> None:
    (old / "cache_moerge.py").write_text("mine = 1\n")
    result = command("refresh", old)
    assert result.code == 0 and "cache_moerge.py was changed after the merge" in " ".join(result.err.split())
    assert command("verify", old).code == 0


def test_a_failure_leaves_all_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = contents(old), Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "versions" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = command("refresh", old)
    assert result.code == 1 and "No space left on device" in result.err and contents(old) == before


def test_what_has_no_code_of_ours_is_refused(published: Path, old: Path) -> None:
    for folder, part in (
        (published.parent / "base", "of type 'llama' and carries no code of moerge"),
        (old / "absent", "there is no folder"),
    ):
        result = command("refresh", folder)
        assert result.code == 2 and part in result.err and result.err.count("\n") == 1
    (old / "cache_moerge.py").unlink()
    (old / "cache_moerge.py").symlink_to(published / "cache_moerge.py")
    before, result = contents(old), command("refresh", old)
    assert result.code == 2 and "cache_moerge.py is a link" in result.err and contents(old) == before


@pytest.mark.parametrize("renames", range(5))
def test_a_kill_between_two_renames_is_seen_and_repaired(old: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files are renamed and one is removed: whatever of that is done, the tensors stay and `refresh` completes it."""
    weights = {name: content for name, content in contents(old).items() if name.endswith(".safetensors")}
    replace, unlink, left = os.replace, Path.unlink, [renames]

    def once(act: Callable[..., None]) -> Callable[..., None]:
        def acts(*arguments: Any, **options: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            act(*arguments, **options)

        return acts

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", once(replace))
        patch.setattr(
            Path,
            "unlink",
            lambda path, **options: once(unlink)(path) if path.name == "older_moerge.py" else unlink(path, **options),
        )
        moerge.refresh(old)
    assert not [name for name in contents(old) if name.startswith(".")]
    assert command("verify", old).code == {0: 0, 1: 2, 2: 2, 3: 0, 4: 0}[renames]
    again = command("refresh", old)
    assert (again.code, again.err) == (0, "")
    assert command("verify", old).code == 0
    assert {name: content for name, content in contents(old).items() if name.endswith(".py")} == CURRENT
    assert {name: content for name, content in contents(old).items() if name.endswith(".safetensors")} == weights
