"""Licence, language and data sets from the sources' own model cards. They are strangers' files: only plain names pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moerge.checkpoint.reader import Checkpoint

CARD = "README.md"
_READ_BYTES = 1 << 18
"""Metadata that is longer than this is not looked at."""
_MOST = 100
"""Languages or data sets taken from one card."""

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LICENCE_NAME = re.compile(r"[\w][\w .+()-]{0,99}")
_LINK = re.compile(r"https://[\w.-]+/[\w./%#?=+-]{0,300}")
_FILE = re.compile(r"[\w.-]{1,100}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,12}(-[A-Za-z0-9]{1,8})*")
_DATASET = re.compile(r"[\w.-]{1,100}(/[\w.-]{1,100})?")


@dataclass(frozen=True)
class SourceCard:
    """A source's metadata; "" and empty where the card does not say. `name` is what licence "other" is called."""

    licence: str = ""
    name: str = ""
    link: str = ""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The licence for a reader."""
        return self.name or self.licence or "unknown"


def source_card(model: Checkpoint) -> SourceCard:
    """Read the README.md in a source's folder; anything odd in it counts as absent."""
    data = _front_matter(model.folder / CARD)
    licence = data.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    return SourceCard(
        licence=_plain(licence, _LICENCE),
        name=_plain(data.get("license_name"), _LICENCE_NAME) if licence == "other" else "",
        link=_licence_link(data.get("license_link"), model) if licence == "other" else "",
        languages=_names(data.get("language"), _LANGUAGE),
        datasets=_names(data.get("datasets"), _DATASET),
    )


def licence_metadata(cards: Sequence[SourceCard]) -> dict[str, str]:
    """The Hub's licence keys where all sources have one licence, nothing otherwise.

    Licence "other" counts as one licence only under one name.
    """
    licences = {(card.licence, card.name) for card in cards}
    licence, name = next(iter(licences), ("", ""))
    if len(licences) != 1 or not licence or (licence == "other" and not name):
        return {}
    link = next((card.link for card in cards if card.link), "")
    extra = {"license_name": name, "license_link": link} if licence == "other" else {}
    return {"license": licence, **{key: value for key, value in extra.items() if value}}


def all_of(cards: Sequence[SourceCard], part: Callable[[SourceCard], Sequence[str]]) -> list[str]:
    """Return every name that any card has, each once, in order."""
    return list(dict.fromkeys(name for card in cards for name in part(card)))


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            lines = [line.rstrip() for line in file.read(_READ_BYTES).decode("utf-8", "replace").split("\n")]
        if lines[0] != "---":
            return {}
        found = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any, pattern: re.Pattern[str]) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _names(value: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    written = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(name for name in written[:_MOST] if _plain(name, pattern))


def _licence_link(value: Any, model: Checkpoint) -> str:
    """A link that still leads somewhere in another repository; a file of a local folder does not."""
    if _plain(value, _FILE) and model.revision:
        return f"https://huggingface.co/{model.location.partition('@')[0]}/blob/{model.revision}/{value}"
    return _plain(value, _LINK)
