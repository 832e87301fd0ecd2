"""Measure moerge against mergekit and against the machine's floor: `python benchmarks/run.py --size 1.1B --work DIR`."""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import competitor
import machine
import report
from measure import Bench, agreement, compilation, memory, run_once, startup
from recipes import CASES

RESULTS = Path(__file__).parent / "results"
SMALL = "0.02B"
"""For what does not depend on the size: compiling, and whether results agree."""
COMPARABLE = ("average", "linear", "ties")
"""Cases whose results mergekit's should equal: no random draw, the same tensors."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    bench = _bench(args, args.size)
    results: dict[str, Any] = {
        "size": args.size,
        "date": datetime.date.today().isoformat(),
        "machine": machine.facts(args.work, args.threads),
        "mergekit": ", ".join(competitor.REQUIREMENTS) if bench.mergekit else None,
        "cases": args.methods,
        "warnings": [],
        "runs": [],
    }
    small = _bench(args, SMALL)
    results["compilation"] = {"size": SMALL, "cases": compilation(small, args.methods)}
    if bench.mergekit and (comparable := [name for name in args.methods if name in COMPARABLE]):
        results["agreement"] = {"size": SMALL, "cases": agreement(small, comparable)}
    results["startup"] = startup(bench, args.methods)
    for number in range(args.runs):
        for name in args.methods:
            _say(f"run {number + 1} of {args.runs}: {name}")
            with_mergekit = bench.mergekit is not None and number < args.mergekit_runs
            load = machine.load()
            results["runs"].append({**run_once(bench, name, with_mergekit), "load_before": load})
        results["warnings"] = _warnings(results, args)
        report.save(results, args.results, args.name)
    if args.memory:
        results["memory"] = _memory(args)
    shutil.rmtree(bench.scratch)
    report.save(results, args.results, args.name)
    report.show(results)
    _say(f"written to {args.name}.json and {args.name}.md in {args.results}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--size", choices=list(checkpoints.SHAPES), default="1.1B", help="parameters of each of the four models")
    parser.add_argument("--runs", type=int, default=3, help="rounds; each measures every method once")
    parser.add_argument("--work", type=Path, required=True, help="keeps checkpoints and mergekit's environment for the next time")
    parser.add_argument("--methods", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=cores, help=f"of moerge and of the floor (default: the cores, {cores})")
    parser.add_argument("--no-mergekit", action="store_true", help="measure moerge and the floor alone")
    parser.add_argument("--mergekit-runs", type=int, help="rounds that mergekit takes part in (default: all)")
    parser.add_argument("--torch-index", help="package index to install mergekit's torch from, such as PyTorch's for CPUs")
    parser.add_argument("--memory", action="store_true", help="also compare peak memory with a model of twice the size")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", help="file name of the results (default: the size)")
    args = parser.parse_args(arguments)
    if args.memory and args.size not in checkpoints.TWICE:
        parser.error(f"--memory needs a size that has a double: {', '.join(checkpoints.TWICE)}")
    args.name = args.name or args.size
    args.mergekit_runs = args.runs if args.mergekit_runs is None else args.mergekit_runs
    return args


def _bench(args: argparse.Namespace, size: str) -> Bench:
    _say(f"checkpoints of {size}")
    models = checkpoints.make(args.work, size, args.threads)
    commands = None if args.no_mergekit else competitor.environment(args.work / "mergekit", args.torch_index)
    scratch = args.work / "scratch"
    scratch.mkdir(exist_ok=True)
    return Bench(models, scratch, args.threads, commands)


def _memory(args: argparse.Namespace) -> dict[str, Any]:
    twice = checkpoints.TWICE[args.size]
    peaks = [memory(_bench(args, size), args.methods) for size in (args.size, twice)]
    return {
        "once": args.size,
        "twice": twice,
        "peaks": {name: {"once": peaks[0][name], "twice": peaks[1][name]} for name in args.methods},
    }


def _warnings(results: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    from_disk = sorted(
        {
            run["case"]
            for run in results["runs"]
            for floor in run["floor"]
            if floor["disk_read_bytes"] > max(run["input_bytes"] / 100, 1 << 24)
        }
    )
    if from_disk:
        found.append(f"inputs did not stay in the page cache, so the floor read from the disk: {', '.join(from_disk)}")
    if results["runs"][0]["load_before"] > 0.5 * args.threads:
        found.append(f"the machine was not idle at the start (load {results['runs'][0]['load_before']:.1f})")
    if args.runs < 3:
        found.append("fewer than three runs")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
