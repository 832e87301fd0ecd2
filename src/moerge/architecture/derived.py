"""Families that moerge has no table of: derived from transformers, where that is installed, and remembered.

A derived family belongs to one config.json: with another number of layers it is derived again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moerge.architecture.family import Family, TensorRule
from moerge.architecture.rope import flatten_rope
from moerge.architecture.sizes import MAX_LAYERS

_FORMAT = 2
"""Of the files in the cache; another one where roles or what is remembered of them change."""
_IGNORED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config")
_INSTALL = "with `pip install 'moerge[models]'` transformers says its roles, and slices, layers and vocabularies work too"


def derived_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json of a type without a table, None where transformers cannot say it (see `no_family`)."""
    return _derived(_key(config))[0]


def no_family(config: Mapping[str, Any]) -> str:
    """The reason why there is no derived family, or why a checkpoint is none of it, as a clause of a sentence."""
    return _derived(_key(config))[1] or f"its tensors have other names than transformers {_version()} gives them"


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in _IGNORED}, sort_keys=True, default=repr)


@cache
def _derived(key: str) -> tuple[Family | None, str]:
    config = json.loads(key)
    reason = _obstacle(config)
    if reason:
        return None, reason
    place = _place(key)
    table = _read(place)
    if table is None:
        table = _ask(config)
        _write(place, table)
    return (None, str(table["reason"])) if "reason" in table else (_family(table, config), "")


def _obstacle(config: Mapping[str, Any]) -> str:
    """A reason that shows without importing transformers, "" if there is none."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        return "config.json has no 'model_type'"
    if not (find_spec("transformers") and find_spec("torch")):
        return _INSTALL
    if not _mentioned(kind):
        return f"transformers {_version()} does not know it either"
    many = next((key for key, value in _numbers(config) if value > MAX_LAYERS and ("layers" in key or "depth" in key)), None)
    return f"config.json: {many} is more than any model has" if many else ""


def _numbers(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    inside = [pair for value in config.values() if isinstance(value, Mapping) for pair in _numbers(value)]
    return [(key, value) for key, value in config.items() if type(value) is int] + inside


def _version() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "unknown"


@cache
def _names() -> str:
    """The text of the files in which transformers lists its types."""
    found = find_spec("transformers")
    folder = Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else Path()
    files = (folder / "models" / "auto" / name for name in ("configuration_auto.py", "auto_mappings.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _mentioned(kind: str) -> bool:
    """True if transformers may have a type: its lists name it."""
    return f'"{kind}"' in _names()


def _place(key: str) -> Path:
    """The file that a table is remembered in."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = sha256(f"{_FORMAT} {key}".encode()).hexdigest()[:32]
    return Path(folder) / "moerge" / "tables" / f"transformers-{_version()}" / f"{name}.json"


def _read(place: Path) -> dict[str, Any] | None:
    try:
        table = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None


def _write(place: Path, table: Mapping[str, Any]) -> None:
    beside = place.with_suffix(f".{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(table), encoding="utf-8")
        beside.replace(place)
    except OSError:  # a cache that cannot be written is none
        return


def _ask(config: Mapping[str, Any]) -> dict[str, Any]:
    from moerge.architecture.derivation import derive
    from moerge.architecture.meta_model import NoTableError

    try:
        table: dict[str, Any] = json.loads(json.dumps(derive(config), default=str))
        return table
    except NoTableError as error:
        return {"reason": str(error)}
    except Exception as error:  # a model of a kind that has not been thought of still merges by name
        return {"reason": f"its model in transformers could not be read: {' '.join(str(error).split())[:200]}"}


def _family(table: Mapping[str, Any], config: Mapping[str, Any]) -> Family:
    values: dict[str, Any] = table["values"]

    def complete(normalized: dict[str, Any]) -> None:
        """Fill in what transformers reads of the config."""
        normalized |= {key: value for key, value in values.items() if value is not None or key not in normalized}
        flatten_rope(normalized)

    return Family(
        model_type=str(config["model_type"]),
        architecture=table["architecture"],
        tensors=tuple(_rule(row) for row in table["tensors"]),
        buffers=tuple(table["buffers"]),
        keys=table["keys"],
        derive=complete,
        nested=table["nested"],
        aliases=tuple((old, new) for old, new in table["aliases"]),
        modules=table["modules"],
        unmodeled=tuple(table["unmodeled"]),
        fused=tuple(table["fused"]),
        float32=tuple(table["float32"]),
        source=f"transformers {_version()}",
    )


def _rule(row: Mapping[str, Any]) -> TensorRule:
    layers = frozenset(row["layers"]) if "layers" in row else None
    return TensorRule(row["role"], row["name"], tuple(row["shape"]), row.get("when", ""), layers=layers)
