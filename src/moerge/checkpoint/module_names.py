"""Names of modules in files and in memory: transformers renames the parts of a multimodal model when it loads it."""

from __future__ import annotations

from collections.abc import Iterable

_WRAPPERS = frozenset({"model", "language_model", "text_model", "vision_model"})
"""What names have in one place and lack in another: `model.visual` is `visual`, `language_model.model` `model.language_model`."""

_RENAMED = {"block_sparse_moe": "mlp"}
"""Modules that transformers 5 calls otherwise than files do."""


class Names:
    """Known names of tensors or modules, found by any spelling that differs in what wraps the parts only."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = dict.fromkeys(known)
        self._plain: dict[str, list[str]] = {}
        for name in self._known:
            self._plain.setdefault(plain_name(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The known name, None where there is none or several may be meant."""
        if name in self._known:
            return name
        shorter = name.partition(".")[2]
        found = self._plain.get(plain_name(name)) or [
            known for known in self._known if known == shorter or known.endswith(f".{name}")
        ]
        return found[0] if len(found) == 1 else None


def plain_name(name: str) -> str:
    """A name without what wraps the parts of a model, and with Mixtral's blocks of experts called as in memory."""
    return ".".join(_RENAMED.get(part, part) for part in name.split(".") if part not in _WRAPPERS)
