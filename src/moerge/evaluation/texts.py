"""Held-out texts: their documents, and that no checkpoint was calibrated on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from moerge.errors import InputError
from moerge.evaluation.likelihood import beginning
from moerge.evaluation.records import Records
from moerge.runtime.loading import Loaded
from moerge.texts import Document, check_disjoint, read_documents, text_of


@dataclass(frozen=True)
class HeldOut:
    """A domain's documents with something to predict; `short` are left out, since they end before that would begin."""

    domain: str
    location: str
    documents: tuple[Document, ...]
    short: int

    @property
    def digest(self) -> str:
        """Return a digest of the documents as they are, in order."""
        return Records.key(*map(text_of, self.documents))


def parse_texts(texts: Sequence[str]) -> dict[str, str]:
    """Locations by domain from DOMAIN=FILE; InputError for other forms, and for a domain named twice."""
    found: dict[str, str] = {}
    for text in texts:
        domain, equals, location = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", domain) or not equals or not location:
            raise InputError(f"--perplexity {text!r}: should be DOMAIN=FILE, such as math=heldout/math.jsonl")
        if domain in found:
            raise InputError(f"--perplexity: the domain {domain!r} is there twice: give one folder or glob instead")
        found[domain] = location
    return found


def read_texts(texts: Mapping[str, str], *, limit: int | None, given: int) -> tuple[HeldOut, ...]:
    """The first `limit` documents of each text that are longer than `given` characters; InputError where there is none."""
    return tuple(_read(domain, location, limit, given) for domain, location in texts.items())


def _read(domain: str, location: str, limit: int | None, given: int) -> HeldOut:
    try:
        documents = list(islice(read_documents(location), limit))
    except InputError as error:
        raise InputError(f"--perplexity {domain}: {error}", code=error.code) from None
    if not documents:
        raise InputError(f"--perplexity {domain}: {location} holds no text: name a file with some")
    long = tuple(document for document in documents if _goes_on(document, given))
    if not long:
        raise InputError(
            f"--perplexity {domain}: no document of {location} goes on behind the {given} characters that are given: "
            "choose a smaller --given"
        )
    return HeldOut(domain, location, long, len(documents) - len(long))


def _goes_on(document: Document, given: int) -> bool:
    """True if something is predicted of a document: of a conversation its answers, whatever is given of a text."""
    return not isinstance(document, str) or bool(document[beginning(document, given) :].strip())


def check_held_out(checkpoint: str, texts: Sequence[HeldOut], *, allow: bool) -> dict[str, tuple[str, ...]]:
    """Warnings by domain where a checkpoint was calibrated on a text; InputError unless that is allowed."""
    manifest: Mapping[str, Any] | None = Loaded(checkpoint, None, None).manifest if texts else None
    return {
        text.domain: check_disjoint(
            {text.domain: text.documents}, {text.domain: text.location}, manifest, checkpoint, allow=allow
        )
        for text in texts
    }
