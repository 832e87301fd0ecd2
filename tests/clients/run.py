"""Whether merged checkpoints run in other programs, with the probabilities and the greedy text of transformers.

    moerge demo --out DEMO
    python tests/clients/run.py DEMO [--only llama.cpp ...] [--results benchmarks/results/clients.md]

Each client gets an environment of its own below --work, which is kept, and so are its answers. Not part of the tests: it
downloads and compiles packages. The exit code is 1 where a client does something else than `moerge plan --for CLIENT` says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import environments
import protocol
from cases import write_cases
from environments import LLAMA, OPENVINO, VLLM, Environment, transformers

from moerge.clients import check_folder

HERE = Path(__file__).parent
TOLERANCE = 1e-3
"""Of probabilities where all is computed in float32: far above its rounding, and below any other difference that was seen."""


@dataclass(frozen=True)
class Client:
    """`name` as `moerge plan --for` calls it; `exact` where it computes in float32, so that it must agree.

    Without an environment of its own it runs in this one.
    """

    name: str
    script: str
    setting: str
    exact: bool = True
    environment: Environment | None = None

    @property
    def file(self) -> str:
        return f"{self.name}-{self.setting}"

    @property
    def label(self) -> str:
        return f"{self.name}, {'float32' if self.exact else 'its defaults'}"

    def python(self, work: Path) -> Path:
        return self.environment.python(work) if self.environment else Path(sys.executable)


REFERENCE = Client("reference", "run_transformers.py", "float32")
CLIENTS = (
    Client("llama.cpp", "run_llama_cpp.py", "f32", True, LLAMA),
    Client("llama.cpp", "run_llama_cpp.py", "auto", False, LLAMA),
    Client("openvino", "run_openvino.py", "f32", True, OPENVINO),
    Client("openvino", "run_openvino.py", "default", False, OPENVINO),
    Client("vllm", "run_vllm.py", "float32", True, VLLM),
    Client("vllm", "run_vllm.py", "auto", False, VLLM),
    Client("transformers", "run_transformers.py", "float32", True, OPENVINO),  # 5.5.4
    Client("transformers-4", "run_transformers.py", "float32", True, transformers("4.57.6")),
)


NOTED = {
    *(("openvino", f"random-dense-{kind}") for kind in ("gemma", "gemma2", "gemma3_text")),
    *((client, "random-dense-gemma2") for client in ("transformers", "transformers-4")),
}
"""What moerge notes to need another version, or another setting, than it gets here."""


@dataclass(frozen=True)
class Row:
    """What a client did with a case: a comparison, or why it failed; and what moerge had said about it."""

    client: Client
    case: str
    versions: str
    found: protocol.Comparison | None
    failure: str
    predicted: str

    @property
    def outcome(self) -> str:
        if self.found is None:
            return "cannot"
        return "runs" if self.found.agrees and self.found.difference <= TOLERANCE else "differs"

    @property
    def surprising(self) -> bool:
        if (self.client.name, self.case) in NOTED:
            return False
        return (self.client.exact or self.found is None) and self.outcome != self.predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--work", type=Path, default=Path("clients-work"))
    parser.add_argument("--only", nargs="+", default=sorted({client.name for client in CLIENTS}))
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    cases = list(write_cases(arguments.demo, arguments.work / "cases"))
    start(REFERENCE, unanswered(REFERENCE, cases), arguments.work)
    rows = []
    for client in CLIENTS:
        if client.name in arguments.only:
            for row in measure(client, cases, arguments.work):
                rows.append(row)
                print(" | ".join(cells(row)) + ("   <- not what moerge says" if row.surprising else ""), flush=True)
    if arguments.results:
        arguments.results.write_text(markdown(rows))
    sys.exit("a client does something else than moerge says" if any(row.surprising for row in rows) else 0)


def measure(client: Client, cases: Sequence[protocol.Case], work: Path) -> Iterator[Row]:
    """Run a client on all cases; what it answered is kept for the next time."""
    new = unanswered(client, cases)
    start(client, convert(client, new, work) if client.name == "llama.cpp" else new, work)
    for case in cases:
        name, predicted = case.folder.name, check_folder(case.model, client.name)
        if unanswered(client, [case]):
            yield Row(client, name, "", None, (case.folder / f"{client.file}.failed").read_text(), predicted)
            continue
        found, reference = load(case, client), load(case, REFERENCE)
        yield Row(client, name, found.versions, protocol.compare(found, reference, case.prompts), "", predicted)


def convert(client: Client, cases: Sequence[protocol.Case], work: Path) -> list[protocol.Case]:
    """Make SETTING.gguf of every case; the cases for which that succeeded."""
    python, source, converted = client.python(work), environments.llama_cpp_source(work), []
    for case in cases:
        gguf = case.folder / f"{client.setting}.gguf"
        failed = None
        if not gguf.exists():
            failed = environments.run(python, HERE / "convert_llama_cpp.py", source, case.model, gguf, client.setting)
        if failed is None:
            converted.append(case)
        else:
            (case.folder / f"{client.file}.failed").write_text(f"conversion: {failed}")
    return converted


def start(client: Client, cases: Sequence[protocol.Case], work: Path) -> None:
    """One process for all cases; where it dies, another one goes on after the case that it died of."""
    if not cases:
        return
    for case in cases:
        (case.folder / f"{client.file}.failed").unlink(missing_ok=True)
    died = environments.run(client.python(work), HERE / client.script, client.setting, client.file, *(c.folder for c in cases))
    left = [case for case in unanswered(client, cases) if not (case.folder / f"{client.file}.failed").exists()]
    if left:
        (left[0].folder / f"{client.file}.failed").write_text(died or "no answer")
        start(client, left[1:], work)


def unanswered(client: Client, cases: Sequence[protocol.Case]) -> list[protocol.Case]:
    return [case for case in cases if not (case.folder / f"{client.file}.json").exists()]


def load(case: protocol.Case, client: Client) -> protocol.Answer:
    return protocol.Answer(**json.loads((case.folder / f"{client.file}.json").read_text()))


def cells(row: Row) -> tuple[str, str, str, str, str]:
    predicted = "runs, with a note" if (row.client.name, row.case) in NOTED else row.predicted
    if row.found is None:
        return row.client.label, row.case, "cannot", row.failure.replace("|", "/")[:140], predicted
    first = "equal" if row.found.first is None else f"differ from token {row.found.first + 1}"
    tokens = "; tokenizer differs" if row.found.same_tokens is False else ""
    return row.client.label, row.case, f"{row.found.difference:.1e}", first + tokens, predicted


def markdown(rows: Sequence[Row]) -> str:
    versions = ", ".join(sorted({row.versions for row in rows if row.versions}))
    return "\n".join(
        (
            "# Merged checkpoints in other programs",
            "",
            f"`python tests/clients/run.py` on {date.today()}: {versions}; reference: transformers in float32. [What is",
            "measured](../../tests/clients/README.md), and [what it means](../../docs/clients.md).",
            "",
            "| client | checkpoint | largest difference of probabilities | 32 greedy tokens of 8 prompts | `plan --for` says |",
            "|---|---|---:|---|---|",
            *(f"| {' | '.join(cells(row))} |" for row in rows),
            "",
        )
    )


if __name__ == "__main__":
    main()
