"""Rows of single tokens that a recipe gives, and the padding of an embedding: a `tokenizer` section, as mergekit has it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from moerge.errors import suggest
from moerge.recipe.document import Document, Key, short

KEYS = ("source", "tokens", "pad_to_multiple_of")
_SOURCES = ("zero", "model_token")
ModelAt = Callable[[Key, Any], str]
"""The recipe's name for the model that stands somewhere in a document; InputError for none of its own."""


class TokenRow(BaseModel):
    """A token's row: that of a `model`, for the token itself, another `token` or the number `row`; without a model zeros.

    It is for models that lack the token, with `force` for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    token: str | None = None
    row: int | None = Field(default=None, ge=0)
    force: bool = False


class TokenizerSection(NamedTuple):
    """A `tokenizer` section: whose tokens (None where it does not say), rows of some, and what rows are padded to."""

    source: Any = None
    tokens: Mapping[str, TokenRow] = {}
    pad_to_multiple_of: int | None = None


def read_tokenizer_section(document: Document, model_at: ModelAt) -> TokenizerSection:
    """The `tokenizer` of a document where it is a mapping. InputError names the key at fault."""
    path: Key = ("tokenizer",)
    section = document.mapping(path, document.data["tokenizer"])
    _check_keys(document, path, section, KEYS)
    multiple = section.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise document.error((*path, "pad_to_multiple_of"), f" should be a positive whole number, not {short(multiple)}")
    written = document.mapping((*path, "tokens"), section.get("tokens"))
    tokens = {text: _row(document, (*path, "tokens", text), value, model_at) for text, value in written.items()}
    return TokenizerSection(section.get("source"), tokens, multiple)


def _row(document: Document, path: Key, written: Any, model_at: ModelAt) -> TokenRow:
    if isinstance(written, dict) and not {"kind", "path"} & set(written):
        section = document.mapping(path, written)
        _check_keys(document, path, section, ("source", "force"))
        force, path, source = section.get("force", False), (*path, "source"), section.get("source")
    else:
        force, source = False, written
    if type(force) is not bool:
        raise document.error((*path[:-1], "force"), f" should be true or false, not {short(force)}")
    if source is None:
        raise document.error(path, " is missing: name the model whose row the token gets, or {kind: zero}")
    if not isinstance(source, dict) or "kind" not in source:
        return TokenRow(model=model_at(path, source), force=force)
    return _of_kind(document, path, source, force, model_at)


def _of_kind(document: Document, path: Key, source: Mapping[str, Any], force: bool, model_at: ModelAt) -> TokenRow:
    kind = source["kind"]
    if kind not in _SOURCES:
        raise document.error((*path, "kind"), f" should be one of {', '.join(_SOURCES)}, not {short(kind)}")
    _check_keys(document, path, source, ("kind",) if kind == "zero" else ("kind", "model", "token", "token_id"))
    if kind == "zero":
        return TokenRow(force=force)
    given = [key for key in ("token", "token_id") if source.get(key) is not None]
    if "model" not in source or len(given) != 1:
        raise document.error(path, " needs a 'model', and of it either a 'token' or a 'token_id'")
    fields = {"model": model_at((*path, "model"), source["model"]), "token": source.get("token"), "force": force}
    return document.build(TokenRow, {**fields, "row": source.get("token_id")}, path)


def _check_keys(document: Document, path: Key, section: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in section:
        if key not in known:
            raise document.error((*path, str(key)), f": unknown key, {suggest(str(key), known)}", code="unknown-name")
