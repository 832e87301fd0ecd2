"""Teachers whose heads have other rows than the model's, and those that cannot teach it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moerge.distillation import TargetFiles
from moerge.tuning.losses import forward_kl
from moerge.tuning.mixture import Mixture
from moerge.tuning.run import tune
from moerge.tuning.teachers import pad_vocab
from tests.helpers.command import moerge
from tests.helpers.hf_models import CASES, random_model, save
from tests.helpers.tiny import edit_config, make_models
from tests.tuning.tune_models import refused, rows, run, stop_after, write_texts, write_tuning

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `code` with 80 rows for the same 64 tokens."""
    found = tmp_path_factory.mktemp("wide")
    make_models(found, experts=["code"], dtype="F32", config={"vocab_size": 80})
    return found


@pytest.mark.parametrize("temperature", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("largest", [2, 5, 7])
def test_what_a_teacher_has_no_row_for_has_the_probability_zero(tmp_path: Path, largest: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, width, generator=generator) for width in (4, 6))
    files = TargetFiles(tmp_path, (), largest)
    files.save("one", pad_vocab(teacher, 6, -1e6 * max(1, temperature)), [])
    student.requires_grad_()
    loss = forward_kl(student, files.load("one"), temperature)
    loss.backward()
    kept = teacher.topk(min(largest, 4))
    p, log_q = (kept.values / temperature).softmax(-1), (student / temperature).log_softmax(-1).gather(-1, kept.indices)
    assert loss.item() == pytest.approx(temperature**2 * (p * (p.log() - log_q)).nansum(-1).mean().item(), rel=1e-4, abs=1e-3)
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize("top", [60, 64, 70, 80])
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_the_first_distance_to_a_teacher_with_another_number_of_rows(folder: Path, wide: Path, wider: str, top: int) -> None:
    student, teacher = (wide / "base", folder / "math") if wider == "student" else (folder / "base", wide / "code")
    data = {"math": {"path": "math.jsonl", "teacher": str(teacher)}}
    losses = {"cross_entropy": 0.0, "distillation": {"weight": 1.0, "top": top, "temperature": 2.0}}
    out = f"{wider}-{top}"
    run(folder, out, model=str(student), data=data, losses=losses, steps=1)
    mine: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    documents = [json.loads(line)["text"] for line in (folder / "math.jsonl").read_text().splitlines()]
    tokens = [number for text in documents for number in [*(int(word[1:]) for word in text.split()), 2]]
    mixture = Mixture({"math": 1.0}, 4, 0)
    numbers = [mixture.place(index, [len(tokens) // 16])[1] for index in range(4)]
    ids = torch.tensor([tokens[number * 16 : number * 16 + 16] for number in numbers])
    with torch.no_grad():
        q, kept = (mine(ids).logits / 2).log_softmax(-1), (theirs(ids).logits[..., :64] / 2).topk(min(top, 64))
    p = kept.values.log_softmax(-1)
    expected = 2**2 * (p.exp() * (p - q.gather(-1, kept.indices))).sum(-1).mean()
    assert rows(folder / out)[0]["distillation"] == pytest.approx(expected.item(), abs=1e-5)


def test_teachers_with_different_numbers_of_rows_in_one_batch(folder: Path, wide: Path) -> None:
    teachers = {"base": wide / "base", "math": folder / "math", "code": wide / "code"}
    data = {name: {"path": f"{name}.jsonl", "teacher": str(teacher)} for name, teacher in teachers.items()}
    losses = {"distillation": {"weight": 1.0, "top": 70}}
    path = write_tuning(folder, "mixed.yaml", model=str(wide / "base"), data=data, losses=losses, steps=3, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        tune(path, folder / "mixed", progress=stop_after(3))
    for name in teachers:
        for file in (folder / ".mixed.moerge-tuning" / "targets" / name).iterdir():
            found = load_file(file)
            assert found["logits"].shape == found["ids"].shape == (16, 70)
            beyond = found["logits"].softmax(-1)[found["ids"] >= 64]
            assert len(beyond) and bool((beyond == 0).all()) == (name == "math")
    assert tune(path, folder / "mixed", resume=True) is not None


def _vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"other"'))


def _gpt2(folder: Path) -> None:
    shutil.rmtree(folder)
    config = CASES["gpt2"]()
    config.n_positions = 8
    save(random_model(config, seed=0), folder)


@pytest.mark.parametrize(
    ("damage", "hidden", "message"),
    [
        (_vocabulary, 0.0, "has another vocabulary than the model, so its logits mean other tokens"),
        (
            lambda folder: edit_config(folder, vocab_size=60),
            0.0,
            "has 60 rows, but its tokenizer gives id 63: add rows to it, or name another teacher",
        ),
        (
            lambda folder: edit_config(folder, max_position_embeddings=15),
            0.0,
            "has positions for 15 tokens, but length is 16: lower length, or name another teacher",
        ),
        (_gpt2, 0.0, "has positions for 8 tokens, but length is 16: lower length, or name another teacher"),
        (
            lambda folder: edit_config(folder, num_hidden_layers=1),
            1.0,
            "has another width or depth: compare logits only (distillation.hidden: 0)",
        ),
        (lambda folder: edit_config(folder, model_type="novel"), 0.0, "transformers cannot load "),
    ],
    ids=["vocabulary", "rows", "positions", "learned positions", "depth", "type"],
)
def test_a_teacher_that_cannot_teach_is_found_before_any_runs(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    hidden: float,
    message: str,
) -> None:
    def runs(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a teacher ran")

    monkeypatch.setattr("moerge.tuning.teachers.load", runs)
    bad = tmp_path / "bad"
    shutil.copytree(folder / "code", bad)
    damage(bad)
    data = {name: {"path": f"{name}.jsonl", "teacher": str(folder / name)} for name in ("base", "math")}
    data["code"] = {"path": "code.jsonl", "teacher": str(bad)}
    path = write_tuning(folder, "bad.yaml", data=data, losses={"distillation": {"weight": 1.0, "hidden": hidden}})
    line = path.read_text().splitlines().index(f"    teacher: {bad}") + 1
    what = message if message.startswith("transformers") else f"{bad} {message}"
    for out in (None, folder / "never"):
        assert f"{path}, line {line}: data.code.teacher: {what}" in refused(path, out)


def test_hidden_states_of_a_teacher_that_routes_sequences(by_sequence: Path) -> None:
    write_texts(by_sequence)
    data = {"math": {"path": "math.jsonl", "teacher": "moe"}}
    path = write_tuning(by_sequence, model="math", data=data, losses={"distillation": {"weight": 1.0, "hidden": 1.0}})
    failed = moerge("tune", path, "--dry-run")
    assert failed.code == 2 and "data.math.teacher: moe routes sequences to experts with hidden states each" in failed.err
    path = write_tuning(by_sequence, model="math", data=data, losses={"distillation": {"weight": 1.0}}, steps=1)
    assert moerge("tune", path, by_sequence / "taught", "--quiet").code == 0
