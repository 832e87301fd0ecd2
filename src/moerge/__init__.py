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
    from moerge.errors import InputError, MachineError, MoergeError
    from moerge.inspection import inspect, verify
    from moerge.merging.pipeline import MergeResult, merge, plan
    from moerge.merging.state_dicts import merge_state_dicts
    from moerge.planning.plan import Plan
    from moerge.recipe import Recipe, load_recipe

    __version__: str

_HOMES = {
    "InputError": "moerge.errors",
    "MachineError": "moerge.errors",
    "MoergeError": "moerge.errors",
    "MergeResult": "moerge.merging.pipeline",
    "Plan": "moerge.planning.plan",
    "Recipe": "moerge.recipe",
    "inspect": "moerge.inspection",
    "load_recipe": "moerge.recipe",
    "merge": "moerge.merging.pipeline",
    "merge_state_dicts": "moerge.merging.state_dicts",
    "plan": "moerge.merging.pipeline",
    "verify": "moerge.inspection",
}

__all__ = [
    "InputError",
    "MachineError",
    "MergeResult",
    "MoergeError",
    "Plan",
    "Recipe",
    "inspect",
    "load_recipe",
    "merge",
    "merge_state_dicts",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moerge")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moerge' has no attribute {name!r}")
