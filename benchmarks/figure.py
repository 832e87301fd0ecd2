"""The README's picture: seconds for each merge, by moerge, by mergekit, and for copying the bytes, from a result file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SERIES = (  # name, colour (Okabe and Ito's, distinct without colour vision too), marker
    ("floor: the same bytes read and written", "#000000", "|"),
    ("moerge, whole command", "#0072B2", "o"),
    ("mergekit, whole command", "#D55E00", "s"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    result = json.loads(arguments.results.read_text())
    figure, axes = plt.subplots(figsize=(7.2, 3.0), dpi=200)
    for row, case in enumerate(reversed(result["cases"])):
        runs = [run for run in result["runs"] if run["case"] == case]
        for (name, colour, marker), seconds in zip(SERIES, _seconds(runs), strict=True):
            if seconds:
                label = name if row == 0 else None
                axes.plot([min(seconds), max(seconds)], [row, row], color=colour, linewidth=2)
                axes.plot(median(seconds), row, marker, color=colour, markersize=9, label=label)
                axes.annotate(f"{median(seconds):.1f}", (median(seconds), row), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(result["cases"])), reversed(result["cases"]))
    axes.set_ylim(-0.5, len(result["cases"]) - 0.3)
    axes.set_xscale("log")
    axes.set_xlabel(
        f"seconds (log scale; median, minimum to maximum of {len(result['runs']) // len(result['cases'])} runs)\n"
        f"three experts and a base of {result['size']} parameters in bfloat16, {result['machine']['cores']} cores"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, 1.2), ncols=3, fontsize=8)
    figure.savefig(arguments.out, bbox_inches="tight")


def _seconds(runs: Iterable[dict]) -> tuple[list[float], list[float], list[float]]:
    runs = list(runs)
    return (
        [floor["write_seconds"] for run in runs for floor in run["floor"]],
        [run["moerge"]["seconds"] for run in runs],
        [run["mergekit"]["seconds"] for run in runs if run.get("mergekit")],
    )


if __name__ == "__main__":
    main()
