"""Recipes: what the user wants."""

from moerge.recipe.loading import load_recipe
from moerge.recipe.schema import Expert, MoE, Override, Recipe

__all__ = ["Expert", "MoE", "Override", "Recipe", "load_recipe"]
