"""One file of published results: inputs, settings and outputs of other implementations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import moerge

Model = dict[str, np.ndarray]


def density_for(kept: int, size: int) -> float:
    """A density that keeps exactly `kept` of `size`, half a step away from any rounding."""
    return 1.0 if kept == size else (kept - 0.5) / size


def part_of(arrays: Model, prefix: str) -> Model:
    """The arrays below a prefix."""
    return {name.removeprefix(f"{prefix}/"): array for name, array in arrays.items() if name.startswith(f"{prefix}/")}


@dataclass
class Oracle:
    """One file of cases."""

    name: str
    folder: Path
    cases: dict[str, dict[str, Any]] = field(init=False)
    arrays: Model = field(init=False)

    def __post_init__(self) -> None:
        listed = json.loads((self.folder / f"{self.name}.json").read_text())["cases"]
        self.cases = {case["id"]: case for case in listed}
        self.arrays = load_file(self.folder / f"{self.name}.safetensors")

    def model(self, prefix: str) -> Model:
        return part_of(self.arrays, prefix)

    def merge(self, case_id: str, method: str, **parameters: Any) -> Model:
        models = self.cases[case_id]["params"].get("models", range(4))
        experts = [self.model(f"in/m{index}") for index in models]
        return moerge.merge_state_dicts(self.model("in/base"), experts, method=method, threads=1, **parameters)

    def difference(self, case_id: str, merged: Model) -> float:
        expected = self.model(case_id)
        assert expected.keys() == merged.keys()
        return max(float(np.abs(merged[name] - expected[name]).max()) for name in expected)

    def check(self, case_id: str, merged: Model) -> None:
        assert self.difference(case_id, merged) <= self.cases[case_id]["atol"]


Compared = dict[str, Callable[[Oracle, str], None]]
"""By case: asserts that ours gives theirs."""
NotOurs = dict[str, tuple[str, Callable[[Oracle, str], Model] | None]]
"""By case: why no option covers it, and what comes nearest, which has to differ; None for what crashes there."""
