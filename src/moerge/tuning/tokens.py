"""Each source's text as one row of token ids in a file, cut into sequences; made once, then mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moerge.errors import InputError, MachineError
from moerge.extras import require
from moerge.files import atomic_path
from moerge.tensors.digest import running_digest
from moerge.texts import Conversation, Document, document_hash, document_of, read_documents
from moerge.texts.conversations import MESSAGES
from moerge.tuning.packing import Packer
from moerge.tuning.settings import Source

_DOCUMENTS = 64
"""Documents tokenized at a time."""


@dataclass(frozen=True)
class Tokens:
    """A source's tokens on disk. `exhausted` says that this is all there is; otherwise the run needs no more.

    `digest` is that of the ids, and of their marks where there are some: of conversations, of which `learned` tokens are answers,
    and `left_out` answers did not fit into a sequence.
    """

    file: Path
    length: int
    tokens: int
    documents: int
    exhausted: bool
    digest: str
    learned: int | None = None
    left_out: int = 0

    @property
    def sequences(self) -> int:
        """Whole sequences; what is left over at the end is not used."""
        return self.tokens // self.length

    def sequence(self, number: int) -> np.ndarray:
        """Ids [T] of a sequence, int64."""
        return np.asarray(self._ids_N[self._slice(number)], np.int64)

    def marks(self, number: int) -> np.ndarray:
        """Marks [T] of a sequence's tokens, uint8: all 0, `packing.LEARNED`, but in conversations."""
        return np.zeros(self.length, np.uint8) if self.learned is None else np.array(self._marks_N[self._slice(number)])

    def _slice(self, number: int) -> slice:
        return slice(number * self.length, (number + 1) * self.length)

    @property
    def hashes_N(self) -> np.ndarray:
        """`document_hash` of each document as a number, in their order."""
        return np.fromfile(_hashes(self.file), np.uint64)

    @cached_property
    def _ids_N(self) -> np.ndarray:
        return np.memmap(self.file, np.uint32, mode="r")

    @cached_property
    def _marks_N(self) -> np.ndarray:
        return np.memmap(_marks(self.file), np.uint8, mode="r")


def _hashes(file: Path) -> Path:
    return file.with_suffix(".hashes")


def _marks(file: Path) -> Path:
    return file.with_suffix(".marks")


def documents_of(source: Source, folder: Path) -> Iterator[Document]:
    """A source's documents. Raises InputError where they cannot be read."""
    if source.path is not None:
        yield from read_documents(source.path, relative_to=folder, field=source.field)
        return
    require("tune", f"reading the Hub dataset {source.hub}", "datasets")
    import datasets  # type: ignore[import-untyped, unused-ignore]

    try:
        rows = datasets.load_dataset(source.hub, source.subset, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            if not {source.field, *MESSAGES} & set(row):
                raise InputError(f"the dataset {source.hub} has no text in 'field: {source.field}', only {', '.join(row)}")
            document = document_of(row, f"{source.hub}, row {number}", source.field)
            if isinstance(document, Conversation) or document.strip():
                yield document
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the dataset {source.hub}: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:
        raise MachineError(
            f"the dataset {source.hub} could not be fetched: {' '.join(str(error).split())[:200]}", code="no-network"
        ) from None


def tokenise(
    documents: Iterator[Document],
    tokenizer: Any,
    *,
    length: int,
    sequences: int,
    file: Path,
    note: Callable[[int], None] = lambda tokens: None,
) -> Tokens:
    """Write the tokens of as many documents as `sequences` sequences need; a file that is complete already is taken as it is.

    Documents begin as the tokenizer begins a text and end with its end-of-text token, where it has one; sequences run on from
    one document into the next. Conversations are as their template writes them, and `Packer` keeps their answers whole. Raises
    InputError where there is less than one sequence.
    """
    facts = file.with_suffix(".json")
    if facts.is_file():
        return Tokens(file, **json.loads(facts.read_text(encoding="utf-8")))
    packer, wanted, count = Packer(tokenizer, length), sequences * length, 0
    exhausted = True
    file.parent.mkdir(parents=True, exist_ok=True)
    with _Written(file) as written, open(_hashes(file), "wb") as hashes:
        while listed := list(islice(documents, _DOCUMENTS)):
            hashes.write(np.array([int(document_hash(one), 16) for one in listed], np.uint64).tobytes())
            for piece in packer.pieces(listed):
                written.add(*piece)
            count += len(listed)
            note(packer.tokens)
            if packer.tokens >= wanted:
                exhausted = next(islice(documents, 1), None) is None
                break
        for piece in packer.finish():
            written.add(*piece)
    if packer.tokens < length:
        many = f"{packer.left_out} answers, none of which ends within" if packer.marked else f"{packer.tokens} tokens, less than"
        way = "raise" if packer.marked else "add text or lower"
        raise InputError(f"holds {many} one sequence of length {length}: {way} 'length'")
    marks: dict[str, Any] = {"learned": packer.learned, "left_out": packer.left_out} if packer.marked else {}
    tokens = Tokens(file, length, packer.tokens, count, exhausted, written.digest.hexdigest(), **marks)
    with atomic_path(facts) as beside:
        beside.write_text(json.dumps({key: value for key, value in asdict(tokens).items() if key != "file"}), encoding="utf-8")
    return tokens


class _Written:
    """The files of ids and marks while they grow. That of marks is there once a token has one that is not 0."""

    def __init__(self, file: Path) -> None:
        self._ids, self._file, self._count = open(file, "wb"), _marks(file), 0  # noqa: SIM115
        self._marks: BinaryIO | None = None
        self.digest = running_digest()

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *error: object) -> None:
        self._ids.close()
        if self._marks is not None:
            self._marks.truncate(self._count)
            self._marks.close()

    def add(self, ids_N: np.ndarray, marks_N: np.ndarray) -> None:
        self._ids.write(ids_N.tobytes())
        self.digest.update(ids_N.tobytes())
        if marks_N.any():
            self._marks = self._marks or open(self._file, "wb")  # noqa: SIM115
            self._marks.seek(self._count)  # what lies before is 0 where nothing was written
            self._marks.write(marks_N.tobytes())
            self.digest.update(marks_N.tobytes())
        self._count += len(ids_N)
