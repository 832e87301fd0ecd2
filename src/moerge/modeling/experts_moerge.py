"""Whole models of transformers as experts: built without their embedding and head, run with what their forward takes.

Shapes as in routing_moerge.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .cache_moerge import MoergeCache
from .routing_moerge import Prompt
from .versions_moerge import (
    CACHES,
    AutoModelForCausalLM,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    PreTrainedModel,
    WeightTransform,
    get_checkpoint_conversion_mapping,
)

_CACHES = (*CACHES, "cache_params")
_STATE_IN_LAYERS = ("recurrent_gemma",)
_LAYER = re.compile(r"\.\d+(?=\.|$)")


class Absent(nn.Module):
    """Stands where an expert had its embedding or head; `width` is what went in or out there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def build_expert(config: Any, number: int) -> PreTrainedModel:
    """An expert of a MoergeHeterogeneousConfig, without its embedding and head if these are shared, else with `vocab_size` rows.

    Raises ValueError for a model without an input embedding or a head.
    """
    shared, expert, name = config.embedding == "shared", config.expert_config(number), config.expert_names[number]
    _check_loading(expert.model_type, name)
    text = expert.get_text_config(decoder=True)
    text.vocab_size = 1 if shared else config.vocab_size
    text.pad_token_id = None  # its own would be some other token's row here, and never learn
    if shared:
        expert.tie_word_embeddings = text.tie_word_embeddings = False
    # sdpa is also what nobody asked for, and not all models have it
    wanted = None if config._attn_implementation == "sdpa" else config._attn_implementation
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(expert, dtype=torch.get_default_dtype(), attn_implementation=wanted)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        missing = "input embedding" if isinstance(head, nn.Linear) else "head"
        raise ValueError(f"expert {name!r} of type {expert.model_type!r} has no {missing} of its own")
    if shared:
        model.set_input_embeddings(Absent(embedding.embedding_dim))
        model.set_output_embeddings(Absent(head.in_features))
    return model


def _of(expert: Any, name: str) -> Any:
    return getattr(expert, name, None) or ()


def _union(name: str) -> property:
    return property(lambda self: {one for expert in self for one in _of(expert, name)})


def _check_loading(model_type: str, name: str) -> None:
    """ValueError where checkpoints of a family store other tensors than its modules have, and transformers looks at no prefix."""
    if get_checkpoint_conversion_mapping(model_type) and not hasattr(WeightTransform, "scope_prefix"):
        found = f"of type {model_type!r} inside another model needs a newer transformers than {transformers.__version__}"
        raise ValueError(f"expert {name!r} {found}: pip install --upgrade transformers")


class Experts(nn.ModuleList):
    """The experts, with what transformers reads off a model's direct children and would not find in a list of models."""

    _keep_in_fp32_modules = _union("_keep_in_fp32_modules")
    _keep_in_fp32_modules_strict = _union("_keep_in_fp32_modules_strict")
    _no_split_modules = _union("_no_split_modules")
    _skip_keys_device_placement = _union("_skip_keys_device_placement")
    _keys_to_ignore_on_load_unexpected = _union("_keys_to_ignore_on_load_unexpected")
    _keys_to_ignore_on_load_missing = _union("_keys_to_ignore_on_load_missing")

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        return {f"{number}.{name}" for number, expert in enumerate(self) for name in _of(expert, "_keys_to_ignore_on_save")}

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Tied tensors and what they are tied to."""
        return {
            f"{number}.{tied}": f"{number}.{source}"
            for number, expert in enumerate(self)
            for tied, source in expert.all_tied_weights_keys.items()
        }

    @property
    def _fsdp_plan(self) -> dict[str, str]:
        """Return the FSDP2 plan for the experts: tied modules would be sharded twice, so that their holder is sharded as a
        whole.
        """
        plan: dict[str, str] = {}
        left_out: set[str] = set()
        for expert in self:
            modules = {_LAYER.sub(".*", name): module for name, module in expert.named_modules()}
            ties = {name.rpartition(".")[0] for tie in expert.all_tied_weights_keys.items() for name in tie}
            for name, style in dict(_of(expert, "_fsdp_plan")).items():
                if name in ties or isinstance(modules.get(name), Absent):
                    left_out.add(f"*.{name}")
                elif name in modules:
                    plan[f"*.{name}"] = style
        return {name: style for name, style in plan.items() if name not in left_out}


@cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _takes(model: Any) -> frozenset[str]:
    """The names of what a model's forward takes."""
    kind: Any = type(model)
    return _parameters(kind)


def keeps_cache(expert: PreTrainedModel) -> bool:
    """Return whether an expert can go on from the tokens that it has seen."""
    return expert.config.model_type not in _STATE_IN_LAYERS and bool(_takes(expert) & set(_CACHES))


def body(expert: PreTrainedModel) -> PreTrainedModel:
    """An expert's part without its head."""
    own: Any = expert.base_model
    if own is expert:
        own = next(child for child in expert.children() if isinstance(child, PreTrainedModel))
    found: PreTrainedModel = own
    return found


class ExpertLane:
    """The cache of one expert, of whatever class its own forward makes at the first call; it counts tokens itself."""

    def __init__(self, expert: PreTrainedModel) -> None:
        self.cache: Any = None
        self.length = 0
        self._config = expert.config.get_text_config(decoder=True)

    def reorder_cache(self, rows_R: Tensor) -> None:
        """Keep these rows, in this order; rows may repeat."""
        if self.length:
            self.cache.reorder_cache(rows_R)

    def steps(self, prompt: Prompt) -> bool:
        """True where the expert goes on with several tokens and has to take them one by one: states begin anew otherwise."""
        return bool(self.length) and prompt.position_ids_BT.shape[1] > 1 and not self._only_attention

    @property
    def _only_attention(self) -> bool:
        layers = getattr(self.cache, "layers", None)
        return layers is not None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget as many of the last tokens as this number, which is not positive, says; before 5.20 a positive one stays."""
        if not self.is_croppable:
            raise ValueError("an expert's states cannot be taken back: generate without assistance")
        if self.length:
            self.cache.crop(tokens_to_remove)
            self.length = min(tokens_to_remove, self.length) if tokens_to_remove > 0 else self.length + tokens_to_remove

    def activate_past_recording(self) -> None:
        """Keep what sliding windows would drop, so that `crop` can go back; from the first token on, as `generate` would."""
        if self.cache is None:
            self.cache = DynamicCache(config=self._config)
        self.cache.activate_past_recording()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that it has seen."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: none."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Return whether `crop` leaves no trace."""
        return self.cache is None or bool(getattr(self.cache, "is_croppable", self._only_attention))

    @property
    def is_sliding(self) -> list[bool]:
        """Return, layer by layer, whether it slides."""
        return list(getattr(self.cache, "is_sliding", ()))

    def __len__(self) -> int:
        return 0 if self.cache is None else len(self.cache)


class MoergeHeterogeneousCache(MoergeCache):
    """The cache of every chosen expert, each with only the rows that it computes, and the routing that chose them."""

    def __init__(self, experts: Sequence[PreTrainedModel]) -> None:
        super().__init__(None)
        self._experts = experts

    def new_lane(self, expert: int = 0) -> ExpertLane:
        """A lane that the expert's forward will fill."""
        lane = ExpertLane(self._experts[expert])
        if self._record_past:
            lane.activate_past_recording()
        return lane


def expert_logits(model: PreTrainedModel, prompt: Prompt, lane: ExpertLane | None, keep: slice | Tensor) -> Tensor:
    """An expert's own logits at the positions to keep, with all that its own forward does to them."""
    some = {"logits_to_keep": -(keep.start or 0) if isinstance(keep, slice) else keep}
    if "logits_to_keep" not in _takes(model) or (lane is not None and lane.steps(prompt)):
        some = {}
    logits = run_expert(model, "logits", prompt, lane, input_ids=prompt.ids_BT, **some)
    return logits if some else logits[:, keep]


def run_expert(model: PreTrainedModel, output: str, prompt: Prompt, lane: ExpertLane | None, **inputs: Any) -> Tensor:
    """An output of an expert, or of its part without a head; it fills the lane. Only what its forward takes is passed."""
    length = prompt.position_ids_BT.shape[1]
    if lane is not None and lane.steps(prompt):
        steps = []
        for token in range(length):
            now = {name: value[:, token : token + 1] for name, value in inputs.items()}
            steps.append(run_expert(model, output, prompt.between(token, token + 1), lane, **now))
        return torch.cat(steps, 1)
    takes = _takes(model)
    given = {"attention_mask": prompt.mask, "position_ids": prompt.position_ids_BT, **inputs}
    given = {name: value for name, value in given.items() if name in takes}
    if "use_cache" in takes or "kwargs" in takes:
        given["use_cache"] = lane is not None
    name = next((name for name in _CACHES if name in takes), None)
    if lane is not None and name is not None:
        given[name] = lane.cache
        if lane.length and prompt.mask is not None and (name == "cache_params" or all(getattr(lane.cache, "is_linear", [False]))):
            given["attention_mask"] = prompt.mask[:, -length:]  # states want only the present tokens
    out = model(**given, return_dict=True)
    if lane is not None and name is not None:
        lane.cache = out.get(name)
        if lane.cache is None:
            raise ValueError(f"an expert of type {model.config.model_type!r} gives back no cache: pass use_cache=False")
        lane.length += length
    found: Tensor = out[output]
    return found
