"""What the core promises, end to end on tiny checkpoints: run in an environment that has moerge and its own dependencies only.

python core.py FOLDER          prints a JSON object: check -> "ok" or what went wrong; digests of the merged weights with it
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.tiny import EXPERTS, make_models, write_recipe

EXPERT_NAMES = {name: name for name in EXPERTS}


def moerge(*arguments: object, code: int = 0) -> str:
    """Run a command as a user would; what it printed. AssertionError for another exit code, a traceback or a deprecation."""
    command = [sys.executable, "-m", "moerge", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stderr + done.stdout
    assert done.returncode == code, f"exit code {done.returncode}: {said.strip().splitlines()[-1:]}"
    assert "Traceback" not in said, said.strip().splitlines()[-1]
    ours = [line for line in done.stderr.splitlines() if "deprecat" in line.lower()]
    assert not ours, ours[0]
    return done.stdout


def digest(folder: Path) -> str:
    return str(json.loads((folder / "moerge.json").read_text())["tensors"]["model.layers.0.mlp.down_proj.weight"])


def checks(work: Path) -> dict[str, Callable[[], object]]:
    make_models(work)
    dense = write_recipe(work, "dense.yaml", merge={"method": "ties", "density": 0.8})
    mixture = write_recipe(work, "mixture.yaml", merge={"method": "average"}, moe={"router": {"kind": "random"}})
    routed = write_recipe(work, "routed.yaml", merge={"method": "average"}, moe={"format": "moerge"})

    def merged(recipe: Path, out: Path) -> None:
        moerge("plan", recipe)
        moerge("merge", recipe, out)
        assert json.loads(moerge("verify", out, "--json"))["intact"]
        moerge("inspect", out)

    return {
        "help": lambda: moerge("--help"),
        "dense merge": lambda: merged(dense, work / "dense"),
        "Mixtral": lambda: merged(mixture, work / "mixture"),
        "sequence-routed": lambda: merged(routed, work / "routed"),
        "refresh": lambda: moerge("refresh", work / "routed"),
        "compare": lambda: moerge("compare", dense),
        "extract": lambda: moerge("extract", work / EXPERTS[0], work / "lora", "--base", work / "base", "--rank", "4"),
        "a wrong recipe": lambda: moerge("plan", work / "absent.yaml", code=2),
    }


def main(work: Path) -> None:
    results = {}
    for name, check in checks(work).items():
        try:
            check()
            results[name] = "ok"
        except Exception as error:  # a table has a row for everything that can go wrong
            results[name] = f"{type(error).__name__}: {error}"[:300]
    tensors = json.loads((work / "dense" / "moerge.json").read_text())["tensors"] if (work / "dense").exists() else {}
    json.dump({"checks": results, "digests": tensors}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
