"""What a tuned checkpoint says about itself, text that is measured and trained on, and TensorBoard."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moerge.checkpoint.manifest import read_manifest
from moerge.texts.overlap import document_hash
from moerge.tuning import manifest as tuned
from moerge.tuning.run import tune
from tests.helpers.command import moerge
from tests.helpers.recorded import Recorded
from tests.tuning.tune_models import make_moe, write_tuning

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["native", "routed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture and its tuned version `out`."""
    found = tmp_path_factory.mktemp(str(request.param))
    make_moe(found, by_sequence=request.param == "routed")
    tune(write_tuning(found, steps=1), found / "out")
    return found


def test_it_verifies_against_its_own_manifest(folder: Path) -> None:
    found = moerge("verify", folder / "out", "--json").json
    assert found["intact"] and found["compared_with_manifest"]
    manifest = read_manifest(folder / "out")
    assert manifest is not None
    merged = read_manifest(folder / "moe")
    assert merged is not None and manifest["experts"] == merged["experts"] and manifest["recipe"] == merged["recipe"]
    assert set(manifest["models"]) == {"model"} and len(manifest["models"]["model"]["digest"]) == 32
    assert {"tune.json", "metrics.jsonl", "README.md", "config.json", "tokenizer.json"} <= set(manifest["files"])
    shown = moerge("inspect", folder / "out").out
    assert "tuned on base, math, code, knowledge" in shown
    assert all(f" {name}" in shown.partition("experts")[2].splitlines()[0] for name in merged["experts"])


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    for file in filter(Path.is_file, (folder / "out").iterdir()):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(weights))
    (tmp_path / "tune.json").write_text("{}")
    failed = moerge("verify", tmp_path)
    assert failed.code == 2 and "is damaged" in failed.err and "tune.json was changed" in failed.err


def test_text_it_was_tuned_on_is_no_evidence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((folder / "math.jsonl").read_text().splitlines()[3])["text"]
    (folder / "seen.txt").write_text(document.upper())
    (folder / "other.txt").write_text("w60 w61 w62 w63 w60")
    refused = moerge("route", folder / "out", "--text", f"math={folder / 'seen.txt'}")
    assert refused.code == 2
    assert "was calibrated or tuned on 1 of its 1 documents, so figures on them are no evidence" in refused.err
    assert moerge("route", folder / "out", "--text", f"math={folder / 'other.txt'}").code == 0
    manifest = read_manifest(folder / "out")
    assert manifest is not None and document_hash(document) in manifest["tuning"]["math"]["documents"]
    monkeypatch.setattr(tuned, "MOST_DOCUMENTS", 2)
    tune(write_tuning(folder, steps=1), folder / "many", force=True)
    manifest = read_manifest(folder / "many")
    assert manifest is not None and manifest["tuning"]["math"]["documents"] is None


def test_text_of_an_earlier_tuning_is_remembered(folder: Path) -> None:
    (folder / "new.txt").write_text(" ".join(f"w{3 + 2 * i % 57}" for i in range(80)))
    tune(write_tuning(folder, "again.yaml", model="out", data={"math": "new.txt"}, steps=1), folder / "again")
    before, after = read_manifest(folder / "out"), read_manifest(folder / "again")
    assert before is not None and after is not None
    assert set(after["tuning"]) == {"math", "math-2", "base", "code", "knowledge"}
    assert after["tuning"]["math"]["location"] == "new.txt"
    assert after["tuning"]["math-2"] == before["tuning"]["math"] and after["tuning"]["code"] == before["tuning"]["code"]
    tune(write_tuning(folder, "thrice.yaml", model="again", data={"math": "new.txt"}, steps=1), folder / "thrice")
    thrice = read_manifest(folder / "thrice")
    assert thrice is not None and thrice["tuning"] == after["tuning"]


def test_a_merge_may_replace_it_and_the_report_shows_it(folder: Path) -> None:
    assert moerge("report", folder, "--out", folder / "page.html").code == 0
    assert "tuned" in (folder / "page.html").read_text()


def test_held_out_text_that_is_trained_on(folder: Path) -> None:
    lines = (folder / "math.jsonl").read_text().splitlines()
    other = json.dumps({"text": "w3 w60 " * 12})
    (folder / "heldout.jsonl").write_text("\n".join([lines[0], other, lines[1].upper().replace('"TEXT"', '"text"')]))
    path = write_tuning(folder, "overlap.yaml", steps=1, heldout={"math": "heldout.jsonl"})
    warning = (
        "heldout.math: 2 of its 3 documents are trained on, in data.math, so figures on them are no evidence: name other text"
    )
    assert warning in moerge("tune", path, "--dry-run").err
    assert moerge("tune", path, "--dry-run", "--json").json["warnings"][-1] == warning
    progress = Recorded()
    result = tune(path, folder / "overlap", progress=progress, force=True)
    assert progress.warnings[-1] == warning and result is not None
    assert result.facts["heldout"]["math"]["trained_on"] == {"math": 2}


def test_tensorboard_gets_the_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for TensorBoard, which is large: what it would have been told."""
    told: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.folder = Path(log_dir)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            self.folder.mkdir(exist_ok=True)
            (self.folder / "events").touch()
            told.append((key, value, step))

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **options: None

    stand_in: Any = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    installed = types.ModuleType("tensorboard")
    installed.__spec__ = types.SimpleNamespace(name="tensorboard")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setitem(sys.modules, "tensorboard", installed)
    result = tune(write_tuning(folder, steps=2, heldout={"x": "math.jsonl"}), folder / "board", force=True)
    assert result is not None and (folder / "board" / "tensorboard" / "events").is_file()
    steps = [step for key, _, step in told if key == "train/cross_entropy"]
    assert steps == [1, 2]
    by_key = {key: value for key, value, step in told if step == 2}
    assert by_key["train/cross_entropy"] == pytest.approx(result.facts["last"]["cross_entropy"])
    assert by_key["train/heldout/x"] == pytest.approx(result.facts["last"]["heldout"]["x"])


def test_the_real_tensorboard(folder: Path) -> None:
    """What its own reader finds."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tune(write_tuning(folder, steps=2, heldout={"x": "math.jsonl"}), folder / "real", force=True)
    events = EventAccumulator(str(folder / "real" / "tensorboard"))
    events.Reload()
    assert result is not None
    for key, value in (
        ("cross_entropy", result.facts["last"]["cross_entropy"]),
        ("heldout/x", result.facts["last"]["heldout"]["x"]),
    ):
        last = events.Scalars(f"train/{key}")[-1]
        assert (last.step, last.value) == (2, pytest.approx(value))
