"""PEFT LoRA adapters as models: a base whose changed tensors are computed while they are read; none is ever stored.

The format is peft's (adapter_config.json beside adapter_model.safetensors), and so are the rules: what a merged tensor is worth
follows `LoraLayer.merge` of peft 0.21, in float32. Differences: factors stored in float16 or bfloat16 are not rounded again after
multiplying, and what peft merges wrongly (LoRA on a head or embedding that the base ties, of which it changes both) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moerge.architecture import family_of
from moerge.architecture.config import changed
from moerge.architecture.registry import read_config
from moerge.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from moerge.checkpoint.fused_experts import StackedAdapter, nested_module
from moerge.checkpoint.locate import VOCABULARY_FILES
from moerge.checkpoint.module_names import Names
from moerge.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from moerge.errors import InputError
from moerge.files import FileState, SourceFile
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.expert_factors import Packing
from moerge.tensors.views.low_rank import LowRankTensor, RecentFactors
from moerge.tensors.views.reshaped import Reshaped, as_matrix
from moerge.tensors.views.rows import RowsTensor

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_WRAPPED = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|modules_to_save)(?=\.[^.]+$)")
_UNTRAINED = ".original_module."
_ROWS = ".token_adapter.trainable_tokens_delta"
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|embed_in|embed_out|lm_head|wte|word_embeddings|output)\.weight$")
"""What embeddings and heads are called."""
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Types whose `c_*` modules are transformers' Conv1D, which stores [in, out]."""


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter: the base's own tensors where the adapter has none, low-rank or whole ones where it has.

    `folder` has the tokenizer: the adapter's own, if it came with one, else the base's.
    """

    base: Checkpoint = field(kw_only=True)
    adapter: Checkpoint = field(kw_only=True)
    packing: Packing | None = field(default=None, kw_only=True)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the folders of its files."""
        return (self.adapter.folder, *self.base.folders)

    @property
    def _is_own(self) -> bool:
        """Return whether the base is this expert's alone, instead of the recipe's."""
        return self.base.name == self.name

    @property
    def identity(self) -> tuple[Any, ...]:
        """Return a key for everything that its tensors depend on; a base of the recipe counts for itself."""
        packing = (self.packing,) if self.packing else ()
        return (*super().identity, *packing, *(self.base.identity if self._is_own else ()))

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """The adapter, and a base of its own."""
        return (*(self.base.origins if self._is_own else ()), self)

    @property
    def commits(self) -> dict[str, str | None]:
        """The adapter's Hub commit, and that of a base of its own."""
        return {**self.base.commits, f"{self.name}+adapter": self.revision} if self._is_own else super().commits

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data in the adapter."""
        return self.adapter.nbytes

    @property
    def stored_as(self) -> str:
        """The adapter's element types."""
        return f"LoRA {self.adapter.stored_as}"

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The base's tensors."""
        return self.base.stored

    @cached_property
    def working_bytes(self) -> int:
        """Memory for the factors of the few tensors that are read at a time, beside the base's."""
        sizes = sorted(tensor.working_bytes for tensor in self.tensors.values() if isinstance(tensor, LowRankTensor))
        return sum(sizes[-RecentFactors.capacity :]) + self.base.working_bytes


def apply_adapter(adapter: Checkpoint, base: Checkpoint, packing: Packing | None = None) -> AdaptedCheckpoint:
    """The base with this adapter (a checkpoint for which `is_adapter` holds); no tensor is read.

    `packing` is the order in which its B holds the experts of a layer; None where the adapter's own writer says it.

    Raises InputError where the adapter is of a kind that does not amount to changed weights of this base.
    """
    config = read_adapter_config(adapter)
    tensors = _Application(adapter, base, config, packing).tensors()
    has_tokenizer = any((adapter.folder / name).is_file() for name in VOCABULARY_FILES)
    return AdaptedCheckpoint(
        adapter.name,
        adapter.location,
        adapter.folder if has_tokenizer else base.folder,
        _resized(base, tensors),
        tensors,
        adapter.revision,
        adapter.complete,
        warnings=(*config.remarks(adapter.name), *_other_base(adapter, base, config)),
        notes=(*adapter.notes, *(base.notes if base.name == adapter.name else ())),
        base=base,
        adapter=adapter,
        packing=packing,
    )


def stores_inputs_first(model_type: str, module: str, *, fan_in_fan_out: bool = False) -> bool:
    """Return whether a module's weight is [in, out]; `fan_in_fan_out` decides for types of which nothing is known."""
    if model_type in _CONV1D:
        return bool(re.fullmatch(r"c_\w+|q_attn", module.rpartition(".")[2]))
    return fan_in_fan_out


def holds_vocabulary(name: str) -> bool:
    """Return whether a tensor is an embedding or a head, by its name."""
    return bool(_VOCABULARY.search(name))


def _resized(base: Checkpoint, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The base's config, with the vocabulary of the adapter where that comes with an embedding of another size."""
    rows = {tensors[name].shape[0] for name, tensor in base.tensors.items() if tensors[name].shape != tensor.shape}
    return changed(base.config, family_of(base.config), {"vocab_size": rows.pop()}) if len(rows) == 1 else base.config


def ties_head(base: Checkpoint) -> bool:
    """Return whether the base's head is its embedding; a config that does not say so has a head exactly if one is stored."""
    tied = read_config(base.config)[1].get("tie_word_embeddings")
    return bool(tied) if tied is not None else not any(re.search(r"(^|\.)(lm_head|embed_out)\.weight$", n) for n in base.tensors)


def _other_base(adapter: Checkpoint, base: Checkpoint, config: AdapterConfig) -> list[str]:
    """A warning if the adapter says that it was trained on another model; copies are known by their folder's name."""
    trained_on = config.base.rstrip("/")
    known = {base.location.partition("@")[0], str(base.folder), str(base.config.get("_name_or_path", ""))}
    names = {name.rstrip("/").rpartition("/")[2].lower() for name in (*known, str(base.folder.resolve()))}
    if not trained_on or trained_on in known or trained_on.rpartition("/")[2].lower() in names:
        return []
    return [f"{adapter.name}: the adapter was trained on {trained_on!r}; is {base.location!r} the same model?"]


class _Application:
    """An adapter being put on a base."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint, config: AdapterConfig, packing: Packing | None) -> None:
        self.adapter, self.base, self.config = adapter, base, config
        self.label = f"{adapter.name}: " if adapter.name else ""
        self.recent = RecentFactors()
        self.family = family_of(base.config)
        self.names = Names(base.tensors)
        self.tied = ties_head(base)
        self.stacked = StackedAdapter(adapter, base, config, packing, self._tensor, self._error)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the adapted model, in the base's order."""
        modules, whole, rows = self._parsed()
        if self.tied:
            self._check_tied(modules, whole, rows)
        replaced = {name: self._whole(name, tensor) for name, tensor in whole.items()}
        found: dict[str, Tensor] = {**self.base.tensors, **replaced}
        for module, tensor in rows.items():
            changed = self._with_rows(module, tensor, found)
            found[changed.name] = changed
        experts = self.stacked.of_experts(modules)
        for module, parts in modules.items():
            if nested_module(module) not in experts:
                found |= self._low_rank(module, parts, found)
        for module, nested in experts.items():
            factors = {name: self._pair(name, parts, stacked=True)[:2] for name, parts in nested.items()}
            found |= self.stacked.changed(module, factors, found)
        return found

    def _parsed(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """Parts of low-rank tensors by module, whole tensors by their name in the base, and tokens' rows by module."""
        modules: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        keys = sorted(self.adapter.tensors, key=lambda key: ".modules_to_save." not in key)  # of copies peft reads the plain one
        for key in keys:
            tensor, plain = self.adapter.tensors[key], key.removeprefix(_PREFIX)
            match = _KEY.fullmatch(plain)
            if match:
                modules.setdefault(match["module"], {})[_PARTS[match["part"]]] = tensor
            elif plain.endswith(_ROWS):
                rows[plain.removesuffix(_ROWS)] = tensor
            elif _UNTRAINED not in plain:
                name = _WRAPPED.sub("", plain)
                whole[self._stored_name(name) or name] = tensor
        return modules, whole, rows

    def _stored_name(self, name: str) -> str | None:
        """Return the base's name for a tensor that modules in memory may call otherwise."""
        return self.names.find(name) or (self.names.find(self.family.canonical_name(name)) if self.family else None)

    def _with_rows(self, module: str, trained: Tensor, found: Mapping[str, Tensor]) -> RowsTensor:
        """A tensor of which single rows were trained (trainable_token_indices): those instead of the base's."""
        name, numbers = self._stored_name(f"{module}.weight"), self.config.trained_rows(module)
        if name is None:
            raise self._error(f"tensor {trained.name!r} of the adapter has no place in the base {self.base.location}")
        count, *width = found[name].shape
        if trained.shape != (len(numbers), *width) or not all(0 <= number < count for number in numbers):
            raise self._error(
                f"tensor {trained.name!r} of the adapter has shape {list(trained.shape)}, but {ADAPTER_CONFIG} names "
                f"{len(numbers)} rows of {name!r}, which has shape {list(found[name].shape)}"
            )
        rows_V = np.full(count, -1, np.int32)
        rows_V[list(numbers)] = np.arange(len(numbers), dtype=np.int32)
        own_V = np.arange(count, dtype=np.int32)
        return RowsTensor(name, (found[name], trained), (own_V, rows_V), (rows_V >= 0).astype(np.int16))

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that the adapter stores completely (modules_to_save, trained biases, a resized embedding)."""
        if name not in self.base.tensors:
            raise self._error(f"tensor {tensor.name!r} of the adapter has no place in the base {self.base.location}")
        expected = self.base.tensors[name].shape
        resized = holds_vocabulary(name) and len(tensor.shape) == 2 and tensor.shape[1:] == expected[1:]
        if tensor.shape != expected and not resized:
            raise self._error(
                f"tensor {tensor.name!r} of the adapter has shape {list(tensor.shape)}, the base's is {list(expected)}: "
                "was the adapter trained on this base?"
            )
        return replace(tensor, name=name)  # type: ignore[type-var]

    def _low_rank(self, module: str, parts: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed tensors of one module."""
        name = self._stored_name(f"{module}.weight")
        if name is None:
            raise self._error(
                f"the adapter changes the module {module!r}, of which the base {self.base.location} has no tensor "
                f"'{module}.weight': was it trained on this base?"
            )
        a, b, embedding = self._pair(module, parts)
        stored = found[name]
        base = as_matrix(stored) if len(parts["a" if not embedding else "embedding_a"].shape) > 2 else stored
        rank = a.shape[0]
        for tensor in (a, b, base, *parts.values()):
            if not tensor.dtype.is_float:
                raise self._error(f"tensor {tensor.name!r} is of type {tensor.dtype.name}: only float tensors can be adapted")
        magnitude = parts.get("magnitude")
        if self.config.use_dora != (magnitude is not None):
            state = "lacks" if self.config.use_dora else "has"
            raise self._error(f"the adapter {state} a DoRA magnitude for {module!r}, unlike its {ADAPTER_CONFIG} says")
        if rank != self.config.rank(module):
            raise self._error(
                f"{module!r} has rank {rank}, but {ADAPTER_CONFIG} gives it {self.config.rank(module)}: "
                "the two files do not belong together"
            )
        transposed = self._transposed(module, base, a, b, embedding)
        outputs = base.shape[1 if transposed else 0]
        if magnitude is not None and magnitude.size != outputs:
            raise self._error(f"tensor {magnitude.name!r} has {magnitude.size} elements, expected {outputs}")
        tensor = self._tensor(base, a, b, module, transposed, magnitude)
        changed: dict[str, Tensor] = {name: tensor if base is stored else Reshaped(tensor, stored.shape)}
        if "bias" in parts:
            changed |= self._bias(module, parts["bias"], found)
        return changed

    def _pair(self, module: str, parts: Mapping[str, Tensor], *, stacked: bool = False) -> tuple[Tensor, Tensor, bool]:
        embedding = "embedding_a" in parts or "embedding_b" in parts
        names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
        missing = next((part for part in names if part not in parts), None)
        if missing:
            spelled = next(suffix for suffix, part in _PARTS.items() if part == missing)
            raise self._error(f"the adapter has no {module}.{spelled}: fetch or copy it again")
        a, b = (parts[part] for part in names)
        if stacked and {len(a.shape), len(b.shape)} <= {2, 3}:
            return a, b, False
        if len(a.shape) == len(b.shape) > 2 and set(b.shape[2:]) == {1}:  # a convolution, and one of single points
            a, b = as_matrix(a), as_matrix(b)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise self._error(
                f"the factors of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, which do not multiply: "
                "save the adapter again (sharded training has to gather its weights first)"
            )
        return a, b, embedding

    def _transposed(self, module: str, base: Tensor, a: Tensor, b: Tensor, embedding: bool) -> bool:
        """Return whether the base stores [in, out]: embeddings do, Conv1D does; the shapes tell, unless the matrix is square."""
        normal, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        if base.shape not in (normal, turned) or (embedding and base.shape != turned):
            raise self._error(
                f"the adapter changes {module!r} by a matrix of {list(turned if embedding else normal)}, but the base's has "
                f"shape {list(base.shape)}: was it trained on this base?"
            )
        if normal != turned:
            return base.shape == turned
        return embedding or stores_inputs_first(self.base.model_type, module, fan_in_fan_out=self.config.fan_in_fan_out)

    def _bias(self, module: str, bias: Tensor, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self._stored_name(f"{module}.bias")
        if name is None:
            raise self._error(f"lora_bias adds a bias to {module!r}, which has none in the base, so it cannot be merged")
        if found[name].shape != bias.shape:
            raise self._error(f"tensor {bias.name!r} has shape {list(bias.shape)}, the base's is {list(found[name].shape)}")
        return {name: self._tensor(found[name], None, bias, module, False, None)}

    def _tensor(
        self, base: Tensor, a: Tensor | None, b: Tensor, module: str, transposed: bool, magnitude: Tensor | None = None
    ) -> LowRankTensor:
        path = self.adapter.folder / ADAPTER_CONFIG
        settings = SourceFile(path, FileState.of(path))
        return LowRankTensor(base, a, b, self.config.scale(module), transposed, magnitude, settings, self.recent)

    def _check_tied(self, modules: dict[str, dict[str, Tensor]], whole: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """InputError for what would untie head and embedding, which are one; where both are changed alike, drops the head's part.

        peft's own `merge_and_unload` adds a LoRA of both to their one tensor twice; here it counts once, as while training.
        """
        if self.config.ensure_weight_tying:
            tied = {module: parts for module, parts in modules.items() if holds_vocabulary(f"{module}.weight")}
            embedding = next((module for module, parts in tied.items() if "embedding_a" in parts), None)
            for module in tied:
                if embedding and module != embedding and self.config.scale(module) == self.config.scale(embedding):
                    del modules[module]
            untied = [module for module in tied if module in modules and module != embedding]
        else:
            untied = [module for module in modules if holds_vocabulary(f"{module}.weight")]
            untied += [
                module for name in whole if holds_vocabulary(name) and self.config.saves(module := name[: -len(".weight")])
            ]
        heads = [module for module in rows if self._stored_name(f"{module}.weight") is None]
        embeddings = {self.config.trained_rows(module) for module in rows if module not in heads}
        for module in heads:
            if {self.config.trained_rows(module)} == embeddings:
                del rows[module]
            else:
                untied.append(module)
        if untied:
            raise self._error(
                f"the adapter changes '{sorted(untied)[0]}.weight', which the base ties (embedding and head are one tensor), and "
                "so would untie them: untie base and experts first, by saving them with tie_word_embeddings=False"
            )
        for name in [name for name in whole if holds_vocabulary(name) and name not in self.base.tensors]:
            del whole[name]

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self.label}{self.adapter.folder}: {problem}")
