"""Whether a text was calibrated on, from the hashes that the manifest keeps instead of the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash


def document_hash(document: str) -> str:
    """XXH3-64 of a document, in hexadecimal; white space and upper case make no difference."""
    return xxhash.xxh3_64_hexdigest(" ".join(document.casefold().split()).encode())


def overlap(documents: Iterable[str], manifest: Mapping[str, Any]) -> int:
    """How many of `documents` the checkpoint with this manifest was calibrated on, as whole documents.

    A figure measured on such text is no evidence: leave the text out, or calibrate on other text.
    """
    entries = manifest.get("calibration", {}).values()
    seen = {digest for entry in entries for digest in entry.get("documents", ())}
    return sum(document_hash(document) in seen for document in documents) if seen else 0
