"""Overlap of text with calibration text, from the hashes that the manifest keeps instead of the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from moerge.errors import InputError
from moerge.texts.conversations import Document, text_of


def document_hash(document: Document) -> str:
    """XXH3-64 of a document, in hexadecimal; white space and upper case make no difference."""
    return xxhash.xxh3_64_hexdigest(" ".join(text_of(document).casefold().split()).encode())


def overlap(documents: Iterable[Document], manifest: Mapping[str, Any]) -> int:
    """Count the `documents` that the checkpoint with this manifest, or its statistics, was calibrated or tuned on, as wholes.

    A figure measured on such text is no evidence: leave the text out, or calibrate on other text.
    """
    seen = {digest for digest in _calibrated_on(manifest) if isinstance(digest, str)}
    return sum(document_hash(document) in seen for document in documents) if seen else 0


def _calibrated_on(manifest: Mapping[str, Any]) -> Iterator[Any]:
    for section in ("calibration", "statistics", "tuning"):
        entries = manifest.get(section)
        for entry in entries.values() if isinstance(entries, Mapping) else ():
            found = entry.get("documents") if isinstance(entry, Mapping) else None
            yield from found if isinstance(found, list) else ()


def check_disjoint(
    texts: Mapping[str, Sequence[Document]],
    locations: Mapping[str, str],
    manifest: Mapping[str, Any] | None,
    checkpoint: str,
    *,
    allow: bool = False,
) -> tuple[str, ...]:
    """InputError if a checkpoint was calibrated on documents it is about to be measured on; with `allow` only warnings.

    `texts` are documents by the name of the text and `locations` where they come from; `manifest` is that of `checkpoint`, None
    where moerge did not make it. Documents are compared as wholes: parts of one, or one cut in another way, are not found.
    """
    found, how = [], "calibrated or tuned" if manifest and "tuning" in manifest else "calibrated"
    for name, documents in texts.items() if manifest else ():
        shared = overlap(documents, manifest or {})
        if shared:
            found.append(
                f"text {name!r} ({locations[name]}): {checkpoint} was {how} on {shared} of its {len(documents)} documents, "
                "so figures on them are no evidence"
            )
    if found and not allow:
        raise InputError(f"{found[0]}: name other text, or go on with --allow-calibration-text", code="calibration-text")
    return tuple(found)
