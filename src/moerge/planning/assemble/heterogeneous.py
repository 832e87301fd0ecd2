"""Experts that stay whole models, of whatever architecture, on one vocabulary (MergeME, section 3.2).

The experts' tensors are copied. With a shared embedding and head, these are averages of the experts' rows for each token, padded
with zeros to the largest width, and projectors lead into and out of every expert; else every expert keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moerge.architecture import ExpectedTensor, family_of
from moerge.architecture.config import STRUCTURAL, normalized_config, portable_config
from moerge.architecture.heterogeneous import expert_tensors, heterogeneous_gate, projector_config, shared_tensors
from moerge.architecture.sequence import HETEROGENEOUS
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.modeling import HETEROGENEOUS_AUTO_MAP
from moerge.operations.operations import Copy, Merge, Operation, Output
from moerge.planning.assemble.common import Assembled, Assembly
from moerge.planning.assemble.experts import HeterogeneousExpert, heterogeneous_experts, resolve_tokenizer
from moerge.planning.vocab.match import ResolvedVocabulary
from moerge.projectors.outputs import projector_outputs
from moerge.recipe.document import dotted
from moerge.recipe.heterogeneous import conflicting_key
from moerge.recipe.schema import MoE, Recipe
from moerge.routers.sequence import LearnedSequenceRouter, RandomSequenceRouter, SequenceRouter
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.source import Source
from moerge.tensors.tensor import ArrayTensor, Tensor
from moerge.tensors.views.rounded import rounded

_CLASS = "MoergeHeterogeneousForCausalLM"
_NOT_WRITTEN = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype")


def is_heterogeneous(recipe: Recipe, models: Sequence[Checkpoint]) -> bool:
    """Return whether this recipe's experts stay whole models: it says so, or it routes sequences and they are too different."""
    if recipe.moe is None or not recipe.moe.by_sequence:
        return False
    return recipe.moe.asks_for_heterogeneous or differ_in_architecture(models)


def differ_in_architecture(models: Sequence[Checkpoint]) -> bool:
    """Return whether these models differ in type or shape, so that they cannot be merged tensor by tensor."""
    if len({model.model_type for model in models}) > 1:
        return True
    configs = [normalized_config(model.config, family_of(model.config)) for model in models]
    return any(config.get(key) != configs[0].get(key) for key in STRUCTURAL - {"vocab_size"} for config in configs[1:])


def settle(recipe: Recipe) -> Recipe:
    """The recipe with what whole models make of its keys. InputError for a key that does not go with them.

    `random` and `learned` both draw a gate, which is what the paper starts from.
    """
    problem, moe = conflicting_key(recipe), recipe.moe
    assert moe is not None
    if problem:
        raise InputError(f"{recipe.source}: {dotted(problem[0])}{problem[1]}")
    changes: dict[str, Any] = {}
    if isinstance(moe.router, RandomSequenceRouter):
        changes["router"] = LearnedSequenceRouter(temperature=moe.router.temperature, seed=moe.router.seed)
    if "top_k" not in moe.model_fields_set:
        changes["top_k"] = min(moe.top_k, len(recipe.expert_names))
    return recipe.model_copy(update={"moe": moe.model_copy(update=changes)})


def assemble_heterogeneous(
    recipe: Recipe, models: Sequence[Checkpoint], dtype: DType, *, tokenizer: str
) -> tuple[Assembled, ResolvedVocabulary]:
    """The model, and the vocabulary of `tokenizer`'s that all experts get. `recipe` is settled.

    Raises InputError for what is no decoder-only model, and where vocabularies have nothing in common.
    """
    by_name = {model.name: model for model in models}
    experts = heterogeneous_experts([by_name[name] for name in recipe.expert_names], by_name[tokenizer])
    building = _Building(recipe, experts, by_name[tokenizer], dtype)
    outputs = building.outputs()
    notes = (*building.notes(), *building.assembly.precision.notes(outputs))
    made = Assembled(building.config(), outputs, recipe.expert_names, building.warnings(), notes)
    return made, resolve_tokenizer(recipe, experts, models, by_name[tokenizer])


@dataclass(frozen=True)
class _Building:
    """One model in the making."""

    recipe: Recipe
    experts: tuple[HeterogeneousExpert, ...]
    chosen: Checkpoint
    dtype: DType

    @property
    def moe(self) -> MoE:
        """The recipe's section."""
        assert self.recipe.moe is not None
        return self.recipe.moe

    @property
    def router(self) -> SequenceRouter:
        """The recipe's router."""
        assert isinstance(self.moe.router, SequenceRouter)
        return self.moe.router

    @property
    def shared(self) -> bool:
        """Return whether there is one embedding and head for all."""
        return self.moe.embedding == "shared"

    @property
    def rows(self) -> int:
        """Rows of the tokenizer's own model."""
        return self.experts[0].rows

    @property
    def width(self) -> int:
        """The largest width."""
        return max(expert.decoder.width for expert in self.experts)

    @property
    def head_bias(self) -> bool:
        """Return whether the shared head has a bias."""
        return self.shared and any(expert.decoder.head_bias for expert in self.experts)

    @cached_property
    def assembly(self) -> Assembly:
        """For operations over the experts' tensors."""
        models = {expert.name: expert.model for expert in self.experts}
        return Assembly(self.recipe, models, None, self.dtype, (), self.chosen.name)

    def outputs(self) -> tuple[Output, ...]:
        """All tensors: what comes first in the model first, what is fitted in the order in which it can be."""
        assembly, bodies = self.assembly, []
        for number, expert in enumerate(self.experts):
            for tensor, own in expert_tensors(expert.decoder, number, rows=None if self.shared else self.rows):
                bodies.append(assembly.output(tensor, self._own(assembly, expert, own)))
        gate_width = self.width if self.shared else sum(expert.decoder.width for expert in self.experts)
        gate = heterogeneous_gate(len(self.experts), gate_width)
        routed = [(gate, self.router.operation(gate))] if self._routing()["kind"] == "learned" else []
        if not self.shared:
            return (*bodies, *(assembly.output(*each) for each in routed))
        embedding, head = shared_tensors(self.rows, self.width, head_bias=self.head_bias)
        tables = [expert.tables(self._scale(expert), self.dtype) for expert in self.experts]
        projectors = projector_outputs(self.moe.projectors, tables, self.width, self.recipe.seed)
        first = [(embedding, self._averaged([expert.embedded(self.width, self._scale(expert)) for expert in self.experts]))]
        last = [(tensor, self._head(tensor)) for tensor in head]
        rest = [assembly.output(*each) for each in (*projectors, *last, *routed)]
        return (*(assembly.output(*each) for each in first), *bodies, *rest)

    def _own(self, assembly: Assembly, expert: HeterogeneousExpert, tensor: ExpectedTensor) -> Operation:
        outside = (expert.decoder.embedding, expert.decoder.head, expert.decoder.head_bias)
        if tensor.name in outside:
            return Copy(Source(expert.name, expert.mapped(tensor.name)))
        return assembly.copied(expert.name, tensor.name)

    def _scale(self, expert: HeterogeneousExpert) -> float:
        """Return the factor of its embedding, as its own module has it: in the element type of the weights."""
        return float(rounded(np.array(expert.decoder.embedding_scale), self.dtype))

    def _head(self, tensor: ExpectedTensor) -> Operation:
        if len(tensor.shape) == 2:
            return self._averaged([expert.head(self.width) for expert in self.experts])
        zeros = ArrayTensor(tensor.name, F32, tensor.shape, np.zeros(self.rows, np.float32))
        return self._averaged([expert.head_bias() or zeros for expert in self.experts])

    def _averaged(self, tables: Sequence[Tensor]) -> Operation:
        """The experts' rows merged by the recipe's method; the base has weight 1."""
        weights = {name: expert.weight for name, expert in self.recipe.experts.items()}
        names = [expert.name for expert in self.experts]
        sources = tuple(Source(name, table) for name, table in zip(names, tables, strict=True))
        return Merge(self.recipe.method, sources, tuple(weights.get(name, 1.0) for name in names))

    def _routing(self) -> dict[str, Any]:
        scope = {"on": self.moe.route_on, "prefix_tokens": self.moe.prefix_tokens}
        return {**self.router.routing(self.moe.top_k), **scope}

    def config(self) -> dict[str, Any]:
        """config.json."""
        dtype = str(self.dtype.torch_name)
        config: dict[str, Any] = {"architectures": [_CLASS], "model_type": HETEROGENEOUS, "auto_map": HETEROGENEOUS_AUTO_MAP}
        config |= {"expert_names": [expert.name for expert in self.experts]}
        config |= {"expert_configs": [_expert_config(expert.model, dtype) for expert in self.experts]}
        config |= {"vocab_size": self.rows, "hidden_size": self.width, "embedding": self.moe.embedding}
        config["projectors"] = projector_config(self.moe.projectors, self.width) if self.shared else None
        config |= {"head_bias": self.head_bias, "routing": self._routing()}
        known = normalized_config(self.chosen.config, family_of(self.chosen.config))
        config |= {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {**config, "dtype": dtype}

    def warnings(self) -> tuple[str, ...]:
        """Return warnings about what is lost, and what is not ready for use."""
        found = [text for expert in self.experts for text in expert.remarks(shared=self.shared)]
        if self.shared and self.moe.projectors == "random":
            found.append("the projectors are random, as the paper starts: the model writes noise until it is fine-tuned")
        merge = self.recipe.written.get("merge")
        if not self.shared and isinstance(merge, Mapping) and set(merge) - {"seed"}:
            found.append("'merge' is not used: with 'embedding: separate' nothing is merged")
        return tuple(found)

    def notes(self) -> tuple[str, ...]:
        """Return notes about its parts."""
        described = (f"{expert.name} ({expert.decoder.model_type}, width {expert.decoder.width})" for expert in self.experts)
        return (f"experts stay whole models: {', '.join(described)}",)


def _expert_config(model: Checkpoint, dtype: str) -> dict[str, Any]:
    """An expert's own config.json, as transformers reads it today."""
    family = family_of(model.config)
    config = {**model.config, "dtype": dtype} if family is None else portable_config(model.config, family=family, dtype=dtype)
    return {key: value for key, value in config.items() if key not in _NOT_WRITTEN}
