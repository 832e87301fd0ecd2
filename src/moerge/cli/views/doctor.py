"""Print results of `moerge doctor`."""

from __future__ import annotations

from moerge.cli.console import Table, show_table, view
from moerge.doctor import Dependency, Diagnosis, Extra, Folder
from moerge.formatting import as_size


@view
def diagnosis(state: Diagnosis) -> None:
    """Print a diagnosis."""
    table = Table("", "")
    table.show_header = False
    table.add_row("moerge", state.moerge)
    table.add_row("Python", state.python)
    table.add_row("system", state.system)
    table.add_row("core", _packages(state.core))
    for extra in state.extras:
        table.add_row(f"extra {extra.name}", _packages(extra))
    table.add_row("threads", str(state.threads))
    table.add_row("GPU", ", ".join(state.gpus) or f"none: {state.gpu_note}")
    table.add_row("Hub cache", _folder(state.caches["hub"]))
    table.add_row("kernel cache", _folder(state.caches["kernels"]))
    table.add_row("sandbox", state.sandbox_note)
    show_table(table)


def _packages(extra: Extra) -> str:
    installed = ", ".join(f"{dependency.name} {dependency.installed}" for dependency in extra.dependencies if dependency.met)
    if not extra.missing:
        return installed
    return f"missing {', '.join(map(_missing, extra.missing))}: {extra.command}"


def _missing(dependency: Dependency) -> str:
    wanted = f"{dependency.name}{dependency.wanted}"
    return f"{wanted} ({dependency.installed} is installed)" if dependency.installed else wanted


def _folder(folder: Folder | None) -> str:
    if folder is None:
        return "none can be written: each process compiles its kernels"
    state = "" if folder.writable else ", not writable"
    return f"{folder.path} ({as_size(folder.free_bytes)} free{state})"
