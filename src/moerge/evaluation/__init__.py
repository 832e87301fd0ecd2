"""Evaluation of checkpoints: the MergeME paper's six benchmarks, and perplexity of held-out text, with their errors.

Names are loaded when they are used: the sandbox is there without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moerge.evaluation.benchmarks import BENCHMARKS
    from moerge.evaluation.result import Difference, Evaluation, Score
    from moerge.evaluation.run import Settings, evaluate

__all__ = ["BENCHMARKS", "Difference", "Evaluation", "Score", "Settings", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = (import_module(f"moerge.evaluation.{home}") for home in ("result", "benchmarks", "run"))
    return next(getattr(home, name) for home in homes if hasattr(home, name))
