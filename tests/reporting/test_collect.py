"""What is found in a folder, and what is left out of a report and why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.reporting import report
from moerge.reporting.find import plain
from tests.helpers.command import moerge
from tests.reporting.results import digest, sequence_routes, token_routes, write

pytestmark = pytest.mark.slow


def test_one_of_everything(results: Path) -> None:
    found = report(results).found
    assert found.warnings == ()
    assert [(command, file.path) for command, file in found.files] == [
        ("moerge merge", "merged/dense/moerge.json"),
        ("moerge merge", "merged/routed/moerge.json"),
        ("moerge compare", "compare/compare.json"),
        ("moerge route", "route/route.json"),
        ("moerge route", "routing/route.json"),
        ("moerge learn", "learned/coefficients.json"),
        ("moerge tune", "tuned/metrics.jsonl"),
        ("moerge tune", "tuned/tune.json"),
        ("moerge eval", "eval/results.json"),
        ("moerge demo", "results.json"),
    ]
    dense, routed = found.checkpoints
    assert (dense.parameters, dense.bytes, dense.dtypes) == (5968, 11936, {"BF16": 5968})
    assert routed.experts == ("base", "math", "code")
    embedded = found.comparisons[0].to_json()["pairs"]
    assert {row["scope"] for row in embedded} == {"layer", "role", "model"}  # parts are in the file
    assert found.tunings[0].load == ((1, (0.375, 0.625)), (2, (0.375, 0.625)), (3, (0.375, 0.625)))
    assert found.learnings[0].coefficients == {"math": ((0.0,), (0.1,)), "code": ((0.4,), (0.4,))}


def test_a_checkpoint_alone(results: Path) -> None:
    found = report(results / "merged" / "dense").found
    assert [checkpoint.folder for checkpoint in found.checkpoints] == ["."]


Damage = Callable[[Path], Any]
DAMAGED: dict[str, tuple[str, Damage, str]] = {
    "no JSON": ("route/route.json", lambda p: p.write_text("{"), "is damaged and was left out: Expecting property name"),
    "no text": ("route/route.json", lambda p: p.write_bytes(b"\xff"), "is damaged and was left out: 'utf-8' codec"),
    "deep": ("route/route.json", lambda p: p.write_text("[" * 100_000), "is damaged and was left out: "),
    "no number": (
        "route/route.json",
        lambda p: edit(p, balance="even"),
        "was left out: balance: Input should be a valid number, unable to parse string as a number",
    ),
    "not finite": (
        "route/route.json",
        lambda p: edit(p, balance=float("nan")),
        "was left out: balance: Input should be a finite",
    ),
    "no share": (
        "route/route.json",
        lambda p: edit(p, load={"base": -1, "math": 1, "code": 1}),
        "was left out: load.base: Input should be greater than or equal to -0.000001",
    ),
    "other experts": (
        "route/route.json",
        lambda p: edit(p, experts=["base", "math"]),
        "was left out: text 'math' has other experts than the rest",
    ),
    "no texts": ("route/route.json", lambda p: edit(p, texts={}), "was left out: texts: "),
    "manifest": ("merged/dense/moerge.json", lambda p: edit(p, format=2), "was left out: "),
    "weights": ("merged/dense/moerge.json", lambda p: (p.parent / "model.safetensors").write_bytes(b"x"), "was left out: "),
    "coefficients": ("learned/coefficients.json", lambda p: edit(p, fixed="much"), "is damaged, or was written by another"),
    "load": (
        "tuned/metrics.jsonl",
        lambda p: p.write_text('{"step": 1, "loss": 2, "load": [[0.5], 3]}'),
        "tuned/metrics.jsonl was left out: a line's load is no table of layers and experts",
    ),
    "no steps": ("tuned/metrics.jsonl", lambda p: p.write_text("[]"), "was left out: no line has a step and a number"),
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_left_out_and_named(name: str, results: Path) -> None:
    path, damage, message = DAMAGED[name]
    damage(results / path)
    made = report(results)
    assert len(made.found.warnings) == 1
    assert path in made.found.warnings[0] and message in made.found.warnings[0]
    assert path not in [file.path for _, file in made.found.files]
    assert "What is wrong with the files:" in made.to_html()


def test_links_hidden_folders_and_large_files_are_left_out(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = shutil.copy(results / "route" / "route.json", results.parent / "outside.json")
    (results / "linked").mkdir()
    (results / "linked" / "route.json").symlink_to(outside)
    (results / "also-linked").symlink_to(results / "route")
    shutil.copytree(results / "route", results / ".hidden")
    large = (results / "compare" / "compare.json").stat().st_size
    monkeypatch.setattr("moerge.reporting.find.MOST_BYTES", large - 1)
    found = report(results).found
    assert found.warnings == (
        f"compare/compare.json has {large:,} bytes, more than any result has: it was left out",
        "linked/route.json is a link or no file, and was left out: put the file itself there",
    )
    assert [route.path for route in found.routes] == ["route/route.json", "routing/route.json"]


def test_nothing_that_a_file_names_is_opened(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bait = results.parent / "bait"
    bait.mkdir()
    (bait / "moerge.json").write_text("{}")
    for key in ("route/route.json", "eval/results.json", "merged/dense/moerge.json"):
        path = results / key
        path.write_text(path.read_text().replace('"merged/routed"', f'"{bait}"').replace('"base"', f'"{bait}/../bait"'))
    opened: list[str] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(str(path)), original(path, *a, **k))[1])
    report(results)
    assert opened and not [path for path in opened if "bait" in path]


def test_odd_names_are_left_out(results: Path) -> None:
    shutil.copytree(results / "route", results / "evil\u202egpj")
    assert report(results).found.warnings == (
        "evil\ufffdgpj/route.json was left out for the odd characters in its path: rename it",
    )


def test_plain() -> None:
    assert plain({"a\x00": ["b\u202e", "c\nd\te", "\ud800", 1, None]}) == {"a\ufffd": ["b\ufffd", "c\nd\te", "\ufffd", 1, None]}


def test_results_of_another_merge_are_out_of_date(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results)
    assert report(results).found.warnings == ()
    write(results / "route" / "route.json", token_routes("0" * 32).to_json())
    evaluated = json.loads((results / "eval" / "results.json").read_text())
    edit(results / "eval" / "results.json", digests={**evaluated["digests"], "merged/dense": "0" * 32})
    assert report(results).found.warnings == (
        "route/route.json is about merged/routed before it was merged again: measure it again",
        "eval/results.json is about merged/dense before it was merged again: measure it again",
    )


def test_digests_are_those_of_the_tensors(results: Path) -> None:
    assert report(results).found.checkpoints[0].digest == digest(results / "merged" / "dense")


def test_long_curves_are_thinned(results: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1002)]
    (results / "tuned" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report(results).found.tunings[0]
    assert (found.steps, found.every) == (1001, 3)
    steps = [step for step, _ in found.points["loss"]]
    assert steps == [*range(1, 1002, 3), 1001]


def test_learning_csv_without_coefficients(results: Path) -> None:
    text = "stage,update,train,heldout,learning_rate\n1,0,,2.5,\n1,1,2.25,1.5,0.1\n"
    (results / "learned" / "learning.csv").write_text(text)
    assert len(report(results).found.learnings) == 1
    (results / "learned" / "coefficients.json").unlink()
    (file,) = report(results).found.learnings
    assert [(row.update, row.train, row.heldout) for row in file.stages[0].updates] == [(0, None, 2.5), (1, 2.25, 1.5)]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "results.json").write_text('{"somebody": "else"}')
    advice = (
        "name a folder with a merged checkpoint, or with what `moerge route`, `moerge compare` or `moerge eval` wrote with --out"
    )
    result = moerge("report", empty)
    assert (result.code, result.err) == (2, f"moerge: {empty} holds nothing to report on: {advice}\n")
    assert [path.name for path in empty.iterdir()] == ["results.json"]
    (empty / "route.json").write_text("{")
    assert moerge("report", empty).err.startswith(
        f"moerge: {empty} holds nothing to report on (route.json is damaged and was left"
    )
    assert "is not a folder: name one with a checkpoint" in moerge("report", tmp_path / "missing").err
    monkeypatch.setattr("moerge.reporting.find.MOST_FOLDERS", 1)
    (empty / "below").mkdir()
    with pytest.raises(InputError, match=r"there are more than 1 folders below .*: name a smaller one"):
        report(empty)


def test_the_deepest_folders_are_not_entered(results: Path) -> None:
    deep = results / "a" / "b" / "c" / "d" / "e"
    write(deep / "route.json", sequence_routes().to_json())
    write(deep / "f" / "route.json", sequence_routes().to_json())
    assert [route.path for route in report(results).found.routes] == [
        "a/b/c/d/e/route.json",
        "route/route.json",
        "routing/route.json",
    ]
