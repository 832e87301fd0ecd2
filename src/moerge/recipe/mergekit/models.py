"""The models of a mergekit file, and the names they get here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.recipe.document import Document, Key, short


@dataclass(frozen=True)
class Reference:
    """`model`, a folder or a Hub id with its revision, and perhaps an adapter on it."""

    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" if self.adapter else self.model


def read_reference(document: Document, path: Key, written: Any) -> Reference:
    """A reference such as `owner/name@revision+adapter`; InputError if it is none."""
    if isinstance(written, dict):
        # how mergekit writes references that contain spaces, and whoever has a path with a plus
        unknown = next((key for key in written if key not in ("model", "lora", "override_architecture")), None)
        if unknown is not None:
            raise document.error((*path, str(unknown)), ": unknown key; a model is text, such as owner/name@revision")
        model, adapter = (_path_of(document, (*path, key), written.get(key)) for key in ("model", "lora"))
        if model is not None:
            return Reference(model, adapter)
    if not isinstance(written, str) or not written:
        raise document.error(path, f" should be a folder or a Hub id, not {short(written)}")
    return _divided(document, path, written)


def _divided(document: Document, path: Key, written: str) -> Reference:
    """The model, and the adapter after a plus; which plus, and whether any, is decided by the folders that there are."""
    ways = [Reference(written[:at], written[at + 1 :]) for at, letter in enumerate(written) if letter == "+"]
    if not ways or _exists(written):
        return Reference(written)
    if len(ways) > 1:
        ways = [way for way in ways if _exists(way.model) and way.adapter and _exists(way.adapter)]
    if len(ways) != 1 or not ways[0].model or not ways[0].adapter:
        told = "; of a path with a plus write 'model: {path: ...}' and 'lora: {path: ...}'"
        raise document.error(path, f" should be a model or model+adapter, not {short(written)}{told}")
    return ways[0]


def _exists(location: str) -> bool:
    try:
        return Path(location).expanduser().exists()
    except (OSError, RuntimeError):
        return False


def _path_of(document: Document, path: Key, written: Any) -> str | None:
    """Text, or `path` and `revision`."""
    if isinstance(written, dict):
        revision = written.get("revision")
        written = f"{written.get('path')}@{revision}" if revision else written.get("path")
    if written is not None and (not isinstance(written, str) or not written):
        raise document.error(path, f" should be a folder or a Hub id, not {short(written)}")
    return written


class Roster:
    """Names for the models of a file, in the order they are first asked for."""

    def __init__(self) -> None:
        self.names: dict[Reference, str] = {}

    def name(self, reference: Reference) -> str:
        """The name of a model; the same reference has one name throughout."""
        if reference not in self.names:
            self.names[reference] = fresh_name(reference, self.names.values())
        return self.names[reference]


def fresh_name(reference: Reference, taken: Iterable[str]) -> str:
    """A name for a model, after the last part of its path, that no other model has."""
    last = re.sub(r"@[^/]*$", "", reference.adapter or reference.model).rstrip("/").rsplit("/", 1)[-1]
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", last).lstrip(".-") or "model"
    plain = plain[:60]
    names, name, number = {"base", *taken}, plain, 1
    while name in names:
        number += 1
        name = f"{plain}_{number}"
    return name
