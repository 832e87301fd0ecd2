"""Parts of a model beside its language model, by the names of their tensors."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

PARTS = {
    "vision": r"vision_tower|visual|vision_model|vision_encoder|multi_modal_projector|mm_projector|embed_vision",
    "audio": r"audio_tower|audio_model|audio_encoder|audio_projector|embed_audio",
    "mtp": r"mtp|mtp_layers|nextn_predict_layers",
    "score": r"score|classifier|qa_outputs",
    "value": r"v_head|value_head",
}
"""What modules are called at the beginning of a name, by the part that they are."""

_START = re.compile(r"(?:model\.)?(\w+)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def part_of(name: str, layers: int | None) -> str:
    """Return the part that a tensor belongs to: one of `PARTS`, or else the module that its name begins with.

    Layers beyond the `layers` of the language model predict further tokens (MTP), as DeepSeek and GLM store them.
    """
    layer = _LAYER.search(name)
    if layer and layers and int(layer[1]) >= layers and layer.start() <= len("model"):
        return "mtp"
    start = _START.match(name)
    module = start[1] if start else name
    return next((part for part, modules in PARTS.items() if re.fullmatch(modules, module)), module)


def means_part(pattern: str, name: str, layers: int | None) -> bool:
    """Return whether `pattern` is the part that a tensor belongs to, a name with `*`, or the beginning of the name up to a
    dot.
    """
    return pattern == part_of(name, layers) or fnmatchcase(name, pattern) or f"{name}.".startswith(f"{pattern}.")
