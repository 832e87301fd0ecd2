"""A YAML file with the line of every key, and pydantic's complaints about it as sentences for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from moerge.errors import InputError, suggest

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Parsed YAML. `lines` gives the 1-based line of each key by its path; it is empty for a dict from Python."""

    data: dict[str, Any]
    source: str = "recipe"
    lines: Mapping[Key, int] = field(default_factory=dict)

    def error(self, path: Key, message: str) -> InputError:
        """An InputError that says where in the document the trouble is."""
        known = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        line = f", line {known}" if known else ""
        return InputError(f"{self.source}{line}: {dotted(path)}{message}")

    def build(self, model: type[Model], data: Mapping[str, Any], path: Key = ()) -> Model:
        """`model` validated from `data`, which stands at `path` in this document."""
        try:
            return model.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise self._explain(model, path + first["loc"], first) from None

    def _explain(self, model: type[BaseModel], path: Key, problem: Any) -> InputError:
        if problem["type"] == "extra_forbidden":
            owner = _model_at(model, problem["loc"][:-1])
            return self.error(path, f": unknown key, {suggest(str(path[-1]), owner.model_fields)}")
        message = problem["msg"].removeprefix("Value error, ")
        given = "" if problem["type"] in ("missing", "value_error") else f", not {_short(problem['input'])}"
        return self.error(path, f": {message[:1].lower()}{message[1:]}{given}")


def dotted(path: Key) -> str:
    """A path as people write it: `merge.overrides[0].density`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def read_document(path: Path) -> Document:
    """Parse a YAML file; InputError if it is missing, not YAML, or not a mapping, or if a key appears twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no recipe {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or node is None:
        raise InputError(f"{path} should be a mapping with keys such as 'experts' and 'merge'")
    lines: dict[Key, int] = {}
    _collect_lines(node, (), lines, str(path))
    return Document(data, str(path), lines)


def _collect_lines(node: yaml.Node, path: Key, lines: dict[Key, int], source: str) -> None:
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
    parts = [annotation, *getattr(annotation, "__args__", ())]
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
