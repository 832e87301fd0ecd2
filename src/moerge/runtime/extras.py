"""Optional dependencies: one sentence where an extra is not installed."""

from __future__ import annotations

from moerge.errors import InputError


def require_models_extra(what: str) -> None:
    """InputError where what models run on is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{what} runs the merged model, which needs {error.name}: pip install 'moerge[models]'", code="missing-extra"
        ) from None
