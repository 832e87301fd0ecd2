"""Tensors of one model as they are."""

from __future__ import annotations

from typing import ClassVar

from moerge.errors import InputError
from moerge.methods.method import Block, MergeMethod


class Passthrough(MergeMethod):
    """theta = theta_model: the tensors of one model of the recipe, unchanged (mergekit's passthrough).

    `model` is an expert's name or `base`. For overrides that keep, say, one model's embedding, and for a MoE whose backbone is
    the base's alone, as mergekit-moe builds it.

    Not a way to merge anything: what the other models have learned in these tensors is lost.
    """

    name: ClassVar[str] = "passthrough"
    uses_weights: ClassVar[bool] = False
    model: str = "base"

    def merge(self, block: Block) -> None:
        """Never called: a plan copies the tensor. Without a recipe there is no model to name."""
        raise InputError("passthrough takes tensors from one model of a recipe: outside of one, use that model's own")
