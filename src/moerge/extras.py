"""Optional dependencies: one sentence for an extra that is not installed."""

from __future__ import annotations

from importlib import import_module

from moerge.errors import InputError

_MODULES = {
    "models": ("torch", "transformers"),
    "tune": ("accelerate", "torch", "transformers"),
    "gguf": ("gguf", "torch", "transformers"),
    "report": ("jinja2",),
    "search": ("optuna",),
    "images": ("PIL",),
}


def require(extra: str, what: str, *modules: str) -> None:
    """Import `modules`, by default the main ones of this extra.

    Raises InputError, which says that `what` needs the missing module, and how to install the extra.
    """
    try:
        for module in modules or _MODULES[extra]:
            import_module(module)
    except ImportError as error:
        raise InputError(f"{what} needs {error.name or error}: pip install 'moerge[{extra}]'", code="missing-extra") from None
