"""What the experiment runs with: domains, budgets, and where things lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

DOMAINS = ("general", "math", "code", "knowledge")
EXPERTS = DOMAINS[1:]
OWN = dict(zip(DOMAINS, ("base", *EXPERTS), strict=True))
"""The expert of each domain."""


@dataclass(frozen=True)
class Budget:
    """How much of everything. `cpu` is for two cores that are not idle, `gpu` for three minutes an expert of an H200."""

    seeds: tuple[int, ...]
    length: int
    batch: int
    healing_tokens: int
    expert_tokens: int
    learning_rate: float
    """Of healing; experts take twice as much."""
    per_source: int
    """Documents of one source, at most."""
    heldout: int
    """Documents of a domain that models are measured on, at most."""
    calibration: int
    """Documents of a domain that a scale is tuned on."""
    questions: int
    """Of each benchmark."""
    routed: int
    """Documents or questions whose routing is looked at, of each domain or benchmark."""
    curve_tokens: int
    curve_points: int
    texts: tuple[int, ...]
    """Of each expert, for Expert Merging."""
    chunks: tuple[int, ...]
    """Coefficients of a matrix, on average, for Expert Merging++."""
    odd_width: int
    odd_layers: int
    odd_tokens: int
    """Of the GPT-NeoX that takes the math expert's place."""
    device: str = "cpu"
    training_dtype: str = "bfloat16"
    mixture_dtype: str = "float32"
    """That mixtures are tuned in; CPUs multiply grouped bfloat16 matrices slowly."""
    dtype: str = "float32"
    """That models are measured in."""


BUDGETS = {
    "cpu": Budget(
        seeds=(0, 1),
        length=256,
        batch=4,
        healing_tokens=122_880,
        expert_tokens=102_400,
        learning_rate=1e-4,
        per_source=1_500,
        heldout=12,
        calibration=3,
        questions=20,
        routed=12,
        curve_tokens=6_144,
        curve_points=4,
        texts=(5,),
        chunks=(2, 8),
        odd_width=256,
        odd_layers=4,
        odd_tokens=262_144,
    ),
    "gpu": Budget(
        seeds=(0, 1, 2),
        length=1_024,
        batch=32,
        healing_tokens=2_000_000,
        expert_tokens=10_000_000,
        learning_rate=5e-5,
        per_source=20_000,
        heldout=200,
        calibration=32,
        questions=200,
        routed=100,
        curve_tokens=4_000_000,
        curve_points=10,
        texts=(5, 10, 50),
        chunks=(2, 8, 32),
        odd_width=576,
        odd_layers=24,
        odd_tokens=100_000_000,
        device="cuda",
        mixture_dtype="bfloat16",
    ),
}


BUDGETS["smoke"] = replace(
    BUDGETS["cpu"],
    seeds=(0,),
    length=64,
    batch=2,
    healing_tokens=256,
    expert_tokens=256,
    per_source=60,
    heldout=3,
    questions=2,
    routed=3,
    curve_tokens=512,
    curve_points=2,
    chunks=(2,),
    odd_width=32,
    odd_layers=2,
    odd_tokens=512,
)
"""To try the code on a model of nearly no parameters."""


@dataclass(frozen=True)
class Work:
    """The folders under --work."""

    root: Path

    @property
    def base(self) -> Path:
        """The healed model, from which every expert starts."""
        return self.root / "base"

    def text(self, domain: str, split: str) -> Path:
        """A text file: `train-SEED`, `calibration` or `valid`."""
        return self.root / "text" / domain / f"{split}.jsonl"

    def texts(self, split: str) -> dict[str, str]:
        """Such a file of every domain."""
        return {domain: str(self.text(domain, split)) for domain in DOMAINS}

    def calibration(self) -> dict[str, str]:
        """Text of the base and every expert that nobody was trained on."""
        return {OWN[domain]: path for domain, path in self.texts("calibration").items()}

    def expert(self, seed: int, domain: str) -> Path:
        """An expert's checkpoint."""
        return self.root / f"seed-{seed}" / "experts" / domain

    def experts(self, seed: int) -> dict[str, str]:
        """All of them, for a recipe."""
        return {domain: str(self.expert(seed, domain)) for domain in EXPERTS}

    def made(self, seed: int, kind: str, name: str) -> Path:
        """A folder for what is merged, tuned, learned or measured of a seed."""
        return self.root / f"seed-{seed}" / kind / slug(name)


def slug(name: str) -> str:
    """A name of a row as that of a folder."""
    name = name.replace("++", " plus plus")
    return "-".join("".join(letter if letter.isalnum() or letter == "." else " " for letter in name).split())
