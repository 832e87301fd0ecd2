"""Small damage to JSON values, text and bytes, drawn at random: what people mistype, programs garble and attackers try."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from random import Random
from typing import Any

ODD: list[Callable[[Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 1, 2, 3, 7, 64, 10**6, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**400]),
    lambda rng: rng.choice([0.0, -0.5, 0.5, 1e-300, 1e300, 1e39, math.inf, -math.inf, math.nan]),
    lambda rng: rng.choice(["", " ", "abc", "x" * 300, "x" * 5000, "\x00", "\x1b]0;o\x07", "\ud800", "[/red]", "<b>", "a\nb"]),
    lambda rng: rng.choice(["/etc/passwd", "../../base", "~", "~nobody", ".", "..", "a/b/c", "owner/name@main", "1e-3", "`x`"]),
    lambda rng: rng.choice([[], [None], [True], [1], ["a"], [[]], [1.5, "x", None], {}, {"a": 1}, {"": {}}, {"x": [1]}]),
    lambda rng: rng.choice(["llama", "mixtral", "ties", "average", "bfloat16", "float32", "base", "math", "all", "union"]),
    lambda rng: deep(rng.choice([50, 400, 3000])),
]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a value; of long containers only the first and last parts."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    keys = keys if len(keys) <= 40 else [*keys[:20], *keys[-20:]]
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def mutated(value: Any, rng: Random) -> tuple[Any, str]:
    """A copy with one thing changed, and what."""
    whole = [copy.deepcopy(value)]
    path = (0, *rng.choice(places(value)[1:] or [()]))
    owner: Any = whole
    for key in path[:-1]:
        owner = owner[key]
    key, kind = path[-1], rng.randrange(8)
    if kind == 0 and isinstance(owner, dict):
        del owner[key]
        return whole[0], f"{path[1:]} removed"
    if kind == 1 and isinstance(owner, dict):
        new = rng.choice([f"{key}x", "\x1b[2J", "", str(key).upper(), "x" * 300, "method", "[/x]"])
        owner[new] = owner.pop(key)
        return whole[0], f"{path[1:]} renamed to {new!r}"
    if kind == 2 and isinstance(owner, list):
        owner.insert(key if isinstance(key, int) else 0, copy.deepcopy(owner[key]))
        return whole[0], f"{path[1:]} twice"
    if kind == 3:
        other = rng.choice(places(value))
        found: Any = value
        for part in other:
            found = found[part]
        owner[key] = copy.deepcopy(found)
        return whole[0], f"{path[1:]} is what {other} is"
    if kind == 4 and type(owner[key]) in (int, float):
        owner[key] = rng.choice([owner[key] + 1, owner[key] - 1, -owner[key], owner[key] * 1000, str(owner[key]), [owner[key]]])
        return whole[0], f"{path[1:]} = {owner[key]!r}"
    owner[key] = rng.choice(ODD)(rng)
    return whole[0], f"{path[1:]} = {str(owner[key])[:80]!r}"


def mutated_bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The same with bytes changed, removed, repeated or put in."""
    start = rng.randrange(max(1, len(content))) if rng.random() < 0.5 else rng.randrange(min(200, max(1, len(content))))
    length = rng.choice([1, 1, 2, 8, 100])
    kind = rng.randrange(6)
    if kind == 0:
        return content[:start], f"cut at {start}"
    if kind == 1:
        return content[:start] + content[start + length :], f"{length} bytes removed at {start}"
    if kind == 2:
        return content[:start] + content[start : start + length] + content[start:], f"{length} bytes twice at {start}"
    if kind == 3:
        new = rng.randbytes(length)
        return content[:start] + new + content[start + length :], f"{new[:8]!r} at {start}"
    if kind == 4:
        return content + rng.choice([b"\0", b" ", b"\n", b"{}", b"\xff" * 20]), "more at the end"
    if not content:
        return b"\0", "a byte"
    bit = rng.randrange(8)
    return content[:start] + bytes([content[start] ^ 1 << bit]) + content[start + 1 :], f"bit {bit} at {start}"


TOKENS = ["null", "true", "~", "{}", "[]", "&a [*a]", "*a", "!!python/object:os.system x", "!!binary aGk=", "2001-01-01", "0o17"]
TOKENS += [
    "1e400",
    ".inf",
    ".nan",
    "'",
    '"',
    "- - -",
    "? x",
    "<<: {a: 1}",
    "---",
    "%TAG ! x",
    "\t",
    "\x07",
    "é" * 100,
    "!!set {a}",
    "0x10",
]


def mutated_text(text: str, rng: Random) -> tuple[str, str]:
    """YAML with a line removed, repeated, moved or indented, or a value replaced."""
    lines = text.split("\n")
    at, kind = rng.randrange(len(lines)), rng.randrange(6)
    if kind == 0:
        gone = lines.pop(at)
        return "\n".join(lines), f"line {gone!r} removed"
    if kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
        return "\n".join(lines), f"line {lines[at]!r} twice"
    if kind == 2:
        lines[at] = rng.choice([" ", "  ", "\t", "- "]) + lines[at]
        return "\n".join(lines), f"line {lines[at]!r} indented"
    if kind == 3:
        changed, what = mutated_bytes(text.encode(), rng)
        return changed.decode("utf-8", "replace"), what
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {rng.choice(TOKENS)}"
    return "\n".join(lines), f"line {lines[at]!r}"
