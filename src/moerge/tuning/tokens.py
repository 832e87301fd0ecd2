"""Each source's text as one row of token ids in a file, cut into sequences; made once, then mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moerge.errors import InputError, MachineError
from moerge.extras import require
from moerge.files import atomic_path
from moerge.tensors.digest import running_digest
from moerge.texts.documents import read_documents
from moerge.texts.overlap import document_hash
from moerge.tuning.settings import Source

_DOCUMENTS = 64
"""Documents tokenized at a time."""


@dataclass(frozen=True)
class Tokens:
    """A source's tokens on disk. `exhausted` says that this is all there is; otherwise the run needs no more.

    `digest` is that of the ids.
    """

    file: Path
    length: int
    tokens: int
    documents: int
    exhausted: bool
    digest: str

    @property
    def sequences(self) -> int:
        """Whole sequences; what is left over at the end is not used."""
        return self.tokens // self.length

    def sequence(self, number: int) -> np.ndarray:
        """Ids [T] of a sequence, int64."""
        return np.asarray(self._ids_N[number * self.length : (number + 1) * self.length], np.int64)

    @property
    def hashes_N(self) -> np.ndarray:
        """`document_hash` of each document as a number, in their order."""
        return np.fromfile(_hashes(self.file), np.uint64)

    @cached_property
    def _ids_N(self) -> np.ndarray:
        return np.memmap(self.file, np.uint32, mode="r")


def _hashes(file: Path) -> Path:
    return file.with_suffix(".hashes")


def documents_of(source: Source, folder: Path) -> Iterator[str]:
    """A source's documents. Raises InputError where they cannot be read."""
    if source.path is not None:
        yield from read_documents(source.path, relative_to=folder, field=source.field)
        return
    require("tune", f"reading the Hub dataset {source.hub}", "datasets")
    import datasets  # type: ignore[import-untyped, unused-ignore]

    try:
        rows = datasets.load_dataset(source.hub, source.subset, split=source.split, streaming=True)
        for row in rows:
            text = row.get(source.field)
            if not isinstance(text, str):
                raise InputError(f"the dataset {source.hub} has no text in 'field: {source.field}', only {', '.join(row)}")
            if text.strip():
                yield text
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the dataset {source.hub}: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:
        raise MachineError(
            f"the dataset {source.hub} could not be fetched: {' '.join(str(error).split())[:200]}", code="no-network"
        ) from None


def tokenise(
    documents: Iterator[str],
    tokenizer: Any,
    *,
    length: int,
    sequences: int,
    file: Path,
    note: Callable[[int], None] = lambda tokens: None,
) -> Tokens:
    """Write the tokens of as many documents as `sequences` sequences need; a file that is complete already is taken as it is.

    Documents begin as the tokenizer begins a text and end with its end-of-text token, where it has one; sequences run on from
    one document into the next. Raises InputError where there is less than one sequence.
    """
    facts = file.with_suffix(".json")
    if facts.is_file():
        return Tokens(file, **json.loads(facts.read_text(encoding="utf-8")))
    end, wanted, found, count = tokenizer.eos_token_id, sequences * length, 0, 0
    digest, exhausted = running_digest(), True
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as out, open(_hashes(file), "wb") as hashes:
        while texts := list(islice(documents, _DOCUMENTS)):
            hashes.write(np.array([int(document_hash(text), 16) for text in texts], np.uint64).tobytes())
            for ids in tokenizer(texts)["input_ids"]:
                ids_N = np.array([*ids, *([end] if end is not None and ids[-1:] != [end] else [])], np.uint32)
                out.write(ids_N.tobytes())
                digest.update(ids_N.tobytes())
                found, count = found + len(ids_N), count + 1
            note(found)
            if found >= wanted:
                exhausted = next(islice(documents, 1), None) is None
                break
    if found < length:
        raise InputError(f"holds {found} tokens, less than one sequence of length {length}: add text or lower 'length'")
    tokens = Tokens(file, length, found, count, exhausted, digest.hexdigest())
    with atomic_path(facts) as beside:
        beside.write_text(json.dumps({key: value for key, value in asdict(tokens).items() if key != "file"}), encoding="utf-8")
    return tokens
