"""Checkpoints in other programs' formats, written by those programs' own converters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.checkpoint.reader import open_folder
from moerge.clients import check_result
from moerge.clients.result import Result
from moerge.errors import InputError
from moerge.files import as_path, atomic_path, is_file
from moerge.formatting import Displayed, as_size

CLIENT = "llama.cpp"
CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
"""An environment variable with the folder of llama.cpp."""
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_MAGIC = b"GGUF"


@dataclass(frozen=True, repr=False)
class Exported(Displayed):
    """A file that a converter has written. `warnings` say what its program does otherwise than transformers."""

    file: Path
    nbytes: int
    converter: Path
    warnings: tuple[str, ...] = ()

    def headline(self) -> str:
        """The file and its size."""
        return f"{self.file}, {as_size(self.nbytes)}"

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "file": str(self.file),
            "bytes": self.nbytes,
            "converter": str(self.converter),
            "warnings": list(self.warnings),
        }


def export(
    checkpoint: str | Path, out: str | Path, *, outtype: str = "auto", converter: str | Path | None = None, force: bool = False
) -> Exported:
    """Write a checkpoint as a GGUF file with the converter of the user's own llama.cpp.

    Args:
        checkpoint: The checkpoint's folder.
        out: The file to write.
        outtype: The converter's element type, one of `OUTTYPES`.
        converter: Path of convert_hf_to_gguf.py; by default the one in the folder that LLAMA_CPP names, or on the PATH.
        force: Replace a file that is there.

    Returns:
        The file, and what llama.cpp does otherwise than transformers.

    Raises:
        InputError: llama.cpp cannot run the checkpoint, there is no converter, it refuses, or `out` exists.
    """
    folder, target = open_folder(as_path(checkpoint, "the checkpoint")).folder, as_path(out, "the output").expanduser().absolute()
    if outtype not in OUTTYPES:
        raise InputError(f"unknown element type {outtype!r}: choose one of {', '.join(OUTTYPES)}", code="unknown-name")
    findings = check_result(Result.in_folder(folder), CLIENT)
    fatal = next((finding for finding in findings if finding.effect == "cannot"), None)
    if fatal:
        raise InputError(fatal.sentence, code="client-cannot-run")
    if target.exists() and (target.is_dir() or not force):
        raise InputError(f"{target} already exists: choose another file, or replace it with --force", code="target-exists")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent} to write {target.name} into: make it first", code="not-found")
    program = _converter(converter)
    with atomic_path(target) as beside:
        _convert(program, folder, beside, outtype)
        nbytes = beside.stat().st_size
    return Exported(target, nbytes, program, tuple(f.sentence for f in findings if f.effect in ("differs", "unknown")))


def _converter(given: str | Path | None) -> Path:
    """The converter that was given, or that llama.cpp's folder or the PATH has."""
    home = os.environ.get(VARIABLE, "")
    places = [as_path(given, "the converter").expanduser()] if given else [Path(home) / CONVERTER] if home else []
    for place in places:
        if not is_file(place):
            raise InputError(f"there is no converter {place}: give the path of llama.cpp's {CONVERTER}", code="not-found")
        return place.absolute()
    on_path = shutil.which(CONVERTER)
    if on_path is None:
        raise InputError(
            f"a GGUF file is written by llama.cpp's own {CONVERTER}, which is not on the PATH: "
            f"give its path with --converter, or llama.cpp's folder in {VARIABLE}",
            code="not-found",
        )
    return Path(on_path)


def _convert(program: Path, folder: Path, target: Path, outtype: str) -> None:
    """Run the converter. InputError with its last line where it fails, or writes no GGUF file."""
    command = [sys.executable, str(program), str(folder.absolute()), "--outfile", str(target), "--outtype", outtype]
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = [line.strip() for line in (finished.stderr or finished.stdout).splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {finished.returncode}"
    if finished.returncode != 0:
        raise InputError(f"{program} does not convert {folder}: {reason}")
    try:
        with open(target, "rb") as file:
            written = file.read(len(_MAGIC)) == _MAGIC
    except FileNotFoundError:
        written = False
    if not written:
        raise InputError(f"{program} wrote no GGUF file for {folder}: {reason}")
