"""Parts of a model beside its language model, by the names of their tensors."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

PARTS = {
    "vision": (
        r"vision_(tower|model|encoder|backbone|adapter|embed_tokens)|visual|visual_embeddings_table|image_tower|video_tower|embed_vision|"
        r"vqmodel|vpm|high_res_vision_(model|neck|proj)"
    ),
    "projector": (
        r"multi_modal_projector|mm_projector|projector|connector|aligner|merger|resampler|resampler_model|vision_projection|"
        r"language_projection|image_to_text_projection|qformer|query_tokens|image_newline|view_seperator"
    ),
    "audio": r"audio_(tower|model|encoder|projector)|embed_audio",
    "mtp": r"mtp|mtp_layers|nextn_predict_layers",
    "score": r"score|classifier|qa_outputs",
    "value": r"v_head|value_head",
}
"""What modules are called at the beginning of a name, by the part that they are."""
SENSES = ("vision", "projector", "audio")
"""Parts that take in what is no text."""
_WIDER = {"projector": "vision"}
"""Parts that belong to a wider one where nothing is said about themselves."""

_START = re.compile(r"(?:(?:model|thinker)\.)*(\w+)(?:\.|$)")
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
    part = part_of(name, layers)
    return pattern in (part, _WIDER.get(part)) or fnmatchcase(name, pattern) or f"{name}.".startswith(f"{pattern}.")
