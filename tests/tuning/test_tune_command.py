"""`moerge tune` from end to end on tiny mixtures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moerge.errors import InputError
from moerge.modeling import register
from moerge.tuning.models import load_sharded
from moerge.tuning.run import _Job, tune
from tests.helpers.command import moerge
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import read_values
from tests.tuning.tune_models import moved, rows, run, stop_after, write_texts, write_tuning

pytestmark = pytest.mark.slow


def test_the_result_is_an_ordinary_checkpoint_that_has_learned(folder: Path) -> None:
    facts = run(folder, "learned", steps=30, learning_rate=1e-2, save_every=100)
    found = rows(folder / "learned")
    assert [row["step"] for row in found] == list(range(1, 31))
    assert np.mean([r["cross_entropy"] for r in found[-5:]]) < found[0]["cross_entropy"] - 0.8
    assert facts["last"]["tokens"] == facts["tokens"] == 30 * 4 * 16
    assert sum(source["sequences"] for source in facts["sources"].values()) == 120
    assert sum(sum(row["drawn"].values()) for row in found) == 120
    assert facts["recipe"]["moe"] == {"top_k": 2}
    assert len(moved(folder / "moe", folder / "learned")) == len(read_values(folder / "moe"))
    assert (folder / "learned" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert not list(folder.glob(".learned*"))
    assert moerge("verify", folder / "learned").code == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "learned")
    ids = torch.arange(3, 19)[None]
    before = AutoModelForCausalLM.from_pretrained(folder / "moe")(ids, labels=ids).loss
    assert model(ids, labels=ids).loss != before


def _umask() -> int:
    from moerge.system import umask

    return umask()


def test_the_first_loss_is_the_untouched_models(folder: Path) -> None:
    from moerge.tuning.mixture import Mixture

    run(folder, "first", steps=1, save_every=1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "moe")
    mixture = Mixture({"base": 5.0, "math": 3.0, "code": 1.0, "knowledge": 1.0}, 4, 0)
    losses = []
    for index in range(4):
        source = mixture.names[mixture.drawn_N[index]]
        lines = [json.loads(line)["text"] for line in (folder / f"{source}.jsonl").read_text().splitlines()]
        tokens = [number for line in lines for number in [*(int(word[1:]) for word in line.split()), 2]]
        _, place = mixture.place(index, [len(tokens) // 16] * 4)
        ids = torch.tensor([tokens[place * 16 : place * 16 + 16]])
        losses.append(model(ids, labels=ids).loss.item())
    assert rows(folder / "first")[0]["cross_entropy"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("router", lambda name: ".gate." in name),
        ("experts", lambda name: ".experts." in name),
        ("backbone", lambda name: ".gate." not in name and ".experts." not in name),
        (["router", "model.layers.1.self_attn.*"], lambda name: ".gate." in name or "layers.1.self_attn" in name),
    ],
)
def test_only_what_is_named_is_trained(folder: Path, train: Any, expected: Callable[[str], bool]) -> None:
    name = "part-" + (train if isinstance(train, str) else "list")
    run(folder, name, train=train, steps=2)
    after = read_values(folder / name)
    assert moved(folder / "moe", folder / name) == {tensor for tensor in after if expected(tensor)}


def test_what_opens_later_stays_until_then(folder: Path) -> None:
    run(folder, "opened-0", train="router", steps=2)
    run(folder, "opened-1", train="router", steps=2, opens=[{"step": 1, "train": "experts"}])
    assert moved(folder / "moe", folder / "opened-1") == {n for n in read_values(folder / "moe") if "block_sparse_moe" in n}
    one, two = rows(folder / "opened-0"), rows(folder / "opened-1")
    assert one[0] == two[0]
    assert one[1]["loss"] == two[1]["loss"]  # the experts take part in the second update only
    assert one[1]["grad_norm"] < two[1]["grad_norm"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_six_steps_are_three_and_three_more(folder: Path, accumulation: int) -> None:
    changes: dict[str, Any] = {
        "save_every": 3,
        "warmup": 2,
        "schedule": "cosine",
        "accumulation": accumulation,
        "losses": {"load_balance": 0.01},
        "opens": [{"step": 4, "train": "backbone"}],
        "train": "router+experts",
    }
    whole, parts = f"whole-{accumulation}", f"parts-{accumulation}"
    run(folder, whole, **changes)
    path = write_tuning(folder, **changes)
    with pytest.raises(KeyboardInterrupt):
        tune(path, folder / parts, progress=stop_after(5))
    assert not (folder / parts).exists()
    assert "an interrupted tuning into" in moerge("tune", path, folder / parts).err
    result = tune(path, folder / parts, resume=True)
    assert result is not None and result.facts["resumed_after_step"] == 3
    assert rows(folder / whole) == rows(folder / parts)
    assert moved(folder / whole, folder / parts) == set()


def test_resume_leaves_a_complete_result_as_it_is(folder: Path) -> None:
    path, out = write_tuning(folder, "complete.yaml", steps=2), folder / "complete"
    first = moerge("tune", path, out, "--json").json
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir() if file.is_file()}
    again = moerge("tune", path, out, "--resume", "--json").json
    assert (first["was_complete"], again["was_complete"]) == (False, True)
    assert again["last"] == first["last"]
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir() if file.is_file()} == before
    assert "complete already" in moerge("tune", path, out, "--resume").out
    other = write_tuning(folder, "other.yaml", steps=3)
    assert "already exists" in moerge("tune", other, out, "--resume").err
    (out / "README.md").write_text("changed")
    assert "already exists" in moerge("tune", path, out, "--resume").err


def test_a_tuning_that_was_killed_while_it_was_published_only_publishes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tuning(folder, steps=3, save_every=2)

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moerge.checkpoint.workspace.take_name", killed)
        tune(path, folder / "published")
    assert not (folder / "published").exists()
    result = tune(path, folder / "published", resume=True)
    assert result is not None and result.facts["resumed_after_step"] == 3
    run(folder, "at-once", steps=3, save_every=2)
    assert rows(folder / "published") == rows(folder / "at-once")
    assert moved(folder / "published", folder / "at-once") == set()


def test_it_is_said_how_to_continue_where_there_is_something(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tuning(folder, steps=1)

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moerge.tuning.run.locate_models", killed)
        stopped = moerge("tune", path, folder / "stopped")
        assert (stopped.code, stopped.err) == (130, "moerge: interrupted\n")
        patch.undo()
        patch.setattr("moerge.checkpoint.workspace.take_name", killed)
        stopped = moerge("tune", path, folder / "stopped", "--quiet")
        assert stopped.code == 130
        assert stopped.err.endswith("\nmoerge: interrupted; continue with the same command and --resume\n")
    assert moerge("tune", path, folder / "stopped", "--quiet", "--resume").code == 0


def test_what_is_continued_must_be_what_was_begun(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(write_tuning(folder, save_every=2), folder / "other", progress=stop_after(3))
    failed = moerge("tune", write_tuning(folder, learning_rate=1e-2), folder / "other", "--resume")
    assert (
        failed.code == 2
        and "had another learning_rate (settings): continue it as it was, or start over with --force" in failed.err
    )
    checkpoints = folder / ".other.moerge-tuning" / "checkpoints"
    (checkpoints / "checkpoint-4").mkdir()  # what a kill in the middle of writing leaves
    result = tune(write_tuning(folder, save_every=3), folder / "other", resume=True)
    assert result is not None and result.facts["resumed_after_step"] == 2


def test_memory_saving_does_not_change_what_is_learned(folder: Path) -> None:
    run(folder, "plain", steps=3, losses={"load_balance": 0.1})
    run(folder, "recomputed", steps=3, losses={"load_balance": 0.1}, gradient_checkpointing=True)
    for one, other in zip(rows(folder / "plain"), rows(folder / "recomputed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["load"] == other["load"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_held_out_sequences_are_routed_by_their_first_half(by_sequence: Path) -> None:
    register()
    model: Any = AutoModelForCausalLM.from_pretrained(by_sequence / "moe")
    write_texts(by_sequence)
    tokens = [int(word[1:]) for word in json.loads((by_sequence / "code.jsonl").read_text().splitlines()[0])["text"].split()][:16]
    (by_sequence / "heldout.txt").write_text(" ".join(f"w{token}" for token in tokens))
    run(by_sequence, "halves", heldout={"code": "heldout.txt"}, steps=1)
    ids, labels = torch.tensor([tokens]), torch.tensor([[-100] * 8 + tokens[8:]])
    first, whole = model.route(ids[:, :8]), model.route(ids)
    assert not torch.equal(first.alpha, whole.alpha)
    measured = rows(by_sequence / "halves")[0]["heldout"]["code"]
    assert measured == pytest.approx(model(ids, labels=labels, routing=first).loss.item(), rel=1e-6)


def test_held_out_text_is_measured_from_the_untouched_model_on(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "moe")
    write_texts(folder)
    tokens = [int(word[1:]) for word in json.loads((folder / "math.jsonl").read_text().splitlines()[0])["text"].split()]
    (folder / "heldout.txt").write_text(" ".join(f"w{token}" for token in tokens))
    settings: dict[str, Any] = {"heldout": {"math": "heldout.txt"}, "evaluate_every": 2, "steps": 3, "save_every": 1}
    run(folder, "measured", **settings)
    found = rows(folder / "measured")
    assert [(row["step"], "heldout" in row) for row in found] == [(0, True), (1, False), (2, True), (3, True)]
    ids, labels = torch.tensor([tokens[:16]]), torch.tensor([[-100] * 8 + tokens[8:16]])
    assert found[0]["heldout"]["math"] == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-6)
    tuned: Any = AutoModelForCausalLM.from_pretrained(folder / "measured")
    assert found[3]["heldout"]["math"] == pytest.approx(tuned(ids, labels=labels).loss.item(), rel=1e-6)
    run(folder, "unmeasured", steps=3, save_every=1)
    assert moved(folder / "measured", folder / "unmeasured") == set()
    with pytest.raises(KeyboardInterrupt):
        tune(write_tuning(folder, **settings), folder / "measured-parts", progress=stop_after(3))
    tune(write_tuning(folder, **settings), folder / "measured-parts", resume=True)
    assert rows(folder / "measured-parts") == found


def test_a_mixture_routed_by_sequence(by_sequence: Path) -> None:
    facts = run(by_sequence, "out", losses={"load_balance": 0.1, "router_z": 0.01}, save_every=2)
    found = rows(by_sequence / "out")
    assert len(found[0]["load"]) == 1 and len(found[0]["load"][0]) == 3
    assert all(sum(row["load"][0]) == pytest.approx(1, abs=1e-5) for row in found)
    assert facts["parameters"]["router"] == 3 * 16
    assert "router.weight" in moved(by_sequence / "moe", by_sequence / "out")
    register()
    model: Any = AutoModelForCausalLM.from_pretrained(by_sequence / "out")
    assert model.route(torch.arange(3, 19)[None]).alpha.shape == (1, 3)
    run(by_sequence, "experts", train="experts", steps=1)
    learned = moved(by_sequence / "moe", by_sequence / "experts")
    assert learned and all(".mlp." in name for name in learned)


def test_distillation_pulls_to_each_domains_teacher(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "moe", tmp_path / "far")
    tensors = load_file(tmp_path / "far" / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "far" / "model.safetensors", {"format": "pt"})
    teachers = {"base": "base", "math": "math"}
    data = {name: {"path": f"{name}.jsonl", "teacher": teacher} for name, teacher in teachers.items()}
    settings: dict[str, Any] = {"model": str(tmp_path / "far"), "data": data, "steps": 30, "learning_rate": 3e-2}
    wanted = {"cross_entropy": 0.0, "distillation": {"weight": 1.0, "top": 64, "hidden": 1.0, "hidden_layers": [1, 2]}}
    progress = Recorded()
    result = tune(write_tuning(folder, **settings, losses=wanted), folder / "distilled", progress=progress)
    assert result is not None
    found = rows(folder / "distilled")
    first, last = found[0]["distillation"], np.mean([row["distillation"] for row in found[-5:]])
    assert 0 < last < 0.5 * first
    assert any(f"tokens take {result.facts['target_bytes'] / 1e6:,.3g} MB in " in text for text in progress.infos)
    assert found[0]["loss"] == pytest.approx(found[0]["distillation"] + found[0]["hidden"], rel=1e-6)


def test_targets_on_disk_have_the_size_that_was_told(folder: Path) -> None:
    data = {"math": {"path": "math.jsonl", "teacher": "math"}}
    path = write_tuning(
        folder, data=data, losses={"distillation": {"weight": 1.0, "top": 4, "hidden": 0.5}}, steps=2, save_every=1
    )
    with pytest.raises(KeyboardInterrupt):
        tune(path, folder / "sized", progress=stop_after(2))
    files = sorted((folder / ".sized.moerge-tuning" / "targets" / "math").iterdir())
    assert len(files) == 8
    data_bytes = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert data_bytes == 8 * 16 * (4 * (4 + 4) + 16 * 4)
    result = tune(path, folder / "sized", resume=True)
    assert result is not None and result.facts["target_bytes"] == data_bytes


def test_an_expert_that_dies_is_named(folder: Path, tmp_path: Path) -> None:
    """A gate that never chooses expert 3 in layer 0."""
    shutil.copytree(folder, tmp_path / "models", ignore=shutil.ignore_patterns(".*"))
    file = tmp_path / "models" / "moe" / "model.safetensors"
    tensors = load_file(file)
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[:3], gate[3] = 0.0, -100 * gate[3].sign()
    save_file(tensors, file, {"format": "pt"})
    progress = Recorded()
    path = write_tuning(tmp_path / "models", train="backbone", steps=21, learning_rate=1e-6, dying=0.5, batch=2)
    tune(path, tmp_path / "out", progress=progress)
    found = rows(tmp_path / "out")
    mean = np.mean([row["load"][0] for row in found[:20]], axis=0)
    assert found[18]["dying"] == [] and [0, int(mean.argmin())] in found[19]["dying"]
    said = [text for text in progress.warnings if f"expert {mean.argmin()} of layer 0 is dying" in text]
    assert len(said) == 1 and said[0].startswith("step 20: ") and said[0].endswith("raise losses.load_balance")


def test_bfloat16_is_computed_in_and_saved_in(folder: Path) -> None:
    run(folder, "half", dtype="bfloat16", save_dtype="bfloat16", steps=2)
    config = json.loads((folder / "half" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["rope_theta"]) == ("bfloat16", "bfloat16", 10000.0)
    assert {str(t.dtype) for t in load_file(folder / "half" / "model.safetensors").values()} == {"torch.bfloat16"}
    assert rows(folder / "half")[1]["cross_entropy"] > 0


def test_a_dense_model(folder: Path) -> None:
    run(folder, "dense", model="math", steps=2)
    assert "load" not in rows(folder / "dense")[0]
    assert moerge("verify", folder / "dense").code == 0


def test_a_dry_run_tells_shares_and_how_long_the_data_lasts(folder: Path) -> None:
    path = write_tuning(folder, steps=100, train="router")
    before = sorted(folder.iterdir())
    figures = moerge("tune", path, "--dry-run", "--json").json
    assert sorted(folder.iterdir()) == before
    base = figures["sources"]["base"]
    assert base["expected_share"] == 0.5 and abs(base["drawn_share"] - 0.5) < 0.1
    assert base["available_tokens"] == 12 * 21
    assert base["read"] == base["sequences"] / 15
    assert figures["parameters"]["router"] == figures["trained_parameters"] == 2 * 4 * 16
    assert figures["checkpoint_bytes"] == 4 * figures["parameters"]["all"] + 8 * 128
    shown = moerge("tune", path, "--dry-run").out
    assert "50.00%" in shown and f"read {base['read']:.2f} times" in shown and "trains 128 of" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "projectors"}, "train: the model has no projectors; it has router, experts, backbone"),
        (
            {"train": "models.*"},
            "'models.*' is none of router, projectors, experts, backbone, all, and no parameter's name matches",
        ),
        ({"model": "nowhere"}, "model: there is no folder"),
        (
            {"model": "math", "losses": {"load_balance": 0.1}},
            "losses.load_balance: the model has no router to balance, it is dense",
        ),
        ({"data": {"x": "none.txt"}}, "data.x: there is no file or folder"),
        ({"data": {"x": "short.txt"}}, "data.x: holds 3 tokens, less than one sequence of length 16"),
        ({"length": None}, "length is 2048, but the model has positions for 128: lower it"),
        ({"device": "cuda:7"}, "device is 'cuda:7': use cpu or cuda"),
        ({"processes": 2}, "processes is 2, but 1 process runs"),
    ],
)
def test_mistakes_leave_nothing_behind(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "short.txt").write_text("w3 w4")
    result = moerge("tune", write_tuning(folder, "bad.yaml", **changes), folder / "never")
    assert (result.code, result.out) == (2, ""), result
    assert message in result.err and len(result.err.splitlines()) == 1
    assert not (folder / "never").exists() and not (folder / ".never.moerge-tuning").exists()


def test_targets_that_must_not_be_written(folder: Path) -> None:
    path = write_tuning(folder, steps=1)
    assert "already exists: choose another folder, or replace it with --force" in moerge("tune", path, folder / "math").err
    assert "is not a checkpoint that moerge made" in moerge("tune", path, folder / "math", "--force").err
    assert "lies in the model's own folder" in moerge("tune", path, folder / "moe", "--force").err
    assert "say where to write" in moerge("tune", path).err
    assert moerge("tune", path, folder / "again", "--quiet").code == 0
    assert moerge("tune", path, folder / "again", "--force", "--seed", 1, "--json").json["settings"]["seed"] == 1


def test_a_teacher_of_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "math", tmp_path / "strange")
    file = tmp_path / "strange" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"other"'))
    data = {"math": {"path": "math.jsonl", "teacher": str(tmp_path / "strange")}}
    path = write_tuning(folder, data=data, losses={"distillation": {"weight": 1.0}})
    failed = moerge("tune", path, folder / "strange-out")
    assert failed.code == 2 and "has another vocabulary than the model, so its logits mean other tokens" in failed.err


def test_a_model_that_was_not_sharded_is_not_taken_for_one(folder: Path) -> None:
    with pytest.raises(InputError, match=r"did not shard .* over 1 processes: leave out 'sharding', which gives DDP"):
        load_sharded(folder / "moe", 1)


def test_a_loss_that_is_no_number_stops(folder: Path) -> None:
    failed = moerge("tune", write_tuning(folder, learning_rate=1e6, clip=0.0, steps=9, save_every=20), folder / "nan")
    assert failed.code == 2 and "is not a number after step" in failed.err and "lower learning_rate" in failed.err
    assert not (folder / "nan").exists()


def test_a_model_that_changes_while_it_is_tuned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder / "moe" / "model.safetensors"
    gather = _Job.gather
    monkeypatch.setattr(_Job, "gather", lambda self: (os.utime(source), gather(self))[1])
    result = moerge("tune", write_tuning(folder, "changed.yaml", steps=1), folder / "changed", "--quiet")
    assert result.code == 1 and str(source) in result.err
    assert not (folder / "changed").exists()
