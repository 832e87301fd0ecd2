"""Experts that stay whole models, of whatever architecture, on one vocabulary (MergeME, section 3.2).

The experts' tensors are copied. With a shared embedding and head, these are averages of the experts' rows for each token, padded
with zeros to the largest width, and projectors lead into and out of every expert; else every expert keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moerge.architecture import ExpectedTensor
from moerge.architecture.config import portable_config
from moerge.architecture.heterogeneous import expert_tensors, heterogeneous_gate, projector_config, shared_tensors
from moerge.architecture.sequence import HETEROGENEOUS
from moerge.modeling import HETEROGENEOUS_AUTO_MAP
from moerge.operations.operations import Copy, Merge, Operation, Output
from moerge.planning.assemble.common import Assembled, Assembly, Draft
from moerge.planning.assemble.experts import HeterogeneousExpert, heterogeneous_experts, resolve_tokenizer, tokenizer_source
from moerge.planning.models import SourceModel
from moerge.planning.precision import result_dtype
from moerge.projectors.outputs import projector_outputs
from moerge.recipe.schema import MoE, Recipe
from moerge.routers.sequence import SequenceRouter
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.source import Source
from moerge.tensors.tensor import ArrayTensor, Tensor
from moerge.tensors.views.rounded import rounded

_CLASS = "MoergeHeterogeneousForCausalLM"
_Computed = tuple[ExpectedTensor, Operation]

_NOT_WRITTEN = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype")


def draft_heterogeneous(recipe: Recipe, models: Sequence[SourceModel], *, bind: bool) -> Draft:
    """The model, on the vocabulary of one tokenizer that all experts get. `recipe` is resolved; nothing in it takes statistics.

    Raises InputError for what is no decoder-only model, and where vocabularies have nothing in common.
    """
    by_name = {model.name: model for model in models}
    chosen = by_name[tokenizer_source(models, recipe.tokenizer)]
    dtype = result_dtype(recipe, by_name["base" if "base" in by_name else recipe.expert_names[0]].checkpoint)
    experts = heterogeneous_experts([by_name[name] for name in recipe.expert_names], chosen)
    building = _Building(recipe, experts, chosen, dtype)
    outputs = building.outputs()
    vocabulary = resolve_tokenizer(recipe, experts, models, chosen)
    notes = (*building.notes(), *building.assembly.precision.notes(outputs), vocabulary.origin, *vocabulary.notes)
    assembled = Assembled(building.config(), outputs, recipe.expert_names)
    return Draft(assembled, tuple(models), vocabulary, building.warnings(), notes)


@dataclass(frozen=True)
class _Building:
    """One model in the making."""

    recipe: Recipe
    experts: tuple[HeterogeneousExpert, ...]
    chosen: SourceModel
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
        return Assembly(self.recipe, models, self.dtype, (), self.chosen.name)

    def outputs(self) -> tuple[Output, ...]:
        """All tensors: what comes first in the model first, and what is fitted in the order in which it can be."""
        embedding, head = self._shared()
        in_order = (*embedding, *self._bodies(), *self._projectors(), *head, *self._gate())
        return tuple(self.assembly.output(tensor, operation) for tensor, operation in in_order)

    def _bodies(self) -> Iterator[_Computed]:
        """The experts' own tensors; with a shared embedding and head without theirs."""
        for number, expert in enumerate(self.experts):
            for tensor, own in expert_tensors(expert.decoder, number, rows=None if self.shared else self.rows):
                yield tensor, self._own(self.assembly, expert, own)

    def _shared(self) -> tuple[list[_Computed], list[_Computed]]:
        """The shared embedding, and the head."""
        if not self.shared:
            return [], []
        embedding, head = shared_tensors(self.rows, self.width, head_bias=self.head_bias)
        tables = [expert.embedded(self.width, self._scale(expert)) for expert in self.experts]
        return [(embedding, self._averaged(tables))], [(tensor, self._head(tensor)) for tensor in head]

    def _projectors(self) -> Sequence[_Computed]:
        """The projectors that lead into and out of the experts, where embedding and head are shared."""
        if not self.shared:
            return ()
        tables = [expert.tables(self._scale(expert), self.dtype) for expert in self.experts]
        return projector_outputs(self.moe.projectors, tables, self.width, self.recipe.seed)

    def _gate(self) -> Sequence[_Computed]:
        """The gate, which reads the shared embedding's states, or those of all experts side by side."""
        if self._routing()["kind"] != "learned":
            return ()
        width = self.width if self.shared else sum(expert.decoder.width for expert in self.experts)
        gate = heterogeneous_gate(len(self.experts), width)
        return ((gate, self.router.operation(gate)),)

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
        config |= {key: self.chosen.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {**config, "dtype": dtype}

    def warnings(self) -> tuple[str, ...]:
        """Return warnings about what is lost, and what is not ready for use."""
        warnings = [text for expert in self.experts for text in expert.remarks(shared=self.shared)]
        if self.shared and self.moe.projectors == "random":
            warnings.append("the projectors are random, as the paper starts: the model writes noise until it is fine-tuned")
        merge = self.recipe.written.get("merge")
        if not self.shared and isinstance(merge, Mapping) and set(merge) - {"seed"}:
            warnings.append("'merge' is not used: with 'embedding: separate' nothing is merged")
        return tuple(warnings)

    def notes(self) -> tuple[str, ...]:
        """Return notes about its parts."""
        described = (f"{expert.name} ({expert.decoder.model_type}, width {expert.decoder.width})" for expert in self.experts)
        return (f"experts stay whole models: {', '.join(described)}",)


def _expert_config(model: SourceModel, dtype: str) -> dict[str, Any]:
    """An expert's own config.json, as transformers reads it today."""
    written, family = model.written, model.family
    config = {**written, "dtype": dtype} if family is None else portable_config(written, family=family, dtype=dtype)
    return {key: value for key, value in config.items() if key not in _NOT_WRITTEN}
