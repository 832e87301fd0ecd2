"""A merge method from a plain function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import create_model

from moerge.methods.method import METHODS, Block, MergeMethod, TaskVectorMethod

Formula = Callable[..., np.ndarray]


def method(formula: Formula | None = None, *, name: str | None = None, task_vectors: bool = False) -> Any:
    """Register a function as a merge method, so that recipes and `merge_state_dicts` can name it.

        @moerge.method
        def trimmed_mean(theta_EN, weights_E, *, cut: float = 0.1): ...

    The function is called with one block of every tensor after another, from several threads: it has to be a pure function of
    its arguments, element by element.

    Args:
        formula: Takes the experts' values float32 [E experts, N elements] and their weights float32 [E], and returns the merged
            values [N]. Its keyword-only arguments, with annotations and defaults, are the method's hyperparameters.
        name: The method's name; by default the function's.
        task_vectors: Pass the experts' differences to the base instead, and add `scale` (a hyperparameter that the method gets)
            times the returned values to the base.

    Returns:
        The method's class, a subclass of `MergeMethod`.
    """
    if formula is None:
        return lambda given: method(given, name=name, task_vectors=task_vectors)
    parameters = [p for p in inspect.signature(formula, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default) for p in parameters
    }

    def apply(self: MergeMethod, block: Block) -> None:
        block.out_N[:] = formula(block.theta_EN, block.weights_E, **{key: getattr(self, key) for key in fields})

    base: type[MergeMethod] = TaskVectorMethod if task_vectors else MergeMethod
    label = name or formula.__name__
    made = create_model(label, __base__=base, __doc__=formula.__doc__, __module__=formula.__module__, **fields)
    made.name = label
    setattr(made, "combine" if task_vectors else "merge", apply)
    METHODS.register(label, made)
    return made
