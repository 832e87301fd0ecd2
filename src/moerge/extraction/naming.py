"""Names that peft has for tensors: those in memory, which for models of several modalities are not those in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from moerge.architecture.needed import names_in_memory
from moerge.checkpoint.fused_experts import expert_parameters
from moerge.checkpoint.module_names import Names
from moerge.checkpoint.reader import Checkpoint
from moerge.extras import require
from moerge.planning.plan import Plan


def is_multimodal(model: Checkpoint) -> bool:
    """Return whether a language model is only a part of it."""
    return any(isinstance(model.config.get(key), Mapping) for key in ("text_config", "vision_config", "llm_config"))


@dataclass(frozen=True)
class ModuleNames:
    """The names in memory of tensors, by their names in files; and all that are known of there, none where both are alike."""

    by_file: Mapping[str, str]
    memory: tuple[str, ...] = ()


def names_for_peft(plan: Plan) -> ModuleNames:
    """The names of the plan's tensors in memory, which differ in models of several modalities, in mixtures and derived families.

    What several tensors are one of there has no name. Raises InputError where only transformers knows them and is not installed.
    """
    base, stored, family = plan.models[0], [output.name for output in plan.outputs], plan.family
    same = ModuleNames({name: name for name in stored})
    derived = family is not None and bool(family.source)
    if is_multimodal(base):
        require("models", f"{base.folder}: naming the modules of a model of several modalities as peft does")
    elif not (derived or expert_parameters(base.tensors)) or not (find_spec("transformers") and find_spec("torch")):
        return same
    known = names_in_memory(base.folders[-1], base.config)
    if known is None:  # code of its own, which loads its files as they are
        return same
    names = Names(known)
    spelled = {name: (family and family.name_in_memory(name)) or name for name in stored}
    return ModuleNames({name: own for name in stored if (own := names.find(spelled[name]))}, known)
