"""An adapter checked before it gets its name: peft, asked of a model without values, has a place for each of its tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from moerge.architecture.needed import model_without_values
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError


def check_with_peft(base: Checkpoint, config: bytes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """InputError where peft would look for other tensors than those of these names and shapes; nothing without peft."""
    if find_spec("peft") is None:
        return
    model = model_without_values(base.folders[-1], base.config)
    if model is None:
        return
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(**{key: value for key, value in json.loads(config).items() if key != "peft_type"})
        wrapped: Any = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
        wanted = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(wrapped).items()}
    wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        state = (
            f"shape {list(shapes[name])}, peft wants {list(wanted[name])}"
            if name in shapes.keys() & wanted.keys()
            else ("no place in peft's model" if name in shapes else "a place in peft's model, and is not stored")
        )
        raise InputError(f"peft {peft.__version__}: tensor {name!r} has {state}: choose other --modules")
