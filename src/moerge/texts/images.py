"""Images in conversations: read from files beside the text or out of parquet, and told apart by their content."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.extras import require
from moerge.files import read_file
from moerge.tensors.digest import file_digest

COLUMNS = ("images", "image")
"""Fields of an entry that hold its images, in the order of their places in the text."""
TAG = "<image>"
"""The place of an image in a message, in LLaVA's format and others."""
_KINDS = ("image", "image_url", "input_image")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that Pillow decodes by itself; for others it starts programs."""


@dataclass(frozen=True)
class Picture:
    """An image as it is stored, the `name` that messages call it by, and the digest of its bytes."""

    name: str
    content: bytes = field(repr=False)
    digest: str

    def open(self) -> Any:
        """The image in RGB, upright, as Pillow has it. Raises InputError where it cannot be read."""
        require("images", f"reading {self.name}")
        from PIL import Image, ImageOps

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(self.content), formats=_FORMATS)
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            short = " ".join(str(error).split())[:120]
            raise InputError(
                f"{self.name} is no image that can be read ({short}): give a whole PNG, JPEG or WebP file, or leave it out",
                code="damaged-file",
            ) from None


def read_picture(given: Any, where: str, folder: Path) -> Picture:
    """The image that an entry names by its path from the file's `folder`, or holds; InputError where it cannot be read."""
    content, path = (given.get("bytes"), given.get("path")) if isinstance(given, Mapping) else (None, given)
    if isinstance(content, bytes):
        name = f"{where}: the image{f' {path}' if path else ''}"
    elif isinstance(path, str) and path and "://" not in path and not path.startswith("data:"):
        file = folder / Path(path).expanduser()
        name = f"{where}: {file}"
        try:
            content = read_file(file)
        except (OSError, InputError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{name} cannot be read ({reason}): check the path", code="not-found") from None
    else:
        raise InputError(f"{where}: an image should be the path of a file, not {ascii(given)[:60]}: download it first")
    found = Picture(name, content, file_digest(content))
    found.open()
    return found


def has_images(content: Any) -> bool:
    """True if a message's content has parts that are images."""
    return isinstance(content, list) and any(isinstance(part, Mapping) and part.get("type") in _KINDS for part in content)


def with_pictures(
    messages: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], where: str, folder: Path
) -> tuple[list[dict[str, Any]], tuple[Picture, ...]]:
    """Messages whose parts tell where images stand, as chat templates read them, and the images.

    An image is named by its part of a message, or the entry names all of them in order in one of `COLUMNS`; without any place in
    a message they stand at the beginning of the user's first. Raises InputError for an image that cannot be read, and where there
    are more places than images, or fewer.
    """
    given: Any = next((entry[name] for name in COLUMNS if entry.get(name)), [])
    column = list(given) if isinstance(given, list | tuple) else [given]
    found = [_Parts.of(message, bool(column)) for message in messages]
    if column and not any(parts.places for parts in found):
        first = next((parts for message, parts in zip(messages, found, strict=True) if message["role"] == "user"), found[0])
        first.parts[:0] = [dict.fromkeys(("image",)) for _ in column]
    if any(parts.places and message["role"] == "assistant" for message, parts in zip(messages, found, strict=True)):
        raise InputError(f"{where}: an answer of the assistant has an image, and models answer with text: leave it out")
    sources = [part["image"] for parts in found for part in parts.places]
    free = sum(source is None for source in sources)
    if free != len(column):
        raise InputError(f"{where}: its messages have {free} places for images, and it names {len(column)} images")
    waiting = iter(column)
    pictures = tuple(read_picture(next(waiting) if source is None else source, where, folder) for source in sources)
    return [parts.written(message) for message, parts in zip(messages, found, strict=True)], pictures


@dataclass(frozen=True)
class _Parts:
    """A message's content in parts: texts as they are, images as {"image": source}, None where a column names it."""

    parts: list[Any]

    @classmethod
    def of(cls, message: Mapping[str, Any], tagged: bool) -> _Parts:
        content = message.get("content", "")
        given = content if isinstance(content, list) else [{"type": "text", "text": content}]
        return cls([part for one in given for part in (_images(one) or _texts(one["text"], tagged))])

    @property
    def places(self) -> list[dict[str, Any]]:
        return [part for part in self.parts if isinstance(part, dict)]

    def written(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message as templates read it."""
        if not self.places:
            return {**message, "content": "".join(self.parts)}
        written = [{"type": "image"} if isinstance(part, dict) else {"type": "text", "text": part} for part in self.parts]
        return {**message, "content": written}


def _images(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    if part.get("type") not in _KINDS:
        return []
    named = next((part[key] for key in ("image", "path", "image_url", "url") if part.get(key)), None)
    return [{"image": named.get("url", named) if isinstance(named, Mapping) else named}]


def _texts(text: str, tagged: bool) -> Iterator[Any]:
    """A text in pieces, with an image at each of its tags; LLaVA's files have a line break beside them that is no text."""
    pieces = text.split(TAG) if tagged else [text]
    for number, piece in enumerate(pieces):
        if number:
            yield {"image": None}
        shown = piece.removeprefix("\n") if number else piece
        shown = shown.removesuffix("\n") if number + 1 < len(pieces) else shown
        if shown or len(pieces) == 1:
            yield shown
