"""The tokens of a model, read from whichever of the usual files are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moerge.checkpoint.locate import VOCABULARY_FILES
from moerge.checkpoint.reader import read_json
from moerge.errors import InputError
from moerge.files import read_file
from moerge.tensors.digest import file_digest
from moerge.tokenizer.files import NewToken, added_entry
from moerge.tokenizer.sentencepiece_model import read_sentencepiece
from moerge.tokenizer.spelling import TokenEncoding, spelling_of, spelling_of_tokens, steps

_DAMAGED = "{} is damaged: fetch or copy it again"
_HARMLESS_STEPS = ("use_regex", "trim_offsets")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens. `ids` gives each token's id by its text, spelled as in the vocabulary, added tokens too.

    `added` are the entries of added tokens by the same text, as in tokenizer.json. `splitting` is what decides how text is cut
    into tokens, in a form that can be compared; `whole_words` says that it is cut into words and nothing smaller.
    """

    ids: Mapping[str, int] = field(repr=False)
    added: Mapping[str, Mapping[str, Any]] = field(repr=False)
    spelling: TokenEncoding
    splitting: Mapping[str, Any] = field(repr=False)
    whole_words: bool = False

    @cached_property
    def texts(self) -> Mapping[int, str]:
        """Each id's token."""
        return {number: text for text, number in self.ids.items()}

    @cached_property
    def next_id(self) -> int:
        """The first id after all tokens."""
        return max(self.ids.values(), default=-1) + 1

    def as_added(self, text: str) -> NewToken | None:
        """A token of this vocabulary as an added one of another; None for one that is no text by itself."""
        if text in self.added:
            entry = self.added[text]
            return NewToken(text, added_entry(entry["content"], entry))
        literal = self.spelling.literal(text)
        flags = {"normalized": False, "single_word": self.whole_words}
        return NewToken(text, added_entry(literal, flags)) if literal else None

    def shown(self, token: str) -> str:
        """A token as it may stand in a message."""
        literal = self.spelling.literal(token)
        return json.dumps(token if literal is None else literal, ensure_ascii=False)


def by_position(size: int) -> Vocabulary:
    """A vocabulary of `size` tokens that need not be known, because all models share it."""
    return Vocabulary({f"#{number}": number for number in range(size)}, {}, TokenEncoding("plain", ""), {})


def has_tokenizer(folder: Path) -> bool:
    """Return whether there is any file with a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def same_files(first: Path, second: Path) -> bool:
    """Return whether two folders have the same vocabulary to the byte, so that it need not be understood to be shared."""
    return _digests(first) == _digests(second) and _more_added(first) == _more_added(second)


def token_ids(folder: Path) -> Mapping[str, int] | None:
    """Token text to id, added tokens included; None where there is no vocabulary, or one that cannot be read here."""
    vocabulary = read_vocabulary(folder)
    return vocabulary.ids if vocabulary else None


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in a checkpoint folder; None where it has none.

    Of several files the first of tokenizer.json, vocab.json, vocab.txt and tokenizer.model counts, as in transformers.
    Raises InputError if a file is damaged.
    """
    readers: dict[str, Callable[[Path], Vocabulary]] = {
        "tokenizer.json": _from_tokenizer_json,
        "vocab.json": _from_vocab_json,
        "vocab.txt": _from_vocab_txt,
        "tokenizer.model": _from_sentencepiece,
        "spiece.model": _from_sentencepiece,
    }
    path = next((folder / name for name in readers if (folder / name).is_file()), None)
    return None if path is None else readers[path.name](path)


def _from_tokenizer_json(path: Path) -> Vocabulary:
    tokenizer = read_json(path)
    try:
        entries = tokenizer["model"].get("vocab", {})
        if isinstance(entries, list):  # Unigram: [token, score] in the order of ids
            entries = {piece[0]: index for index, piece in enumerate(entries)}
        spelling = spelling_of(tokenizer)
        added = {spelling.spell(token["content"]): token for token in tokenizer.get("added_tokens") or []}
        splitting = _splitting(tokenizer)
        words = tokenizer["model"].get("type") == "WordLevel"
        return _vocabulary(path, entries, added, spelling, splitting, whole_words=words)
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(_DAMAGED.format(path), code="damaged-file") from None


def _from_vocab_json(path: Path) -> Vocabulary:
    entries = read_json(path)
    merges = path.with_name("merges.txt")
    splitting = {"merges": _merges(_read_text(merges).splitlines())} if merges.is_file() else {}
    return _vocabulary(path, entries, {}, spelling_of_tokens(entries), splitting)


def _from_vocab_txt(path: Path) -> Vocabulary:
    entries = {line: index for index, line in enumerate(_read_text(path).splitlines())}
    return _vocabulary(path, entries, {}, TokenEncoding("wordpiece", "vocab.txt"), {})


def _from_sentencepiece(path: Path) -> Vocabulary:
    model = read_sentencepiece(path)
    entries = {text: index for index, text in enumerate(model.texts)}
    return _vocabulary(path, entries, model.added, TokenEncoding("metaspace", path.name), {})


def _vocabulary(
    path: Path,
    entries: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    spelling: TokenEncoding,
    splitting: Mapping[str, Any],
    whole_words: bool = False,
) -> Vocabulary:
    ids = dict(entries)
    more = {spelling.spell(token["content"]): token for token in _more_added(path.parent)}
    added = {**{text: token for text, token in more.items() if text not in ids}, **added}
    taken = {token["id"]: text for text, token in added.items()}
    if taken:  # an added token takes over the id of an entry with another text, which no text is split into any more
        ids = {text: number for text, number in ids.items() if taken.get(number, text) == text}
    ids |= {text: token["id"] for text, token in added.items()}
    if not all(type(number) is int and number >= 0 for number in ids.values()) or not all(type(text) is str for text in ids):
        raise InputError(_DAMAGED.format(path), code="damaged-file")
    return Vocabulary(ids, added, spelling, splitting, whole_words)


def _more_added(folder: Path) -> list[dict[str, Any]]:
    """Added tokens that stand beside the vocabulary: in tokenizer_config.json and, older, in added_tokens.json."""
    found: dict[int, dict[str, Any]] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        found |= {number: {"id": number, "content": text} for text, number in read_json(path).items()}
    path = folder / "tokenizer_config.json"
    decoder = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    try:
        found |= {int(number): {**token, "id": int(number)} for number, token in (decoder or {}).items()}
        return [token for _, token in sorted(found.items()) if isinstance(token["content"], str)]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(_DAMAGED.format(path), code="damaged-file") from None


def special_tokens(folder: Path) -> dict[str, str]:
    """The text of each special token by what it is for, such as `bos_token`, where the tokenizer's settings say it."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        for role in _ROLES:
            token = settings.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[role] = text
    return found


def _splitting(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for part in ("normalizer", "pre_tokenizer"):
        described = [
            {key: value for key, value in step.items() if key not in _HARMLESS_STEPS} for step in steps(tokenizer.get(part))
        ]
        parts[part.replace("_", "-")] = described
    merges = tokenizer["model"].get("merges")
    if merges:
        parts["merges"] = _merges(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    return parts


def _merges(lines: Any) -> str:
    rules = (line for line in lines if line.strip() and not line.startswith("#version"))
    return file_digest("\n".join(rules).encode("utf-8", "surrogatepass"))


def _digests(folder: Path) -> dict[str, str]:
    files = (folder / name for name in VOCABULARY_FILES)
    return {path.name: file_digest(read_file(path)) for path in files if path.is_file()}


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {error}") from None
