"""moerge: one model out of many fine-tuned ones.

    import moerge
    plan = moerge.plan("recipe.yaml")
    moerge.merge(plan, "out")
    merged = moerge.merge_state_dicts(base, [a, b], method="ties", density=0.8)

Names are loaded when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moerge.comparison import compare
    from moerge.demonstration import demo
    from moerge.errors import InputError, MachineError, MoergeError
    from moerge.evaluation import evaluate
    from moerge.exporting import export
    from moerge.extension import extend
    from moerge.extraction.adapters import merge_adapters
    from moerge.extraction.extract import extract
    from moerge.gather.gather import stats
    from moerge.hub import push
    from moerge.inference.generation import generate
    from moerge.inference.routes import route
    from moerge.inspection import inspect, verify
    from moerge.learning.run import learn
    from moerge.merging.pipeline import MergeResult, merge, plan
    from moerge.merging.state_dicts import merge_state_dicts
    from moerge.methods.function import method
    from moerge.methods.method import merge_methods
    from moerge.planning.plan import Plan
    from moerge.progress import Progress
    from moerge.recipe import Recipe, load_recipe
    from moerge.reduction.run import reduce
    from moerge.renewal import refresh
    from moerge.reporting import report
    from moerge.searching.run import search
    from moerge.tuning.run import tune

    __version__: str

_HOMES = {
    "InputError": "moerge.errors",
    "MachineError": "moerge.errors",
    "MergeResult": "moerge.merging.pipeline",
    "MoergeError": "moerge.errors",
    "Plan": "moerge.planning.plan",
    "Progress": "moerge.progress",
    "Recipe": "moerge.recipe",
    "compare": "moerge.comparison",
    "demo": "moerge.demonstration",
    "evaluate": "moerge.evaluation",
    "export": "moerge.exporting",
    "extend": "moerge.extension",
    "extract": "moerge.extraction",
    "generate": "moerge.inference.generation",
    "inspect": "moerge.inspection",
    "learn": "moerge.learning.run",
    "load_recipe": "moerge.recipe",
    "merge": "moerge.merging.pipeline",
    "merge_adapters": "moerge.extraction.adapters",
    "merge_state_dicts": "moerge.merging.state_dicts",
    "method": "moerge.methods.function",
    "merge_methods": "moerge.methods.method",
    "plan": "moerge.merging.pipeline",
    "push": "moerge.hub",
    "reduce": "moerge.reduction.run",
    "refresh": "moerge.renewal",
    "report": "moerge.reporting",
    "route": "moerge.inference.routes",
    "search": "moerge.searching.run",
    "stats": "moerge.gather.gather",
    "tune": "moerge.tuning.run",
    "verify": "moerge.inspection",
}

__all__ = [
    "InputError",
    "MachineError",
    "MergeResult",
    "MoergeError",
    "Plan",
    "Progress",
    "Recipe",
    "__version__",
    "compare",
    "demo",
    "evaluate",
    "export",
    "extend",
    "extract",
    "generate",
    "inspect",
    "learn",
    "load_recipe",
    "merge",
    "merge_adapters",
    "merge_methods",
    "merge_state_dicts",
    "method",
    "plan",
    "push",
    "reduce",
    "refresh",
    "report",
    "route",
    "search",
    "stats",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moerge")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
