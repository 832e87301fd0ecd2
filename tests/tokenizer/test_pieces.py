"""Mapping one vocabulary to another by what tokens stand for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import moerge as api
from moerge.checkpoint.reader import Checkpoint
from moerge.tokenizer import TokenAlignment, align_vocabulary, read_vocabulary
from moerge.tokenizer.pieces import COMPOSED, EXACT, LEFT
from moerge.tokenizer.splitting import Splitter
from moerge.tokenizer.surfaces import read_tokens
from tests.helpers.tiny import write_json
from tests.helpers.tokenizers_of_all_kinds import (
    BPE,
    UNIGRAM,
    USER_DEFINED,
    WORDS,
    byte_level,
    model,
    pieces_of_text,
    sentencepiece,
    special,
    tokenizer_json,
)

pytest.importorskip("tokenizers", reason="composing needs tokenizers")

THE = ["t h", "th e", "Ġ the"]
NEXT = 1000
"""More rows than any tiny tokenizer has tokens."""


def mapped(chosen: Checkpoint, own: Checkpoint, rows: int = NEXT, own_rows: int = NEXT) -> TokenAlignment:
    found = align_vocabulary(chosen, own, rows, own_rows)
    assert found.starts_V1.dtype == np.int64 and found.starts_V1.shape == (rows + 1,)
    assert found.rows_P.dtype == np.int32 and found.rows_P.shape == (found.starts_V1[-1],)
    assert found.kinds_V.dtype == np.uint8 and found.kinds_V.shape == (rows,)
    counts_V = np.diff(found.starts_V1)
    assert ((counts_V == 0) == (found.kinds_V == LEFT)).all() and (counts_V[found.kinds_V == EXACT] == 1).all()
    assert sum(found.shares.values()) == pytest.approx(1)
    return found


def pieces_by_text(chosen: Checkpoint, own: Checkpoint, found: TokenAlignment) -> dict[str, list[str]]:
    """The pieces of each token, both as their vocabularies spell them."""
    ours, theirs = read_vocabulary(chosen.folder), read_vocabulary(own.folder)
    assert ours is not None and theirs is not None
    starts_V1, rows_P = found.starts_V1, found.rows_P
    spans = {text: rows_P[starts_V1[number] : starts_V1[number + 1]].tolist() for text, number in ours.ids.items()}
    return {text: [theirs.texts[row] for row in rows] for text, rows in spans.items()}


def test_the_same_text_in_other_spellings(tmp_path: Path) -> None:
    chosen = model(byte_level(tmp_path / "chosen", [*THE, "Ċ Ċ", "Ã ©", "the n"]))
    pieces = pieces_of_text("▁", "t", "h", "e", "é", "\u00a0", "th", "the", "▁the", "▁the▁the", bytes_too=True)
    own = model(sentencepiece(tmp_path / "own", pieces))
    found = mapped(chosen, own)
    texts = pieces_by_text(chosen, own, found)
    assert {token: texts[token] for token in ("Ġ", "Ġthe", "the", "t", "Ċ", "Ã©", "Ã", "a", "Z")} == {
        "Ġ": ["▁"],
        "Ġthe": ["▁the"],
        "the": ["the"],
        "t": ["t"],
        "Ċ": ["<0x0A>"],
        "Ã©": ["é"],
        "Ã": ["<0xC3>"],
        "a": ["<0x61>"],
        "Z": ["<0x5A>"],
    }
    assert texts["ĊĊ"] == ["<0x0A>", "<0x0A>"]
    assert texts["then"] == ["the", "<0x6E>"]
    tokens = len(texts)
    assert found.shares == {"exact": (tokens - 2) / tokens, "composed": 2 / tokens, "left": 0.0}
    assert (found.kinds_V[tokens:] == LEFT).all() and not found.tokens_V[tokens:].any() and found.tokens_V[:tokens].all()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Half of a character, alone and beside text: the tokens of single bytes, where there are some."""
    chosen = model(byte_level(tmp_path / "chosen", ["t h", "Ġ Ã", "ä ¸", "© th"]))
    pieces = pieces_of_text("▁", "t", "h", "th", "¸")
    own = model(sentencepiece(tmp_path / "own", [*pieces_of_text(bytes_too=True), *pieces[3:]]))
    texts = pieces_by_text(chosen, own, mapped(chosen, own))
    assert texts["ĠÃ"] == ["▁", "<0xC3>"]
    assert texts["ä¸"] == ["<0xE4>", "<0xB8>"]
    assert texts["©th"] == ["<0xA9>", "th"]
    without = model(sentencepiece(tmp_path / "without", pieces))
    found = mapped(chosen, without)
    texts = pieces_by_text(chosen, without, found)
    assert (texts["ĠÃ"], texts["ä¸"], texts["©th"], texts["th"]) == ([], [], [], ["th"])


def test_a_single_byte_and_its_character(tmp_path: Path) -> None:
    """SentencePiece has two tokens for an `A` in its table; both are that of the other, but only one predicts it."""
    own = model(byte_level(tmp_path / "own"))
    chosen = model(sentencepiece(tmp_path / "chosen", pieces_of_text("A", bytes_too=True)))
    found = mapped(chosen, own)
    assert pieces_by_text(chosen, own, found)["A"] == pieces_by_text(chosen, own, found)["<0x41>"] == ["A"]
    head = found.for_head()
    texts = pieces_by_text(chosen, own, head)
    assert (texts["A"], texts["<0x41>"], texts["<0x42>"]) == (["A"], [], ["B"])
    assert head.kinds_V[3 + 0x41] == LEFT
    assert head.rows_P.size == found.rows_P.size - 1
    other = model(sentencepiece(tmp_path / "other", pieces_of_text("B", "A", bytes_too=True)))
    texts = pieces_by_text(chosen, other, mapped(chosen, other))
    assert (texts["A"], texts["<0x41>"], texts["<0x42>"]) == (["A"], ["<0x41>"], ["<0x42>"])


@pytest.mark.parametrize("algorithm", [BPE, UNIGRAM])
def test_text_that_a_vocabulary_cannot_write(tmp_path: Path, algorithm: int) -> None:
    """Without tokens for bytes some characters are unknown: nothing stands for a token that has one."""
    chosen = model(byte_level(tmp_path / "chosen", ["t h", "th X"]))
    own = model(sentencepiece(tmp_path / "own", pieces_of_text("▁", "t", "h"), algorithm))
    found = mapped(chosen, own)
    texts = pieces_by_text(chosen, own, found)
    assert (texts["th"], texts["X"], texts["thX"], texts["t"]) == (["t", "h"], [], [], ["t"])
    assert found.shares["composed"] == 1 / 258


def test_a_byte_level_vocabulary_without_all_bytes(tmp_path: Path) -> None:
    """The library leaves out what such a model cannot write; the rest is not the token."""
    chosen = model(byte_level(tmp_path / "chosen", ["t X", "t h"]))
    split_by = {"type": "BPE", "vocab": {"t": 0, "h": 1}, "merges": []}
    own = model(tokenizer_json(tmp_path / "own", split_by, decoder={"type": "ByteLevel"}))
    texts = pieces_by_text(chosen, own, mapped(chosen, own))
    assert (texts["tX"], texts["th"]) == ([], ["t", "h"])


def test_special_tokens_by_text_then_by_role(tmp_path: Path) -> None:
    chosen = byte_level(tmp_path / "chosen", ["t h"], added=["<s>", "<end>", "<pad>", "<mask>", "<|same|>"])
    write_json(chosen / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "<end>"}, "pad_token": "<pad>"})
    own = byte_level(tmp_path / "own", ["t h", "< s", "<s >"], added=["<|endoftext|>", "<|same|>"])
    first = model(chosen)
    second = model(own, bos_token_id=0, eos_token_id=[0, 1])
    found = mapped(first, second)
    texts = pieces_by_text(first, second, found)
    assert {token: texts[token] for token in ("<s>", "<end>", "<pad>", "<mask>", "<|same|>")} == {
        "<s>": ["<|endoftext|>"],
        "<end>": ["<|endoftext|>"],
        "<pad>": [],
        "<mask>": [],
        "<|same|>": ["<|same|>"],
    }
    assert found.kinds_V[:5].tolist() == [EXACT, EXACT, LEFT, LEFT, EXACT]
    assert found.for_head().kinds_V[:5].tolist() == [LEFT, EXACT, LEFT, LEFT, EXACT]
    assert np.flatnonzero(found.doubled_V).tolist() == [0]
    back = pieces_by_text(second, first, mapped(second, first))
    assert back["<|endoftext|>"] == ["<end>"]  # it begins texts too, but nothing else ends them
    assert back["<s>"] == ["<s>"]  # text there, special here: better than "<", "s", ">"


def test_where_nothing_begins_texts(tmp_path: Path) -> None:
    chosen = byte_level(tmp_path / "chosen", ["t h"], added=["<s>", "</s>"])
    own = byte_level(tmp_path / "own", ["t h", "h e"], added=["<|endoftext|>"])
    first = model(chosen, text_config={"bos_token_id": 0, "eos_token_id": 1})
    texts = pieces_by_text(first, model(own), mapped(first, model(own, eos_token_id=0)))
    assert (texts["<s>"], texts["</s>"]) == (["<|endoftext|>"], ["<|endoftext|>"])
    texts = pieces_by_text(first, model(own), mapped(first, model(own, bos_token_id=0, eos_token_id=5000, pad_token_id="x")))
    assert (texts["<s>"], texts["</s>"]) == (["<|endoftext|>"], [])


def test_roles_that_ordinary_tokens_have(tmp_path: Path) -> None:
    """GPT-2's own files do not say that a token is special: its text counts, and then its role."""
    chosen = byte_level(tmp_path / "chosen", ["t h", "< e"])
    own = byte_level(tmp_path / "own", ["t h"], added=["<|endoftext|>"])
    first = model(chosen, eos_token_id=257, pad_token_id=256)
    texts = pieces_by_text(first, model(own), mapped(first, model(own, eos_token_id=0, pad_token_id=0)))
    assert (texts["<e"], texts["th"]) == (["<|endoftext|>"], ["th"])


def test_added_tokens_that_are_text(tmp_path: Path) -> None:
    chosen = byte_level(tmp_path / "chosen", ["t h"])
    written = json.loads((chosen / "tokenizer.json").read_text())
    written["added_tokens"] = [{"id": 300, "content": "th th", "special": False}, {"id": 301, "content": "", "special": False}]
    write_json(chosen / "tokenizer.json", written)
    own = sentencepiece(tmp_path / "own", [*pieces_of_text("▁", "t", "h"), ("▁th", 0.0, USER_DEFINED)])
    found = mapped(model(chosen), model(own))
    texts = pieces_by_text(model(chosen), model(own), found)
    assert (texts["thĠth"], texts[""], found.kinds_V[300]) == (["t", "h", "▁", "t", "h"], [], COMPOSED)
    back = pieces_by_text(model(own), model(chosen), mapped(model(own), model(chosen)))
    assert back["▁th"] == ["Ġ", "th"]


WORDPIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


def test_word_pieces(tmp_path: Path) -> None:
    """A word of WordPiece follows a space, unless the other has the word without one alone."""
    words = ["[UNK]", "the", "##n", "then", "t", ",", "##h"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    bert = model(tmp_path / "bert")
    other = model(byte_level(tmp_path / "other", [*THE, "e n", "Ġ th", "Ġth en", "the n"]))
    texts = pieces_by_text(bert, other, mapped(bert, other))
    assert {word: texts[word] for word in words[1:]} == {
        "the": ["Ġthe"],
        "##n": ["n"],
        "then": ["Ġthen"],
        "t": ["t"],
        ",": [","],
        "##h": ["h"],
    }
    back = pieces_by_text(other, bert, mapped(other, bert))
    assert (back["Ġthe"], back["then"], back["the"], back["Ġth"], back["n"]) == (
        ["the"],
        ["then"],
        ["the"],
        ["t", "##h"],
        ["##n"],
    )
    assert back["Ã"] == back["z"] == back["en"] == []
    split_by = {**WORDPIECE, "vocab": {word: number for number, word in enumerate(words)}}
    same = model(tokenizer_json(tmp_path / "same", split_by, decoder={"type": "WordPiece"}))
    assert mapped(bert, same).shares == {"exact": 1.0, "composed": 0.0, "left": 0.0}


def test_words_that_end_with_a_mark(tmp_path: Path) -> None:
    vocabulary = {text: number for number, text in enumerate(["t", "h", "h</w>", "th", "th</w>"])}
    split_by = {"type": "BPE", "vocab": vocabulary, "merges": ["t h</w>"], "end_of_word_suffix": "</w>"}
    clip = model(tokenizer_json(tmp_path / "clip", split_by, decoder={"type": "BPEDecoder", "suffix": "</w>"}))
    other = model(byte_level(tmp_path / "other", ["t h", "Ġ th", "Ġ t", "Ġt th"]))
    assert pieces_by_text(clip, other, mapped(clip, other)) == {
        "t": ["Ġt"],
        "h": ["h"],
        "h</w>": ["h"],
        "th": ["Ġth"],
        "th</w>": ["Ġth"],
    }


def test_whole_words(tmp_path: Path) -> None:
    split_by = {"type": "WordLevel", "vocab": {"<unk>": 0, "the": 1, "th": 2}, "unk_token": "<unk>"}
    words = model(tokenizer_json(tmp_path / "words", split_by, [special(0, "<unk>")]))
    other = model(byte_level(tmp_path / "other", [*THE, "Ġ a"]))
    texts = pieces_by_text(other, words, mapped(other, words))
    assert (texts["Ġthe"], texts["the"], texts["Ġa"], texts["e"]) == (["the"], ["the"], [], [])
    head = pieces_by_text(other, words, mapped(other, words).for_head())
    assert [head["Ġthe"], head["the"]].count(["the"]) == 1


def test_the_same_tokenizer(tmp_path: Path) -> None:
    """Every row that both have is exact, those beyond the tokens too."""
    one, two = byte_level(tmp_path / "one", THE), byte_level(tmp_path / "two", THE)
    for other in (two, tokenizer_json(tmp_path / "rewritten", json.loads((one / "tokenizer.json").read_text())["model"])):
        if other.name == "rewritten":  # the same tokens, other bytes
            write_json(other / "tokenizer.json", {**json.loads((one / "tokenizer.json").read_text()), "padding": None})
        found = mapped(model(one), model(other), 270, 264)
        assert found.kinds_V.tolist() == [EXACT] * 264 + [LEFT] * 6
        assert found.rows_P.tolist() == list(range(264))
        assert found.shares == {"exact": 1.0, "composed": 0.0, "left": 0.0}
        assert found.for_head().rows_P.tolist() == list(range(264))


def test_an_entry_that_an_added_token_hides(tmp_path: Path) -> None:
    """GPT-NeoX's runs of spaces: the row of the added token is the one that was trained, alone and as a piece."""
    chosen = model(byte_level(tmp_path / "chosen", ["t h", "th h"]))
    folder = byte_level(tmp_path / "own", ["t h"])
    written = json.loads((folder / "tokenizer.json").read_text())
    write_json(folder / "tokenizer.json", {**written, "added_tokens": [{"id": 300, "content": "th", "special": False}]})
    found = mapped(chosen, model(folder))
    assert [found.rows_P[found.starts_V1[number] : found.starts_V1[number + 1]].tolist() for number in (256, 257)] == [
        [300],
        [300, ord("h")],
    ]


def test_tokens_without_a_row(tmp_path: Path) -> None:
    """An embedding with fewer rows than the tokenizer has tokens: what has no row stands for nothing."""
    chosen, own = model(byte_level(tmp_path / "chosen", ["t h"])), model(byte_level(tmp_path / "own", ["h e", "t h"]))
    assert pieces_by_text(chosen, own, mapped(chosen, own))["th"] == ["th"]
    found = mapped(chosen, own, own_rows=257)
    assert pieces_by_text(chosen, own, found)["th"] == []  # the splitter makes one token of it, which has no row
    assert mapped(chosen, own, rows=256).shares == {"exact": 1.0, "composed": 0.0, "left": 0.0}


def test_nothing_in_common(tmp_path: Path) -> None:
    first = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
    second = {"type": "WordLevel", "vocab": {"<unk>": 0, "b": 1}, "unk_token": "<unk>"}
    one = model(tokenizer_json(tmp_path / "one", first, [special(0, "<unk>")]))
    two = model(tokenizer_json(tmp_path / "two", second, [special(0, "<unk>")]))
    with pytest.raises(api.InputError) as caught:
        align_vocabulary(one, two, 2, 2)
    assert str(caught.value) == (
        "the tokenizers of one and two have no token in common, so two cannot be mapped to the tokens of one: "
        "choose another 'tokenizer', or leave one of them out"
    )


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    good, none = model(byte_level(tmp_path / "good", THE)), model(tmp_path / "none")
    none.folder.mkdir()
    for chosen, own in ((good, none), (none, good), (none, none)):
        with pytest.raises(api.InputError, match=r"none has no tokenizer whose tokens .*: put its tokenizer\.json"):
            align_vocabulary(chosen, own, 300, 300)
    shutil.copyfile(good.folder / "tokenizer.json", none.folder / "tokenizer.json")
    (none.folder / "tokenizer.json").write_text("{")
    with pytest.raises(api.InputError, match=r"cannot read .*none/tokenizer\.json as JSON"):
        align_vocabulary(good, none, 300, 300)
    tokenizer_json(none.folder, {"type": "BPE", "vocab": {"t": 0}, "merges": ["x y"]}, decoder={"type": "ByteLevel"})
    with pytest.raises(api.InputError, match=r"the tokenizers library cannot read .*none/tokenizer\.json: .*; fetch or copy it"):
        align_vocabulary(good, none, 300, 300)
    (none.folder / "tokenizer.json").unlink()
    write_json(none.folder / "vocab.json", {"t": 0, "h": 1, "Ġ": 2, "Ġt": 3})
    with pytest.raises(api.InputError, match=r"none/merges\.txt is missing or damaged: without it no text can be split"):
        align_vocabulary(good, none, 300, 300)
    (none.folder / "merges.txt").write_text("#version: 0.2\nĠ t\n\n")
    assert pieces_by_text(good, none, align_vocabulary(good, none, 300, 300))["th"] == ["t", "h"]
    words = model(sentencepiece(tmp_path / "words", pieces_of_text("t"), WORDS))
    with pytest.raises(api.InputError, match="splits text into words"):
        align_vocabulary(good, words, 300, 300)


def test_without_the_tokenizers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needed to compose alone."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    small, large = model(byte_level(tmp_path / "small")), model(byte_level(tmp_path / "large", THE))
    assert mapped(small, large).shares == {"exact": 1.0, "composed": 0.0, "left": 0.0}
    with pytest.raises(api.InputError) as caught:
        align_vocabulary(large, small, 300, 300)
    assert str(caught.value) == "composing the tokens that small lacks of its own needs tokenizers: pip install 'moerge[models]'"


PUBLISHED = {"gpt2": 50257, "gpt-neox-20b": 50432, "olmo": 50304, "mistral-v1": 32000}
ROLES = {
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
    "gpt-neox-20b": {"bos_token_id": 0, "eos_token_id": 0},
    "olmo": {"eos_token_id": 50279, "pad_token_id": 1},
    "mistral-v1": {"bos_token_id": 1, "eos_token_id": 2},
}
SHARES = {
    ("gpt2", "mistral-v1"): (21241, 29016, 0),
    ("olmo", "gpt-neox-20b"): (50254, 3, 0),
    ("mistral-v1", "gpt2"): (21367, 10632, 1),
}
"""Tokens that are exact, composed and left."""


def published(folder: Path, tokenizers: Path, name: str) -> Checkpoint:
    (folder / name).mkdir(exist_ok=True)
    renamed = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    for file in (tokenizers / name).iterdir():
        shutil.copyfile(file, folder / name / renamed.get(file.name, file.name))
    return model(folder / name, **ROLES[name])


@pytest.mark.parametrize("pair", SHARES, ids=" of ".join)
def test_published_tokenizers(tmp_path: Path, tokenizers_of_others: Path, pair: tuple[str, str]) -> None:
    chosen, own = (published(tmp_path, tokenizers_of_others, name) for name in pair)
    rows, own_rows = (PUBLISHED[name] for name in pair)
    found = mapped(chosen, own, rows, own_rows)
    counts = np.bincount(found.kinds_V[found.tokens_V], minlength=3)
    assert tuple(counts.tolist()) == SHARES[pair]
    assert found.shares == dict(zip(("exact", "composed", "left"), (counts / counts.sum()).tolist(), strict=True))
    ours, theirs = read_tokens(chosen, rows), read_tokens(own, own_rows)
    for number, surfaces in ours.surfaces.items():
        pieces = found.rows_P[found.starts_V1[number] : found.starts_V1[number + 1]].tolist()
        if pieces and number not in (ours.special | set(ours.roles.values())):
            assert b"".join(theirs.surfaces[row][0] for row in pieces) == surfaces[0]
    head = found.for_head()
    exact = head.rows_P[head.starts_V1[:-1][head.kinds_V == EXACT]]
    assert len(np.unique(exact)) == len(exact)


def test_pieces_are_those_that_the_library_splits_text_into(tmp_path: Path, tokenizers_of_others: Path) -> None:
    """SentencePiece puts a space before a text, so a text after a space is split as it would be with it."""
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed").SentencePieceProcessor()
    library.Load(str(tokenizers_of_others / "mistral-v1" / "tokenizer.model"))
    chosen, own = (published(tmp_path, tokenizers_of_others, name) for name in ("gpt2", "mistral-v1"))
    tokens = read_tokens(chosen, PUBLISHED["gpt2"])
    splitter = Splitter("own", own.folder, read_tokens(own, PUBLISHED["mistral-v1"]))
    surfaces = [text for (text,) in tokens.surfaces.values() if text.startswith(b" ") and text.strip()]
    assert len(surfaces) > 30_000
    for surface in surfaces[::10]:
        text = surface.decode("utf-8", "replace")
        assert "\ufffd" in text or splitter.split([surface]) == library.encode(text[1:])
