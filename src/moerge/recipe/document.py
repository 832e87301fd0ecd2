"""A YAML file with the line of every key, and pydantic's complaints about it as sentences for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from moerge.errors import Code, InputError, suggest
from moerge.files import read_file

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

_MOST_BYTES = 16_000_000
_MAX_ENTRIES = 100_000
"""Aliases expand: a few lines of YAML can mean more entries than fit in memory."""

_SUCH_AS = {
    "recipe": "'experts' and 'merge'",
    "tuning file": "'model' and 'data'",
    "search file": "'recipe' and 'search'",
    "reduction": "'model' and 'reduce'",
}
"""Keys of a kind of file, for messages."""

_SCIENTIFIC = re.compile(r"[+-]?[\d.]+[eE][+-]?\d+")

_PLAINLY = {
    "missing": "is missing",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "string_too_long": "should be shorter",
    "string_pattern_mismatch": "should be made of letters, digits, '_', '-' and '.'",
    "too_short": "should not be empty",
    "float_type": "should be a number",
    "int_type": "should be a whole number",
    "bool_type": "should be true or false",
}
"""pydantic's kinds of errors in our words; the others read well enough."""


@dataclass(frozen=True)
class Document:
    """Parsed YAML. `lines` gives the 1-based line of each key by its path; it is empty for a dict from Python."""

    data: dict[str, Any]
    source: str = "recipe"
    lines: Mapping[Key, int] = field(default_factory=dict)

    def error(self, path: Key, message: str, code: Code | None = None) -> InputError:
        """An InputError that says where in the document the trouble is."""
        known = self.line(path)
        line = f", line {known}" if known else ""
        return InputError(f"{self.source}{line}: {dotted(path)}{message}", code=code)

    def line(self, path: Key) -> int | None:
        """The line of a key, or of the nearest one above it that has a line."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)

    def mapping(self, path: Key, value: Any) -> dict[str, Any]:
        """A section with text for keys; empty where there is none. Raises InputError where `value` is something else."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(path, f" should be a mapping, not {short(value)}")
        return {str(key): item for key, item in value.items()}

    def build(self, model: type[Model], data: Mapping[str, Any], path: Key = ()) -> Model:
        """`model` validated from `data`, which stands at `path` in this document."""
        try:
            return model.model_validate(dict(data))
        except ValidationError as error:
            # a misspelled key is also a missing one: tell the former
            problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
            raise self._explain(model, path + problems[0]["loc"], problems[0]) from None

    def _explain(self, model: type[BaseModel], path: Key, problem: Any) -> InputError:
        if problem["type"] == "extra_forbidden":
            owner = _model_at(model, problem["loc"][:-1])
            return self.error(path, f": unknown key, {suggest(str(path[-1]), owner.model_fields)}", code="unknown-name")
        message = _PLAINLY.get(problem["type"]) or problem["msg"].replace("Input should", "should", 1)
        given = "" if problem["type"] in ("missing", "too_short", "string_too_short") else f", not {short(problem['input'])}"
        if problem["type"] == "float_type" and isinstance(problem["input"], str) and _SCIENTIFIC.fullmatch(problem["input"]):
            given += ", which YAML takes for text: it wants a point and a sign, as in 1.0e+30"
        if path[-1] == "[key]":
            return self.error(path[:-2], f": the name {short(problem['input'])} {message}")
        return self.error(path, f" {message}{given}")


def plain_copy(data: Mapping[str, Any], source: str = "recipe") -> dict[str, Any]:
    """A copy of a mapping from Python. InputError where it is nested too deeply, or contains itself."""
    try:
        json.dumps(data, default=str, skipkeys=True)
        return deepcopy(dict(data))
    except (RecursionError, ValueError):
        raise InputError(f"the {source} is nested too deeply, or contains itself") from None


def dotted(path: Key) -> str:
    """A path as people write it: `merge.overrides[0].density`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def read_document(path: Path, what: str = "recipe") -> Document:
    """Parse a YAML file, which messages call `what`; InputError if it is missing, no YAML, no mapping, or has a key twice."""
    try:
        text = read_file(path, _MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no {what} {path}: check the path", code="not-found") from None
    except UnicodeDecodeError:
        raise InputError(f"the {what} {path} is not UTF-8 text: save it as such") from None
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        if not nodes or not all(isinstance(node, yaml.MappingNode) for node in nodes):
            raise InputError(f"{path} should be a mapping with keys such as {_SUCH_AS[what]}")
        counted = [dict[Key, int]() for _ in nodes]
        for node, found in zip(nodes, counted, strict=True):
            _collect_lines(node, (), found, str(path))  # which counts, before anything is expanded
        data, lines = _united(path, list(yaml.safe_load_all(text)), counted)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply, or an alias in it contains itself") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return Document(data, str(path), lines)


def _united(path: Path, documents: list[dict[str, Any]], lines: list[dict[Key, int]]) -> tuple[dict[str, Any], dict[Key, int]]:
    """One document; or of several, as mergekit-multi has them, the one without a `name`, with the others in its `documents`."""
    if len(documents) == 1:
        return documents[0], lines[0]
    if not all("merge_method" in document for document in documents):
        second = min(lines[1].values(), default=1)
        raise InputError(f"{path}, line {second}: a second document starts here: put each into a file of its own")
    whole: dict[str, Any] = {}
    places: dict[Key, int] = {}
    others: dict[str, Any] = {}
    for document, own in zip(documents, lines, strict=True):
        first = min(own.values())
        name = document.pop("name", None)
        if (name is None and whole) or name in others or not isinstance(name, str | None):
            twice = "two documents have no 'name'" if name is None else f"the name {short(name)} is taken, or no text"
            raise InputError(f"{path}, line {first}: {twice}: name all but the one that is the result")
        if name is None:
            whole, places = document, places | own
        else:
            others[name] = document
            places |= {("documents", name): first} | {("documents", name, *key): line for key, line in own.items()}
    if not whole:
        raise InputError(f"{path}: every document has a 'name': leave out that of the one that is the result")
    return {**whole, "documents": others}, places


def _collect_lines(node: yaml.Node, path: Key, lines: dict[Key, int], source: str) -> None:
    if len(lines) > _MAX_ENTRIES:
        raise InputError(f"{source} has more than {_MAX_ENTRIES:,} entries once its aliases are expanded: that is no recipe")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            line = key.start_mark.line + 1
            if below in lines:
                first = lines[below]
                raise InputError(f"{source}, line {line}: {dotted(below)} appears twice (first in line {first}): remove one")
            lines[below] = line
            _collect_lines(value, below, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect_lines(item, (*path, index), lines, source)


def _model_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> type[BaseModel]:
    for part in loc:
        info = model.model_fields.get(str(part))
        for candidate in _classes(info.annotation) if info else ():
            model = candidate
    return model


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _classes(part)]


def short(value: Any) -> str:
    """A value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
