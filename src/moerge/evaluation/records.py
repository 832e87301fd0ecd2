"""Records of what has been computed, kept in a file line by line, so that a killed run continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moerge.errors import MachineError
from moerge.files import atomic_write, read_file
from moerge.tensors.digest import file_digest


class Records:
    """Values by key, in memory and, given a path, in a JSON-lines file that grows as they come.

    The file begins with a fingerprint of everything the values depend on; a file with another one is started over. What a killed
    run left of a last line is dropped.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self._path, self._values = path, dict[str, Any]()
        if path is not None and not self._read(path, fingerprint):
            self._values.clear()
            atomic_write(path, _line({"fingerprint": fingerprint}))

    @staticmethod
    def key(*parts: Any) -> str:
        """A key from anything that JSON can hold."""
        return file_digest(json.dumps(parts).encode())

    def _read(self, path: Path, fingerprint: str) -> bool:
        try:
            content = read_file(path)
        except FileNotFoundError:
            return False
        complete = content[: content.rfind(b"\n") + 1]
        try:
            head, *rest = map(json.loads, complete.decode().splitlines())
            if head != {"fingerprint": fingerprint}:
                return False
            self._values = {str(entry["key"]): entry["value"] for entry in rest}
        except (ValueError, KeyError, TypeError):
            return False
        if len(complete) < len(content):
            atomic_write(path, complete)
        return True

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep these values; they are in the file when this returns. MachineError if it cannot be written."""
        self._values.update(values)
        if self._path is None:
            return
        try:
            with open(self._path, "ab") as file:
                file.write(b"".join(_line({"key": key, "value": value}) for key, value in values.items()))
        except OSError as error:
            raise MachineError(f"cannot write {self._path}: {error.strerror or error}") from None


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
