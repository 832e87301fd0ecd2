"""Figures against targets: a table for the terminal, Markdown and JSON for the record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import CASES
from rich.console import Console
from rich.table import Table

PEAK_BYTES = 0.5 * 2**30
HELP_SECONDS, PLAN_SECONDS = 0.3, 1.0
SAME_SIZE = 1.1
"""Peaks of one program vary by some per cent from run to run, so that much more still counts as no larger."""


@dataclass(frozen=True)
class Check:
    """A figure and what was promised for it."""

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        if self.met:
            return "met"
        factor = self.limit / self.value if self.at_least else self.value / self.limit
        return f"missed by {factor - 1:.1%}"

    @property
    def row(self) -> tuple[str, str, str, str]:
        sign = "≥" if self.at_least else "≤"
        return self.what, f"{self.value:.2f} {self.unit}", f"{sign} {self.limit:g} {self.unit}", self.verdict


Rows = list[tuple[str, ...]]


def series(runs: Sequence[Mapping[str, Any]], case: str) -> dict[str, list[float]]:
    """What was measured or follows from it, run by run; the floor of a run is the mean of those before and after it."""
    found: dict[str, list[float]] = {}
    for run in (run for run in runs if run["case"] == case):
        ours = run["moerge"]
        write, durable, cpu = (
            statistics.mean(floor[key] for floor in run["floor"]) for key in ("write_seconds", "durable_seconds", "cpu_seconds")
        )
        values = {
            "floor, s": write,
            "merge, s": ours["merge_seconds"],
            "merge / floor": ours["merge_seconds"] / write,
            "floor with fsync, s": durable,
            "merge and publish, s": ours["merge_seconds"] + ours["publish_seconds"],
            "merge and publish / floor with fsync": (ours["merge_seconds"] + ours["publish_seconds"]) / durable,
            "moerge, whole process, s": ours["seconds"],
            "floor, CPU s": cpu,
            "moerge, CPU s": ours["cpu_seconds"],
            "moerge, peak anonymous GiB": ours["peak_anonymous_bytes"] / 2**30,
        }
        if other := run.get("mergekit"):
            values |= {
                "mergekit, whole process, s": other["seconds"],
                "mergekit / moerge": other["seconds"] / ours["seconds"],
                "mergekit, CPU s": other["cpu_seconds"],
                "mergekit, peak anonymous GiB": other["peak_anonymous_bytes"] / 2**30,
            }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def checks(results: Mapping[str, Any]) -> list[Check]:
    """Every promise that was measured; ratios are medians over runs."""
    found = []
    for case in results["cases"]:
        measured = {name: statistics.median(values) for name, values in series(results["runs"], case).items()}
        peak = max(series(results["runs"], case)["moerge, peak anonymous GiB"])
        target = CASES[case].target
        found.append(Check(f"{case}: merge / floor", measured["merge / floor"], target.floor, "x"))
        with_fsync = "merge and publish / floor with fsync"
        found.append(Check(f"{case}: {with_fsync}", measured[with_fsync], target.floor, "x"))
        if "mergekit / moerge" in measured:
            found.append(Check(f"{case}: mergekit / moerge", measured["mergekit / moerge"], target.mergekit, "x", at_least=True))
        found.append(Check(f"{case}: peak anonymous memory", peak, PEAK_BYTES / 2**30, "GiB"))
    for case, peak in results.get("memory", {}).get("peaks", {}).items():
        ratio = peak["twice"] / peak["once"]
        found.append(Check(f"{case}: peak memory, twice the size / once", ratio, SAME_SIZE, "x"))
    if startup := results.get("startup"):
        found.append(Check("moerge --help", startup["help_seconds"], HELP_SECONDS, "s"))
        found.append(Check("moerge plan, slowest case", max(startup["plan_seconds"].values()), PLAN_SECONDS, "s"))
    return found


def sections(results: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], Rows]]:
    """Title, columns and rows of every table."""
    found: list[tuple[str, tuple[str, ...], Rows]] = []
    found.append(("Targets", ("figure", "measured", "target", "verdict"), [check.row for check in checks(results)]))
    for case in results["cases"]:
        first = next(run for run in results["runs"] if run["case"] == case)
        measured = series(results["runs"], case)
        count = len(measured["merge, s"])
        title = (
            f"{case}: reads {first['input_bytes'] / 1e9:.2f} GB, writes {first['output_bytes'] / 1e9:.2f} GB, "
            f"{count} run{'s' if count > 1 else ''}"
        )
        found.append((title, ("figure", "minimum", "median", "maximum"), [_spread(*item) for item in measured.items()]))
    if startup := results.get("startup"):
        rows: Rows = [("moerge --help", f"{startup['help_seconds']:.3f}")]
        rows += [(f"moerge plan, {case}", f"{seconds:.3f}") for case, seconds in startup["plan_seconds"].items()]
        found.append(("Start-up, median seconds", ("command", "seconds"), rows))
    if compiled := results.get("compilation"):
        rows = [(case, f"{v['first_seconds']:.2f}", f"{v['later_seconds']:.2f}") for case, v in compiled["cases"].items()]
        title = f"Compiling: whole process at {compiled['size']}, seconds"
        found.append((title, ("case", "first merge after installing", "later"), rows))
    if memory := results.get("memory"):
        rows = [(c, f"{p['once'] / 2**20:.0f}", f"{p['twice'] / 2**20:.0f}") for c, p in memory["peaks"].items()]
        found.append(("Peak anonymous memory by size, MiB", ("case", memory["once"], memory["twice"]), rows))
    if agreement := results.get("agreement"):
        rows = [
            (case, f"{v['largest_ulps']:.0f}", *(f"{v[key]:.2g}" for key in ("largest", "share_differing", "share_beyond_1_ulp")))
            for case, v in agreement["cases"].items()
        ]
        columns = ("case", "largest, bf16 ulps", "largest, absolute", "share that differs", "share beyond 1 ulp")
        found.append((f"Against mergekit's tensors, computed in float32, at {agreement['size']}", columns, rows))
    return found


def _spread(name: str, values: Sequence[float]) -> tuple[str, str, str, str]:
    return name, *(f"{value:.3g}" for value in (min(values), statistics.median(values), max(values)))


def show(results: Mapping[str, Any]) -> None:
    console = Console(width=max(100, Console().width))
    for title, columns, rows in sections(results):
        console.print(title, style="bold", highlight=False)
        table = Table(box=None, pad_edge=False, header_style="italic")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row, style="red" if row[-1].startswith("missed") else None)
        console.print(table, "")
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def markdown(results: Mapping[str, Any]) -> str:
    lines = [f"# {results['size']}, {results['date']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in results["machine"].items()) + ".", ""]
    lines += [f"Against {results['mergekit']}." if results["mergekit"] else "Without mergekit.", ""]
    lines += [f"Warning: {warning}.\n" for warning in results["warnings"]]
    for title, columns, rows in sections(results):
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def save(results: Mapping[str, Any], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown(results))
