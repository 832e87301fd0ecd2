"""An evaluation's folder: results that are complete after every measure, documents beside them, and what is half done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from moerge.checkpoint.manifest import to_json
from moerge.errors import InputError
from moerge.evaluation.records import Records
from moerge.evaluation.result import Difference, Evaluation, Kind, Measure, Score, to_csv
from moerge.files import atomic_write, read_file

RESULTS = "results.json"
Row = Mapping[str, Any]


def holds_results(folder: Path) -> bool:
    """Return whether a run has left something in the folder of `--out`."""
    return (folder / RESULTS).exists() or (folder / "partial").exists()


class Store:
    """The folder of `--out`, or nothing where there is none.

    results.json, results.csv, differences.csv    what was found so far, replaced as wholes
    documents/CHECKPOINT/KIND-NAME.jsonl          every document's own figures
    partial/CHECKPOINT/KIND-NAME.jsonl            of a measure that is not finished
    """

    def __init__(self, folder: Path | None, *, resume: bool) -> None:
        self._folder = folder
        self._earlier: dict[str, Measure] = {}
        if folder is None:
            if resume:
                raise InputError("--resume needs the folder of the interrupted run: name it with --out")
            return
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: name another folder with --out")
        if holds_results(folder):
            if not resume:
                raise InputError(
                    f"{folder} holds results already: go on with --resume, or name another folder with --out",
                    code="target-exists",
                )
            self._earlier = {measure.fingerprint: measure for measure in _read(folder / RESULTS)}

    def earlier(self, fingerprint: str) -> tuple[Measure, list[Row]] | None:
        """A measure that an earlier run finished, and its documents."""
        measure = self._earlier.get(fingerprint)
        if measure is None or self._folder is None or measure.documents_file is None:
            return None
        path = self._folder / "documents" / Path(measure.documents_file).parent.name / Path(measure.documents_file).name
        try:
            rows = [json.loads(line) for line in read_file(path).decode("utf-8").splitlines()]
        except (OSError, ValueError):
            return None
        return (measure, rows) if len(rows) == measure.scores[0].documents else None

    def records(self, checkpoint: str, kind: Kind, name: str, fingerprint: str) -> Records:
        """Return the file of a measure's records."""
        return Records(self._folder and self._folder / "partial" / _file(checkpoint, kind, name), fingerprint)

    def write_documents(self, checkpoint: str, kind: Kind, name: str, rows: Iterable[Row]) -> str | None:
        """The file of a finished measure's documents, relative to the folder."""
        if self._folder is None:
            return None
        file = Path("documents") / _file(checkpoint, kind, name)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(self._folder / file, "".join(lines).encode("utf-8", "backslashreplace"))
        return str(file)

    def write(self, evaluation: Evaluation) -> None:
        """Replace the results, and drop what is kept of measures that they hold."""
        if self._folder is None:
            return
        atomic_write(self._folder / RESULTS, to_json(evaluation.to_json()))
        atomic_write(self._folder / "results.csv", to_csv(evaluation.scores, Score).encode())
        atomic_write(self._folder / "differences.csv", to_csv(evaluation.differences, Difference).encode())
        for measure in evaluation.measures:
            path = self._folder / "partial" / _file(measure.checkpoint, measure.kind, measure.on)
            path.unlink(missing_ok=True)
            for parent in (path.parent, path.parent.parent):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _read(path: Path) -> Sequence[Measure]:
    if not path.exists():
        return ()
    try:
        return Evaluation.model_validate_json(read_file(path)).measures
    except (OSError, ValueError):
        raise InputError(
            f"{path} is damaged, or another moerge wrote it: name another folder with --out", code="damaged-file"
        ) from None


def _file(checkpoint: str, kind: Kind, name: str) -> Path:
    """A name that says which checkpoint it is, and is that of no other."""
    place = Path(checkpoint).expanduser()
    whole = str(place.resolve()) if place.is_dir() else checkpoint
    folder = f"{_plain(place.name)}-{xxhash.xxh3_64_hexdigest(whole.encode())[:8]}"
    return Path(folder) / f"{kind}-{_plain(name)}.jsonl"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)[:60]
