"""Calibration text from files: txt, jsonl and parquet, one by one, in folders or by glob.

What a document is: in jsonl and parquet an entry's `text` field, or another that is named, or the conversation in `messages` or
`conversations`; in a txt file that is named itself a paragraph, that is lines between empty lines; in a folder or glob each txt
file as a whole. Files are taken in the order of their paths and only as far as documents are wanted, so shuffle a file that is
sorted by topic.
"""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from moerge.errors import InputError
from moerge.files import open_file, unreadable
from moerge.tensors.digest import file_digest
from moerge.texts.conversations import MESSAGES, Conversation, Document, read_conversation, text_of
from moerge.texts.images import COLUMNS
from moerge.texts.overlap import document_hash

_TEXT = "text"
_BESIDE = ("tools", "system", *COLUMNS)
"""Columns that belong to a conversation."""
_ENCODING = "utf-8-sig"
"""UTF-8, at the beginning of a file with a byte order mark or without."""
MOST_CHARACTERS = 200_000_000
"""Longest document: more is a file of another kind, or one to fill the memory."""


@dataclass(frozen=True)
class Texts:
    """The documents that calibrate one expert, or only their hashes where statistics of them are at hand.

    `hashes` tells whether other text is among them.
    """

    expert: str
    location: str
    documents: tuple[Document, ...] = field(repr=False)
    known_hashes: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """`document_hash` of each document."""
        return self.known_hashes or tuple(document_hash(document) for document in self.documents)

    @cached_property
    def digest(self) -> str:
        """Digest of the documents exactly as they are, in order."""
        return file_digest(json.dumps([text_of(one) for one in self.documents or self.known_hashes]).encode())


def read_texts(expert: str, location: str, *, relative_to: Path = Path(), limit: int) -> Texts:
    """The first `limit` documents at `location`; InputError if it is unreadable or holds none."""
    try:
        documents = tuple(islice(read_documents(location, relative_to=relative_to), limit))
    except InputError as error:
        raise InputError(f"calibration.{expert}: {error}", code=error.code) from None
    if not documents:
        raise InputError(f"calibration.{expert}: {location} holds no text: name a file with some for this expert")
    return Texts(expert, location, documents)


def read_documents(location: str, *, relative_to: Path = Path(), field: str | None = None) -> Iterator[Document]:
    """The documents that are not blank at `location`: a file, a folder or a glob. Nothing is read before it is asked for.

    `field` is that of jsonl and parquet which holds the text or the messages; None means `text`, where the caller's user cannot
    name another. Entries without `text` may hold a conversation, as `MESSAGES` has it.
    """
    try:
        files, named_itself = _files(relative_to / Path(location).expanduser(), glob.has_magic(location))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"there is no text {location!r}: {getattr(error, 'strerror', None) or error}", code="not-found"
        ) from None
    for file in files:
        for document in _read_file(file, named_itself, field):
            if isinstance(document, Conversation) or document.strip():
                yield document


def _files(path: Path, is_pattern: bool) -> tuple[list[Path], bool]:
    if path.is_file():
        return [_known(path)], True
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        files = [file for file in found if file.suffix in _READERS]
        if not files:
            raise InputError(f"the folder {path} holds no file that ends in {_listed()}")
        return files, False
    if is_pattern:
        files = [_known(Path(name)) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise InputError(f"no file matches {path}: check the pattern")
        return files, False
    raise InputError(f"there is no file or folder {path}: check the path", code="not-found")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _known(path: Path) -> Path:
    if path.suffix not in _READERS:
        raise InputError(f"cannot tell the format of {path}: its name should end in {_listed()}")
    return path


def _listed() -> str:
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def _read_file(path: Path, named_itself: bool, field: str | None) -> Iterator[Document]:
    try:
        yield from _READERS[path.suffix](path, named_itself, field)
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as such") from None


def _read_txt(path: Path, named_itself: bool, field: str | None) -> Iterator[Document]:
    if not named_itself:
        yield "".join(_lines(path, "file"))
        return
    lines: list[str] = []
    for line in _lines(path, "paragraph"):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    yield "".join(lines).rstrip("\n")


def _lines(path: Path, document: Literal["line", "paragraph", "file"]) -> Iterator[str]:
    """The lines of a text file. InputError where those of one document are too long."""
    with io.TextIOWrapper(open_file(path), encoding=_ENCODING) as file:
        size = 0
        while line := file.readline(MOST_CHARACTERS - size + 1):
            size += len(line)
            _check_length(size, str(path))
            yield line
            if document == "line" or (document == "paragraph" and not line.strip()):
                size = 0


def _check_length(size: int, where: str) -> None:
    if size > MOST_CHARACTERS:
        raise InputError(f"{where}: a document has more than {MOST_CHARACTERS:,} characters: split it into several")


def _read_jsonl(path: Path, named_itself: bool, field: str | None) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, "line"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON: {error}") from None
        yield document_of(entry, f"{path}, line {number}", field, path.parent)


def document_of(entry: Any, where: str, field: str | None, folder: Path = Path()) -> Document:
    """The text or the conversation of an entry of jsonl, parquet or a Hub dataset; InputError where it has none.

    Text beside images is a user's message. Paths of images start from `folder`.
    """
    name = field or _TEXT
    held = next((key for key in _fields(field) if key in entry), None) if isinstance(entry, Mapping) else None
    found = entry[held] if held else None
    if held and (held in MESSAGES or (isinstance(found, list) and found and isinstance(found[0], Mapping))):
        return read_conversation(entry, held, where, folder)
    if not isinstance(found, str):
        other = "" if field is None else ", or say with 'field' where its text is"
        raise InputError(f'{where}: should be an object with a "{name}", such as {{"{name}": "..."}}{other}')
    check_unicode(found, f"{where}: the text")
    if any(entry.get(name) for name in COLUMNS):
        return read_conversation({**entry, "messages": [{"role": "user", "content": found}]}, "messages", where, folder)
    return found


def _fields(field: str | None) -> tuple[str, ...]:
    """The fields that may hold the document, in order."""
    return (_TEXT, *MESSAGES) if field in (None, _TEXT) else (str(field),)


def check_unicode(text: str, what: str) -> None:
    """Raise InputError for a lone surrogate, which UTF-8 and tokenizers do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(f"{what} has {half}, half of a character: write it whole, or remove it") from None


def _read_parquet(path: Path, named_itself: bool, field: str | None) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"reading {path} needs pyarrow: pip install pyarrow, or convert it to jsonl", code="missing-extra"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            held = next((name for name in _fields(field) if name in names), None)
            if held is None:
                remedy = "rename the one that holds the text" if field is None else "say with 'field' which holds the text"
                raise InputError(f"{path} has no column {field or _TEXT!r}, only {', '.join(names)}: {remedy}")
            columns = [held, *(name for name in _BESIDE if name in names)]
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                _check_column(batch.column(held), path)
                for entry in batch.to_pylist():
                    row += 1
                    entry[held] = "" if entry[held] is None else entry[held]
                    yield document_of(entry, f"{path}, row {row}", field, path.parent)
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {path} as parquet: {error}") from None


def _check_column(column: Any, path: Path) -> None:
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        _check_length(pyarrow.compute.max(pyarrow.compute.binary_length(column)).as_py() or 0, str(path))


_READERS: dict[str, Callable[[Path, bool, str | None], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
"""What names of calibration files end in."""
