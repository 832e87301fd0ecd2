"""The corpus as documents of about the same length, so that every document has something to route by and something to predict.

A long document gives one window of it, short ones of a source are put together. Train, calibration and held-out text share no
document of the corpus.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from .settings import DOMAINS, Work

DOCUMENT_CHARACTERS = 1_600
CALIBRATION = 64
"""Documents of a domain that are kept from training: scales are tuned and routers are calibrated on them."""
Document = tuple[str, str]
"""Text and source."""


def write_text(corpus: Path, work: Work, seeds: tuple[int, ...], per_source: int) -> None:
    """Every split of every domain, unless it is there."""
    for domain in DOMAINS:
        if all(work.text(domain, split).exists() for split in ("valid", "calibration", *(f"train-{seed}" for seed in seeds))):
            continue
        work.text(domain, "valid").parent.mkdir(parents=True, exist_ok=True)
        _write(work.text(domain, "valid"), documents(corpus / domain / "valid.jsonl.zst", per_source))
        train = documents(corpus / domain / "train.jsonl.zst", per_source)
        _write(work.text(domain, "calibration"), train[:CALIBRATION])
        for seed in seeds:
            shuffled = train[CALIBRATION:]
            random.Random(seed).shuffle(shuffled)
            _write(work.text(domain, f"train-{seed}"), shuffled)


def documents(path: Path, per_source: int) -> list[Document]:
    """At most so many documents of each source, in an order that does not depend on the seed of a run."""
    draw = random.Random(0)
    rows = list(_rows(path))
    draw.shuffle(rows)
    short: dict[str, str] = {}
    by_source: dict[str, list[str]] = {}
    for text, source in rows:
        if len(text) < DOCUMENT_CHARACTERS:
            text = f"{short.pop(source)}\n\n{text}" if source in short else text
            if len(text) < DOCUMENT_CHARACTERS:
                short[source] = text
                continue
        by_source.setdefault(source, []).append(_window(text, draw))
    found = [(text, source) for source, texts in by_source.items() for text in texts[:per_source]]
    draw.shuffle(found)
    return found


def _window(text: str, draw: random.Random) -> str:
    """A part of DOCUMENT_CHARACTERS characters that begins at a line's start where one is near."""
    start = draw.randrange(len(text) - DOCUMENT_CHARACTERS + 1)
    line = text.rfind("\n", max(0, start - DOCUMENT_CHARACTERS // 4), start)
    start = line + 1 if line >= 0 else start
    return text[start : start + DOCUMENT_CHARACTERS]


def _rows(path: Path) -> Iterator[Document]:
    import zstandard

    with zstandard.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["text"], row["source"]


def _write(path: Path, rows: list[Document]) -> None:
    path.write_text("".join(json.dumps({"text": text, "source": source}) + "\n" for text, source in rows), encoding="utf-8")
