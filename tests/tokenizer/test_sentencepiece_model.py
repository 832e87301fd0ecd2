"""SentencePiece's tokenizer.model, read without its library."""

from __future__ import annotations

from pathlib import Path

import pytest

import moerge as api
from moerge.tokenizer import read_vocabulary
from moerge.tokenizer.sentencepiece_model import read_sentencepiece
from tests.helpers.tokenizers_of_all_kinds import BPE, NORMAL, UNIGRAM, USER_DEFINED, WORDS, pieces_of_text, sentencepiece


def test_what_is_in_the_file(tmp_path: Path) -> None:
    pieces = [*pieces_of_text("▁a", "é" * 70), ("▁me", 0.0, USER_DEFINED)]
    found = read_sentencepiece(sentencepiece(tmp_path, pieces, UNIGRAM) / "tokenizer.model")
    assert list(zip(found.texts, found.scores, found.types, strict=True)) == pieces
    assert (found.algorithm, found.byte_fallback, found.unknown) == (UNIGRAM, False, "<unk>")
    assert {text: (entry["id"], entry["content"], entry["special"]) for text, entry in found.added.items()} == {
        "<unk>": (0, "<unk>", True),
        "<s>": (1, "<s>", True),
        "</s>": (2, "</s>", True),
        "▁me": (5, " me", False),
    }
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary is not None
    assert vocabulary.ids == {text: number for number, (text, _, _) in enumerate(pieces)}


def test_merge_rules_stand_in_the_order_of_scores(tmp_path: Path) -> None:
    """Two that give the same piece in the order of their parts' ids; pieces that no two others make have none."""
    scored = [("a", -1.0), ("b", -2.0), ("c", -3.0), ("ab", -9.0), ("bc", -4.0), ("abc", -5.0), ("xyz", -1.0)]
    file = sentencepiece(tmp_path, [*pieces_of_text(), *((text, score, NORMAL) for text, score in scored)]) / "tokenizer.model"
    assert read_sentencepiece(file).as_json() == {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": False,
        "vocab": {text: number for number, text in enumerate(("<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc", "abc", "xyz"))},
        "merges": [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")],
    }


def test_a_unigram_model(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path, pieces_of_text("a", bytes_too=True), UNIGRAM, name="spiece.model") / "spiece.model"
    found = read_sentencepiece(file).as_json()
    assert (found["type"], found["unk_id"], found["byte_fallback"]) == ("Unigram", 0, True)
    assert found["vocab"][2:4] + found["vocab"][-1:] == [["</s>", 0.0], ["<0x00>", 0.0], ["a", -1.0]]


def test_models_that_split_otherwise(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path, pieces_of_text("a"), WORDS) / "tokenizer.model"
    with pytest.raises(
        api.InputError, match=r"tokenizer\.model splits text into words: only BPE and Unigram models can be mapped"
    ):
        read_sentencepiece(file).as_json()


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere between two pieces it may pass for a shorter one, anywhere else it does not; nothing else gets out."""
    content = (sentencepiece(tmp_path, pieces_of_text("▁a", "é")) / "tokenizer.model").read_bytes()
    file = tmp_path / "damaged"
    outcomes: list[bool | str] = []
    for cut in range(len(content)):
        file.write_bytes(content[:cut])
        try:
            outcomes.append(bool(read_sentencepiece(file).texts))
        except api.InputError as error:
            outcomes.append(str(error))
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert all(f"{file} is not a SentencePiece model: give the checkpoint a tokenizer.json" in error for error in errors)
    assert outcomes.count(True) == 5  # after each of the pieces
    for garbage in (b"", b"\xff" * 20, b"\x0f\xff", b"{}", b"\x0a\x03\x0a\x01\xff", b"\x0a\x02\x08\x01", b"\x0a\x05\x12\x03abc"):
        file.write_bytes(garbage)
        with pytest.raises(api.InputError, match="is not a SentencePiece model"):
            read_sentencepiece(file)
    with pytest.raises(FileNotFoundError):
        read_sentencepiece(tmp_path / "absent")


def test_the_same_as_the_library(tokenizers_of_others: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed").SentencePieceProcessor()
    file = tokenizers_of_others / "mistral-v1" / "tokenizer.model"
    library.Load(str(file))
    found, ids = read_sentencepiece(file), range(library.GetPieceSize())
    assert found.algorithm == BPE
    assert list(found.texts) == [library.IdToPiece(number) for number in ids]
    assert list(found.scores) == [library.GetScore(number) for number in ids]
