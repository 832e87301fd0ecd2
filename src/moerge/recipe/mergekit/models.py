"""What a mergekit file calls models, and the names they get here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
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
        # how mergekit writes references that contain spaces
        unknown = next((key for key in written if key not in ("model", "lora")), None)
        if unknown is not None:
            raise document.error((*path, str(unknown)), ": unknown key; a model is text, such as owner/name@revision")
        named = [_path_of(written[key]) for key in ("model", "lora") if written.get(key)]
        if "model" in written and named and all(isinstance(name, str) and name for name in named):
            return Reference(*named)  # here a plus is a part of a name
    if not isinstance(written, str) or not written:
        raise document.error(path, f" should be a folder or a Hub id, not {short(written)}")
    parts = written.split("+")
    if len(parts) > 2 or not all(parts):
        raise document.error(path, f" should be a model or model+adapter, not {short(written)}")
    return Reference(*parts)


def _path_of(written: Any) -> Any:
    if isinstance(written, dict):
        revision = written.get("revision")
        return f"{written.get('path')}@{revision}" if revision else written.get("path")
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
