"""Names that peft has for tensors: those in memory, which for models of several modalities are not those in files."""

from __future__ import annotations

from collections.abc import Mapping

from moerge.architecture.needed import names_in_memory
from moerge.checkpoint.module_names import Names
from moerge.checkpoint.reader import Checkpoint
from moerge.extras import require
from moerge.planning.plan import Plan


def is_multimodal(model: Checkpoint) -> bool:
    """Return whether a language model is only a part of it."""
    return any(isinstance(model.config.get(key), Mapping) for key in ("text_config", "vision_config", "llm_config"))


def names_for_peft(plan: Plan) -> dict[str, str]:
    """The names in memory of the plan's tensors, by their names in files.

    What several tensors are one of there has no name. Raises InputError where only transformers knows them and is not installed.
    """
    base, stored = plan.models[0], [output.name for output in plan.outputs]
    if not is_multimodal(base):
        return {name: name for name in stored}
    require("models", f"{base.folder}: naming the modules of a model of several modalities as peft does")
    known = names_in_memory(base.folders[-1], base.config)
    if known is None:  # code of its own, which loads its files as they are
        return {name: name for name in stored}
    names = Names(known)
    return {name: own for name in stored if (own := names.find(name))}
