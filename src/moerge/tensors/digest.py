"""Digests by which damage is found and runs are compared.

XXH3-128 is not cryptographic: it tells accident, not malice, and costs a thirtieth of a SHA. A tensor's digest is the
digest of its chunks' digests, so that chunks can be hashed in any order by any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

CHUNK = 1 << 20
"""Elements a chunk; part of the definition of a tensor's digest."""
DEFINITION = f"xxh3-128 of the xxh3-128 of every {CHUNK} elements"
"""A tensor's digest in words, for manifests."""


def chunk_digest(data: Any) -> bytes:
    """Digest of one chunk's bytes (any buffer)."""
    return xxhash.xxh3_128_digest(data)


def running_digest() -> Any:
    """A digest of a chunk that is fed piece by piece: `update(data)`, then `digest()`."""
    return xxhash.xxh3_128()


def tensor_digest(chunks: Iterable[bytes]) -> str:
    """Digest of a tensor from its chunks' digests in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(chunks))


class TensorDigest:
    """Digest of a tensor that is fed piece by piece, in order; the pieces may have any length."""

    def __init__(self) -> None:
        self._chunk, self._room = running_digest(), CHUNK
        self._chunks: list[bytes] = []

    def update(self, data_N: np.ndarray) -> None:
        """The next elements."""
        while data_N.size:
            part_N, data_N = data_N[: self._room], data_N[self._room :]
            self._chunk.update(part_N)
            self._room -= part_N.size
            if self._room == 0:
                self._chunks.append(self._chunk.digest())
                self._chunk, self._room = running_digest(), CHUNK

    def digest(self) -> str:
        """Return `tensor_digest` of the chunks."""
        return tensor_digest([*self._chunks, self._chunk.digest()] if self._room < CHUNK else self._chunks)


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest for many named ones, whatever their order."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items())).encode())


def file_digest(content: bytes) -> str:
    """Digest of a small file's content."""
    return xxhash.xxh3_128_hexdigest(content)
