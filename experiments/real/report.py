"""The results as Markdown and figures, from the JSON files of all seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import markdown, spread

from .measuring import against, bits, shown
from .settings import DOMAINS

COLUMNS = (*DOMAINS, "mean")
RIVALS = ("base", "dense: average", "dense: DARE, tuned scale", "BTX: average, random router")
"""What every row of table 3 is compared with."""


def read(folder: Path, step: str) -> dict[int, dict[str, Any]]:
    """A step's results by seed."""
    paths = {
        int(found[1]): path for path in folder.glob("*.json") if (found := re.fullmatch(rf"step-{step}-seed-(\d+)", path.stem))
    }
    return {seed: json.loads(paths[seed].read_text(encoding="utf-8")) for seed in sorted(paths)}


def write(folder: Path) -> None:
    """Every table that there are results for."""
    tables = {"2": tables_1_and_3}
    lines = []
    for step, table in tables.items():
        if by_seed := read(folder, step):
            lines += [*table(by_seed), ""]
    (folder / "real.md").write_text("\n".join(lines), encoding="utf-8")


def tables_1_and_3(by_seed: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Bits per byte of every row, and each seed's differences with their intervals."""
    names = dict.fromkeys(name for found in by_seed.values() for name in found["documents"])
    yield f"## Bits per byte of held-out text, seeds {', '.join(map(str, by_seed))}"
    yield ""
    rows = []
    for name in names:
        measured = [bits(found["documents"][name]) for found in by_seed.values() if name in found["documents"]]
        rows.append([name, str(len(measured)), *(spread([bits[column] for bits in measured], 4) for column in COLUMNS)])
    yield from markdown(["model", "seeds", *COLUMNS], rows)
    for seed, found in by_seed.items():
        documents = found["documents"]
        for rival in RIVALS:
            if rival in documents:
                yield from ("", f"Lower than {rival}, seed {seed}, with 95% intervals over documents; `*`: without 0:", "")
                rows = [
                    [name, *(shown(against(documents[name], documents[rival], column)) for column in COLUMNS)]
                    for name in documents
                    if name != rival
                ]
                yield from markdown(["model", *COLUMNS], rows)
        if found["scales"]:
            yield from ("", f"Mean bits per byte of calibration text by scale, seed {seed}:", "")
            tried = list(next(iter(found["scales"].values())))
            rows = [[name, *(f"{scales[scale]:.4f}" for scale in tried)] for name, scales in found["scales"].items()]
            yield from markdown(["method", *map(str, tried)], rows)
