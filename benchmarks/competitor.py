"""mergekit in an environment of its own, so that neither side's dependencies disturb the other's."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5", "transformers==5.23.0")


def environment(folder: Path, torch_index: str | None) -> Path:
    """The folder of mergekit's commands, after installing it once."""
    commands = folder / "bin"
    ready = folder / "requirements.json"
    if not ready.exists() or tuple(json.loads(ready.read_text())) != REQUIREMENTS:
        print(f"installing {', '.join(REQUIREMENTS)} into an environment of their own", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        pip = [commands / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        if torch_index:
            subprocess.run([*pip, "--index-url", torch_index, REQUIREMENTS[0]], check=True)
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        ready.write_text(json.dumps(REQUIREMENTS))
    return commands
