"""Tuning on conversations: answers stay whole and alone are learned, whatever they are batched with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.errors import InputError
from moerge.texts import Conversation, encode_answers
from moerge.tuning.packing import CONTEXT, LEARNED, PADDING, Packer
from moerge.tuning.run import plan_tune
from moerge.tuning.tokens import tokenise
from tests.helpers.chat import CHATML, THINKING, chat_tokenizer, messages
from tests.helpers.hf_models import load
from tests.tuning.tune_models import make_moe, refused, rows, run, write_tuning

WORDED = (
    "{%- for m in messages %}{{- ('w3 ' if m.role == 'user' else 'w4 ') + m.content + ' w5 ' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'w4 ' }}{%- endif %}"
)
"""A template in the words of the tiny models."""
DOCUMENTS = st.lists(
    st.one_of(st.text("ab ", min_size=1, max_size=30), st.lists(st.text("ab", min_size=1, max_size=9), min_size=2, max_size=6)),
    min_size=1,
    max_size=8,
)


def chat_moe(folder: Path, **options: Any) -> Path:
    """A mixture with a chat template, and conversations of 4 turns in `chat.jsonl`."""
    moe = make_moe(folder, **options)
    (moe / "chat_template.jinja").write_text(WORDED)
    talks = [[f"w{10 + (7 * i + 3 * turn + j) % 40}" for j in range(1 + i % 3)] for i in range(12) for turn in range(4)]
    chats = [messages(*(" ".join(turn) for turn in talks[4 * i : 4 * i + 4])) for i in range(12)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return moe


@settings(max_examples=25)
@given(documents=DOCUMENTS, length=st.integers(8, 40))
def test_answers_stay_whole_and_each_is_there_once(documents: list[Any], length: int) -> None:
    tokenizer = chat_tokenizer(CHATML)
    given = [one if isinstance(one, str) else Conversation(tuple(messages(*one))) for one in documents]
    packer = Packer(tokenizer, length)
    pieces = [*packer.pieces(given), *packer.finish()]
    ids_N, marks_N = (np.concatenate([piece[part] for piece in pieces] or [np.array([], int)]) for part in (0, 1))
    assert len(ids_N) == packer.tokens and packer.learned == np.count_nonzero(marks_N == LEARNED)
    answers, fitting = [], 0
    for conversation in (one for one in given if isinstance(one, Conversation)):
        (encoded,) = encode_answers(tokenizer, conversation)
        starts = [place for place, answer in enumerate(encoded.answers) if answer and not encoded.answers[place - 1]]
        ends = [place + 1 for place, answer in enumerate(encoded.answers) if answer and not [*encoded.answers, False][place + 1]]
        answers += [encoded.ids[start:end] for start, end in zip(starts, ends, strict=True) if end <= length]
        fitting += sum(end <= length for end in ends)
        packer.left_out -= sum(end > length for end in ends)
    assert packer.left_out == 0
    row, place = list(zip(ids_N.tolist(), marks_N.tolist(), strict=True)), 0
    for answer in answers:  # in order, each within one sequence
        wanted = [(token, LEARNED) for token in answer]
        place = next(p for p in range(place, len(row)) if row[p : p + len(wanted)] == wanted and row[p - 1][1] == CONTEXT)
        assert place // length == (place + len(wanted) - 1) // length
        place += len(wanted)


def test_texts_alone_have_no_marks_and_the_tokens_they_had(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    plain = tokenise(iter(["a b", "c" * 20]), tokenizer, length=5, sequences=2, file=tmp_path / "a.bin")
    assert plain.learned is None and not (tmp_path / "a.marks").exists() and not plain.marks(0).any()
    mixed = [*(["a b"] * 70), Conversation(tuple(messages("a", "b")))]
    found = tokenise(iter(mixed), tokenizer, length=32, sequences=99, file=tmp_path / "b.bin")
    assert found.learned is not None and found.exhausted and found.tokens % 32 == 0
    marks_N = np.concatenate([found.marks(number) for number in range(found.sequences)])
    assert not marks_N[:140].any() and {CONTEXT, PADDING} <= set(marks_N[140:].tolist())
    again = tokenise(iter(()), tokenizer, length=32, sequences=99, file=tmp_path / "b.bin")
    assert again.digest == found.digest != plain.digest


def test_a_conversation_longer_than_a_sequence_keeps_what_fits(tmp_path: Path) -> None:
    tokenizer, talk = chat_tokenizer(CHATML), messages("a", "b", "c" * 50, "d")
    found = tokenise(iter([Conversation(tuple(talk))]), tokenizer, length=40, sequences=9, file=tmp_path / "a.bin")
    assert (found.sequences, found.left_out) == (1, 1)
    with pytest.raises(InputError, match=r"2 answers, none of which ends within one sequence of length 8: raise 'length'"):
        tokenise(iter([Conversation(tuple(talk))]), tokenizer, length=8, sequences=9, file=tmp_path / "b.bin")


def test_thinking_is_learned_in_sequences_of_its_own(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(THINKING)
    talk = messages("one?", "<think>\nfirst\n</think>\n\nA", "two?", "<think>\nsecond\n</think>\n\nB")
    found = tokenise(iter([Conversation(tuple(talk))]), tokenizer, length=128, sequences=9, file=tmp_path / "a.bin")
    ids_N = np.concatenate([found.sequence(n)[found.marks(n) == LEARNED] for n in range(found.sequences)])
    assert tokenizer.decode(ids_N).count("</think>") == 2 and found.left_out == 0


@pytest.mark.slow
def test_the_loss_is_transformers_own_over_the_answers(tmp_path: Path) -> None:
    moe = chat_moe(tmp_path)
    options = {"data": {"chat": "chat.jsonl"}, "length": 24, "batch": 4, "steps": 1, "shuffle": False}
    run(tmp_path, "out", **options)
    (row,) = rows(tmp_path / "out")
    model = load(moe, dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(moe)
    packer = Packer(tokenizer, 24)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    pieces = [*packer.pieces([Conversation(tuple(chat)) for chat in chats]), *packer.finish()]
    ids_BT, marks_BT = (
        torch.from_numpy(np.concatenate([p[part] for p in pieces]).astype(np.int64)).reshape(-1, 24)[:4] for part in (0, 1)
    )
    with torch.no_grad():
        loss = model(ids_BT, attention_mask=(marks_BT != PADDING).long(), labels=ids_BT.where(marks_BT == LEARNED, -100)).loss
    assert row["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by_sequence", [False, True])
def test_how_a_step_is_cut_changes_nothing(tmp_path: Path, by_sequence: bool) -> None:
    chat_moe(tmp_path, by_sequence=by_sequence)
    data = {"chat": "chat.jsonl", "text": "math.jsonl"}
    losses = {"load_balance": 0.1 if by_sequence else 0.0}
    options = {"data": data, "length": 24, "batch": 4, "steps": 3, "losses": losses, "heldout": {"chat": "chat.jsonl"}}
    found = [run(tmp_path, f"out{n}", **options, accumulation=n) for n in (1, 4)]
    one, four = (rows(tmp_path / f"out{n}") for n in (1, 4))
    for whole, parts in zip(one[1:], four[1:], strict=True):
        assert parts["cross_entropy"] == pytest.approx(whole["cross_entropy"], rel=1e-4)
        if not by_sequence:
            assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    assert all(math.isfinite(row["heldout"]["chat"]) for row in one if "heldout" in row)
    assert found[0]["sources"]["chat"]["answers"] > 0 and "answers" not in found[0]["sources"]["text"]


@pytest.mark.slow
def test_teachers_pull_where_answers_are(tmp_path: Path) -> None:
    chat_moe(tmp_path)
    data = {"chat": {"path": "chat.jsonl", "teacher": "moe"}}
    losses = {"cross_entropy": 0.0, "distillation": {"weight": 1.0, "hidden": 1.0, "hidden_layers": "middle"}}
    run(tmp_path, "out", data=data, length=24, steps=1, losses=losses)
    (row,) = rows(tmp_path / "out")
    assert row["distillation"] == pytest.approx(0, abs=1e-5) and row["hidden"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_what_cannot_be_learned_from_is_one_sentence(tmp_path: Path) -> None:
    moe = chat_moe(tmp_path)
    path = write_tuning(tmp_path, data={"chat": "chat.jsonl"}, length=24)
    assert plan_tune(path).sources()["chat"]["left_out_answers"] == 0
    (moe / "chat_template.jinja").write_text("{% for m in messages %}")
    assert "data.chat: the chat template does not compile" in refused(path)
    (moe / "chat_template.jinja").unlink()
    assert "data.chat: " in (said := refused(path, tmp_path / "never")) and "no chat template" in said
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"content": "w3"}]}\n')
    assert "chat.jsonl, line 1: message 1 has no role" in refused(path)
