"""What experiments/routing.py found: tables for the terminal, Markdown and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import spread
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

BEST, DARE, TIES = "separate attention, PPL", "dense dare", "dense ties"
COMPARED = (
    ("separate attention, PPL", "dense dare", 13.6),
    ("separate attention, PPL", "Mixtral, averaged, random router", 16.8),
    ("separate attention, PPL", "dense ties", 15.8),
    ("separate attention, PPL", "merged attention, PPL", 10.4),
    ("separate attention, PPL", "separate attention, task vector", 14.6),
    ("merged attention, PPL", "merged attention, task vector", 1.1),
    ("merged attention, PPL", "dense dare", 3.0),
    ("separate attention, PPL, top 1", "dense dare", None),
    ("separate attention, PPL, top 1", "separate attention, PPL", None),
    ("Mixtral, DARE, ridge router", "separate attention, PPL", None),
    ("Mixtral, DARE, ridge router", "Mixtral, DARE, random router", None),
)
"""Pairs whose perplexities are compared, and by how many per cent the paper's first one is more accurate (its Table 3)."""
TITLE = "Held-out perplexity, mean ± standard deviation over seeds"


@dataclass
class Results:
    """Everything measured, by seed and model; `models` are (name, group) in the table's order."""

    models: list[tuple[str, str]]
    settings: dict[str, Any]
    perplexity: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    own_first: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    own_weight: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    tokens: dict[int, dict[str, int]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def add(
        self, seed: int, model: str, perplexity: dict[str, float], own_first: dict[str, float], own_weight: dict[str, float]
    ) -> None:
        """One model's figures by domain; their mean is added, of perplexities the geometric one."""
        mean = math.exp(statistics.fmean(map(math.log, perplexity.values())))
        self.perplexity.setdefault(seed, {})[model] = {**perplexity, "mean": mean}
        for kept, shares in ((self.own_first, own_first), (self.own_weight, own_weight)):
            if shares:
                kept.setdefault(seed, {})[model] = {**shares, "mean": statistics.fmean(shares.values())}

    @property
    def columns(self) -> list[str]:
        """The domains and the mean."""
        return list(next(iter(next(iter(self.perplexity.values())).values())))

    def values(self, what: dict[int, dict[str, dict[str, float]]], model: str, column: str) -> list[float]:
        """A figure of every seed."""
        return [what[seed][model][column] for seed in sorted(what)]

    def reductions(self, model: str, other: str) -> list[float]:
        """By how many per cent a model's geometric mean perplexity is lower than another's, seed by seed."""
        pairs = zip(*(self.values(self.perplexity, name, "mean") for name in (model, other)), strict=True)
        return [100 * (1 - ours / theirs) for ours, theirs in pairs]

    def comparisons(self) -> list[dict[str, Any]]:
        """The reductions of all COMPARED."""
        return [
            {"model": model, "other": other, "lower_per_cent": self.reductions(model, other), "paper_accuracy_per_cent": paper}
            for model, other, paper in COMPARED
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "settings": self.settings,
            "seeds": sorted(self.perplexity),
            "seconds": self.seconds,
            "scored_tokens": self.tokens,
            "models": [
                {
                    "model": name,
                    "group": group,
                    "perplexity": {c: self.values(self.perplexity, name, c) for c in self.columns},
                    **self._own_json(name),
                }
                for name, group in self.models
            ],
            "comparisons": self.comparisons(),
        }

    def _own_json(self, name: str) -> dict[str, Any]:
        if not self._routes(name):
            return {}
        kept = {"own_expert_first": self.own_first, "own_expert_weight": self.own_weight}
        return {key: {c: self.values(what, name, c) for c in self.columns} for key, what in kept.items()}

    def _routes(self, name: str) -> bool:
        return any(name in measured for measured in self.own_first.values())

    def sections(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and rows of every table; * marks the best of the merged models in a column."""
        merged = [name for name, group in self.models if group != "trained" and not name.endswith("own expert")]

        def perplexity(name: str, column: str) -> str:
            means = {model: statistics.fmean(self.values(self.perplexity, model, column)) for model in merged}
            return spread(self.values(self.perplexity, name, column)) + ("*" if name == min(means, key=means.__getitem__) else "")

        def own(name: str, column: str) -> str:
            first, weight = (statistics.fmean(self.values(what, name, column)) for what in (self.own_first, self.own_weight))
            return f"{first:.0%}, {weight:.2f}"

        routed = [name for name, _ in self.models if self._routes(name) and not name.endswith(("own expert", "logits", "output"))]
        headings = ["model", *self.columns[:-1], "geometric mean"]
        return [
            (TITLE, headings, self._rows([name for name, _ in self.models], perplexity)),
            (
                "Rows in which the domain's own expert weighs most, and its mean weight",
                [*headings[:-1], "mean"],
                self._rows(routed, own),
            ),
            (
                "Geometric mean perplexity of one against another",
                ["model", "against", "lower by, %", "more accurate in the paper, %"],
                [
                    [c["model"], c["other"], spread(c["lower_per_cent"], 1), _number(c["paper_accuracy_per_cent"])]
                    for c in self.comparisons()
                ],
            ),
        ]

    def _rows(self, names: Sequence[str], cell: Callable[[str, str], str]) -> list[list[str]]:
        return [[name, *(cell(name, column) for column in self.columns)] for name in names]

    def answer(self) -> str:
        """The paper's main claim of its section 5.1.2, in a sentence."""
        return (
            f"With separate attention and PPL routing the geometric mean perplexity is "
            f"{spread(self.reductions(BEST, DARE), 1)} % lower than dense DARE's (in the paper, the accuracy is "
            f"13.6 % higher) and {spread(self.reductions(BEST, TIES), 1)} % lower than dense TIES's."
        )


def show(results: Results, console: Console) -> None:
    """The tables and the answer, on a terminal."""
    for title, columns, rows in results.sections():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(results.answer(), highlight=False)


def write(results: Results, path: Path) -> None:
    """`path` as JSON, and Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results.to_json(), indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def markdown(results: Results) -> str:
    """All tables and the settings."""
    settings, tokens = results.settings, [sum(counts.values()) for counts in results.tokens.values()]
    lines = [
        "# Routing without fine-tuning",
        "",
        f"Seeds {', '.join(map(str, sorted(results.perplexity)))}; scale {settings['scale']:g}; rows of "
        f"{settings['row_tokens']} tokens, routed by the first {settings['prompt_tokens']}, perplexity of the rest "
        f"({' or '.join(map(str, sorted(set(tokens))))} tokens a seed, the same for all models). moerge {settings['moerge']}, "
        f"torch {settings['torch']} with {settings['threads']} threads, transformers {settings['transformers']}.",
        "",
        results.answer(),
        "",
    ]
    for title, columns, rows in results.sections():
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
