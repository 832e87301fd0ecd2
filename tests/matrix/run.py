"""Try moerge in environments of other versions, and write a table of every combination that was tried.

python tests/matrix/run.py --quick                                  a minute; a part of CI
python tests/matrix/run.py --results benchmarks/results/versions    all; torch for CPUs where uv finds it (UV_FIND_LINKS)

Environments are made with uv below --work, and kept. Rows of combinations that are not run now stay in the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from combinations import ALL, OLDEST, QUICK, Combination

ROOT = Path(__file__).parents[2]
SHOWN = ("transformers", "torch", "numpy", "numba", "pydantic", "typer", "click", "rich", "huggingface-hub", "xxhash")


def uv(*arguments: str | Path, **options: Any) -> None:
    done = subprocess.run(["uv", *map(str, arguments)], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[:300])


def environment(combination: Combination, work: Path) -> Path:
    """The interpreter of a new environment with what the combination says."""
    folder = work / combination.name.replace(" ", "-").replace(",", "")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        uv("venv", "--quiet", "--clear", "--python", combination.python, folder)
        extras = f"[{combination.extras}]" if combination.extras else ""
        constraints = ["--constraints", ROOT / "constraints.txt"] if combination.constraints else []
        install = ["pip", "install", "--quiet", "--python", python, "--resolution", combination.resolution, *constraints]
        uv(*install, "--editable", f"{ROOT}{extras}", *combination.packages)
        (folder / "ready").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    code = "import json, importlib.metadata as m; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in SHOWN if name in found}


def tried(combination: Combination, work: Path) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"python": combination.python, "date": datetime.date.today().isoformat()}
    try:
        python = environment(combination, work)
    except RuntimeError as error:
        return {**row, "not_run": str(error)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [python, Path(__file__).with_name(combination.check), folder]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
    row |= {"versions": versions(python), "seconds": round(time.monotonic() - started)}
    try:
        return row | json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        return row | {"checks": {"the script": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}}


def failures(row: dict[str, Any]) -> dict[str, str]:
    return {name: said for name, said in row.get("checks", {}).items() if said != "ok" and not said.startswith("refused")}


def table(rows: dict[str, Any]) -> str:
    lines = ["| combination | Python | versions | checks | outcome |", "|---|---|---|---:|---|"]
    for name, row in rows.items():
        found = ", ".join(f"{package} {number}" for package, number in row.get("versions", {}).items())
        other = {check: what for check, what in row.get("checks", {}).items() if what != "ok"}
        said = "; ".join(f"{check}: {what}".replace("|", "/") for check, what in other.items())
        outcome = f"not run: {row['not_run']}" if "not_run" in row else said or "all right"
        lines.append(f"| {name} | {row['python']} | {found} | {len(row.get('checks', {}))} | {outcome} |")
    same = {json.dumps(row["digests"], sort_keys=True) for row in rows.values() if row.get("digests")}
    return "\n".join(lines) + f"\n\nMerged bytes: {'the same in all' if len(same) == 1 else 'different'}.\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", help="name of a combination; may be repeated")
    parser.add_argument("--work", type=Path, default=ROOT / ".matrix")
    parser.add_argument("--results", type=Path, help="without suffix: a table as .md and everything as .json")
    options = parser.parse_args()
    chosen = QUICK if options.quick else [one for one in ALL if not options.only or one.name in options.only]
    stored = options.results.with_suffix(".json") if options.results else None
    rows = json.loads(stored.read_text()) if stored and stored.exists() else {}
    now = {}
    for combination in chosen:
        now[combination.name] = tried(combination, options.work.absolute())
        print(combination.name, failures(now[combination.name]) or now[combination.name].get("not_run", "ok"), flush=True)
        rows = {one.name: (rows | now)[one.name] for one in ALL if one.name in rows | now}
        if stored:
            stored.write_text(json.dumps(rows, indent=1) + "\n")
            options.results.with_suffix(".md").write_text(table(rows))
    return int(any(failures(row) for row in now.values()) or (options.quick and "not_run" in now[OLDEST.name]))


if __name__ == "__main__":
    sys.exit(main())
