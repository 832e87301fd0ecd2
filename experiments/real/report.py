"""The results as Markdown and figures, from the JSON files of all seeds."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tuning_report
from common import markdown, spread

from moerge import figures

from .measuring import against, bits, lost, shown
from .rows import SCALES
from .settings import EXPERTS

RIVALS = {
    "2": ("base", "dense: average", "dense: DARE, tuned scale", "BTX: average, random router"),
    "6": ("task arithmetic, tuned scale",),
    "benchmarks": ("base", "dense: DARE, scale 0.3333"),
    "5": ("three experts", "three experts, tuned"),
}
"""What every row of a step is compared with, where it is there."""
TITLES = {
    "2": "Tables 1 and 3: bits per byte of held-out text",
    "6": "Expert Merging: bits per byte of held-out text",
    "4": "Figures 4 to 9 and table 2: similarity and routing",
    "benchmarks": "Benchmarks: bits per byte of the reference solution",
    "3": "Figure 10: perplexity against tokens tuned",
    "5": "Table 4: experts of different architectures, bits per byte of held-out text",
}
Found = Mapping[int, Mapping[str, Any]]
"""A step's results by seed."""


def read(folder: Path, step: str) -> dict[int, dict[str, Any]]:
    """A step's results by seed."""
    paths = {
        int(found[1]): path for path in folder.iterdir() if (found := re.fullmatch(rf"step-{step}-seed-(\d+).json", path.name))
    }
    return {seed: json.loads(paths[seed].read_text(encoding="utf-8")) for seed in sorted(paths)}


def write(folder: Path) -> None:
    """Every table that there are results for."""
    lines = ["# A pretrained model: all results", ""]
    for step, title in TITLES.items():
        if by_seed := read(folder, step):
            lines += [f"## {title}", "", f"Seeds: {', '.join(map(str, by_seed))}.", ""]
            if "documents" in next(iter(by_seed.values())):
                lines += [*_documents(by_seed, RIVALS[step]), ""]
            lines += [line for table in EXTRA.get(step, ()) for line in (*table(by_seed, folder), "")]
    (folder / "real.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _documents(by_seed: Found, rivals: tuple[str, ...]) -> Iterator[str]:
    """Bits per byte of every row, and each seed's differences with their intervals."""
    first = next(iter(next(iter(by_seed.values()))["documents"].values()))
    columns = [*first, "mean"]
    names = dict.fromkeys(name for found in by_seed.values() for name in found["documents"])
    rows = []
    for name in names:
        measured = [bits(found["documents"][name]) for found in by_seed.values() if name in found["documents"]]
        rows.append([name, str(len(measured)), *(spread([each[column] for each in measured], 4) for column in columns)])
    yield from markdown(["model", "seeds", *columns], rows)
    for seed, found in by_seed.items():
        documents = found["documents"]
        for rival in (rival for rival in rivals if rival in documents):
            yield from ("", f"Lower than {rival}, seed {seed}, with 95% intervals over documents; `*`: without 0:", "")
            rows = [
                [name, *(shown(against(ours, documents[rival], column)) for column in columns)]
                for name, ours in documents.items()
                if name != rival
            ]
            yield from markdown(["model", *columns], rows)


def _scales(by_seed: Found, folder: Path) -> Iterator[str]:
    for seed, found in by_seed.items():
        if found["scales"]:
            yield from (f"Mean bits per byte of calibration text by scale, seed {seed}:", "")
            rows = [[name, *(f"{value:.4f}" for value in scales.values())] for name, scales in found["scales"].items()]
            yield from (*markdown(["method", *next(iter(found["scales"].values()))], rows), "")


def _leads(by_seed: Found, folder: Path) -> Iterator[str]:
    """What a merge loses of each expert's lead over the base, as `docs/comparing.md` measures it."""
    for seed, found in by_seed.items():
        documents = found["documents"]
        names = ["dense: average", *(f"dense: task arithmetic, scale {scale:g}" for scale in SCALES)]
        rows = [
            [name, *(f"{lost(documents, f'{expert} expert', name, expert):.0f} %" for expert in EXPERTS)]
            for name in names
            if name in documents and all(f"{expert} expert" in documents for expert in EXPERTS)
        ]
        if rows:
            yield from (f"Part of each expert's lead over the base on its own domain that is lost, seed {seed}:", "")
            yield from (*markdown(["merge", *EXPERTS], rows), "")


def _learning(by_seed: Found, folder: Path) -> Iterator[str]:
    rows = []
    for name in dict.fromkeys(name for found in by_seed.values() for name in found["learning"]):
        runs = [found["learning"][name] for found in by_seed.values() if name in found["learning"]]
        means = [statistics.fmean(run["coefficients"].values()) for run in runs]
        figures_of = (spread([run[key] for run in runs], 1) for key in ("seconds", "peak_gigabytes"))
        rows.append([name, spread(means), *figures_of])
    yield from markdown(["learning", "mean coefficient", "seconds", "process's peak, GB"], rows)


def _routing(by_seed: Found, folder: Path) -> Iterator[str]:
    for seed, found in by_seed.items():
        yield from (f"`compare` on seed {seed}: {found['advice']}", "")
        rows = [[verdict["role"], verdict["answer"], verdict["reason"]] for verdict in found["verdicts"]]
        yield from (*markdown(["role", "verdict", "reason"], rows), "")
        for name, shares in found["routing"].items():
            yield from (f"Share of each expert, {name}, seed {seed}:", "")
            rows = [[text, *(f"{100 * share:.0f} %" for share in alpha)] for text, alpha in shares.items()]
            yield from (*markdown(["text", *found["experts"]], rows), "")


def _curves(by_seed: Found, folder: Path) -> Iterator[str]:
    """The tables of `tuning_report` for each learning rate, and its picture."""
    for rate in dict.fromkeys(rate for found in by_seed.values() for rate in found["curves"]):
        found = {seed: results["curves"].get(rate, {}) for seed, results in by_seed.items()}
        names = dict.fromkeys(name for curves in found.values() for name in curves)
        curves = {name: {seed: each[name] for seed, each in found.items() if name in each} for name in names}
        report = tuning_report.Report(curves, {})
        yield from (f"Learning rate {rate}:", "", *markdown(report.header(), report.rows()), "")
        yield from (f"Tokens saved on the way to what {tuning_report.BTX} has after so many:", "")
        yield from (*markdown(["row", *report.header()[3:]], report.savings()), "")
        if figures.available():
            title = f"Perplexity against tokens of fine-tuning at {rate}"
            figures.save(tuning_report.draw(report), folder, f"figure-10-{rate}", title, title)


EXTRA: Mapping[str, tuple[Callable[[Found, Path], Iterator[str]], ...]] = {
    "2": (_scales, _leads),
    "6": (_scales, _learning),
    "4": (_routing,),
    "3": (_curves,),
}
"""What a step has beside documents."""
