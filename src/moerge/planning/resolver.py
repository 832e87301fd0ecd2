"""The method and weights of each tensor."""

from __future__ import annotations

import re
from dataclasses import replace

from moerge.errors import InputError, suggest
from moerge.methods.average import Linear
from moerge.recipe.rules import MethodChoice, TensorContext
from moerge.recipe.schema import Recipe

_CORRECTION = re.compile(r"(^|\.)(e_score_correction_bias|expert_bias)$")
"""What families call the bias that balances how often a router chooses each expert."""


class MethodResolver:
    """Asks the recipe's rules in order; the first that knows a tensor decides."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._unused = {rule.pattern: None for rule in recipe.rules if rule.pattern}
        self._roles: dict[str, None] = {}

    def choose(self, context: TensorContext) -> MethodChoice:
        """The method for one tensor, and the weight of each expert."""
        self._roles[_general(context.role) or context.name] = None
        for rule in self._recipe.rules:
            choice = rule.choose(context)
            if choice is not None:
                self._unused.pop(rule.pattern, None)
                if not rule.pattern and choice.method.uses_task_vectors and self._corrects_routing(context):
                    choice = replace(choice, method=Linear())
                weights = {name: expert.weight for name, expert in self._recipe.experts.items()}
                return replace(choice, weights={**weights, **choice.weights})
        raise AssertionError(f"no rule for {context.name}: the last one should know every tensor")

    def _corrects_routing(self, context: TensorContext) -> bool:
        """Return whether a tensor is such a bias, and the recipe no other program's, whose merges are its own.

        It is set by counting tokens and not by gradients, so its differences from the base are no task vector: signs, magnitudes
        and random masks say nothing about it.
        """
        return self._recipe.settings is None and bool(_CORRECTION.search(context.name))

    def dtype(self, context: TensorContext) -> str | None:
        """The element type that an override gives a tensor, merged or copied; None where none does."""
        for rule in self._recipe.rules:
            choice = rule.choose(context) if rule.pattern else None
            if choice is not None:
                if choice.dtype is not None:
                    self._unused.pop(rule.pattern, None)
                return choice.dtype
        return None

    def check_all_used(self) -> None:
        """InputError if an override matched no tensor that is merged: most likely a slip."""
        for pattern in self._unused:
            line = next((override.line for override in self._recipe.overrides if override.match == pattern), None)
            where = f"{self._recipe.source}{f', line {line}' if line else ''}: merge.overrides"
            raise InputError(
                f"{where}: {pattern!r} matches no tensor that is merged, {suggest(pattern, list(self._roles))}",
                code="unknown-name",
            )


def _general(role: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", role)
