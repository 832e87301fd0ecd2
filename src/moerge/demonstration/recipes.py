"""The demo's recipes, as a user would write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

METHODS = ("average", "ties", "dare")
KINDS = ("dense", "moe")
NAMES = tuple(f"{method}-{kind}" for kind in KINDS for method in METHODS)

_PURPOSE = {
    "average-dense": "The mean of the experts.",
    "ties-dense": "TIES: trim each task vector, elect a sign for each parameter, add what agrees.",
    "dare-dense": "DARE: drop entries of each task vector at random, rescale the rest, add.",
    "average-moe": "A Mixtral: the FFNs stay separate, everything else is averaged.",
    "ties-moe": "A Mixtral: the FFNs stay separate, everything else is merged by TIES.",
    "dare-moe": "A Mixtral: the FFNs stay separate, everything else is merged by DARE.",
}
_MERGE = {  # the settings of the MergeME paper
    "average": "{method: average}",
    "ties": "{method: ties, density: 0.8, scale: 0.3333}",
    "dare": "{method: dare, density: 0.8, scale: 0.3333, seed: SEED}",
}
_MOE = """moe:
  separate: [ffn]
  include_base: true
  top_k: 2
  router: {kind: random, seed: SEED}
"""


def recipe(name: str, experts: Sequence[str], seed: int) -> str:
    """The YAML of one of `NAMES` for models in `../models`."""
    method, kind = name.split("-")
    lines = [
        f"# {_PURPOSE[name]}",
        "base: ../models/base",
        "experts:",
        *(f"  {expert}: ../models/{expert}" for expert in experts),
        f"merge: {_MERGE[method]}",
    ]
    text = "\n".join(lines) + "\n" + (_MOE if kind == "moe" else "")
    return text.replace("SEED", str(seed))


def write_recipes(folder: Path, experts: Sequence[str], seed: int) -> dict[str, Path]:
    """Write `folder/<name>.yaml` for all `NAMES`; returns the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.yaml" for name in NAMES}
    for name, file in files.items():
        file.write_text(recipe(name, experts, seed), encoding="utf-8")
    return files
