"""Looking at checkpoints: what they are, and whether they are intact."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moerge.architecture import ExpectedTensor
from moerge.architecture.heterogeneous import expected_heterogeneous, expert_prefix
from moerge.architecture.needed import Compared, compare_with_transformers
from moerge.architecture.registry import read_config
from moerge.architecture.sequence import BY_SEQUENCE, HETEROGENEOUS, MODEL_TYPE, expected_routed, expert_config, routed_role
from moerge.checkpoint.adapter_config import describe_adapter
from moerge.checkpoint.expert import SEPARATOR, expert_labels
from moerge.checkpoint.header import read_metadata
from moerge.checkpoint.manifest import damaged_files, read_manifest
from moerge.checkpoint.reader import Checkpoint, is_adapter
from moerge.checkpoint.state_dict import open_model
from moerge.errors import InputError
from moerge.execution.schedule import Job, run_jobs
from moerge.formatting import Displayed
from moerge.planning.checks import expected_of
from moerge.planning.heads import settle_head
from moerge.planning.models import SourceModel
from moerge.progress import Advance, Progress, reporter
from moerge.runtime.loading import check_runnable
from moerge.tensors.codec import all_finite
from moerge.tensors.digest import CHUNK, chunk_digest, tensor_digest
from moerge.tensors.tensor import Tensor
from moerge.tensors.threads import default_threads
from moerge.tokenizer import companion_files, token_ids

_WHOLE_MODEL = re.compile(r"experts\.(\d+)\.")
"""The beginning of the role of a whole model's tensor."""


@dataclass(frozen=True, repr=False)
class Verification(Displayed):
    """The result of `verify`; no problems means intact. `notes` are what may be of interest."""

    checkpoint: Checkpoint
    problems: tuple[str, ...]
    tensors: int
    nbytes: int
    against_manifest: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "checkpoint": str(self.checkpoint.folder),
            "intact": not self.problems,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "compared_with_manifest": self.against_manifest,
        }


def verify(location: str | Path, *, threads: int | None = None, progress: Progress | bool = False) -> Verification:
    """Check that every tensor is present, of the right shape, finite, and what the manifest says, where there is one.

    Which tensors have to be there the family's table says and, where it is installed, transformers for the config's class.
    Raises InputError where not even the headers make sense.
    """
    model = SourceModel.of(open_model(str(location)))
    checkpoint, manifest = model.checkpoint, read_manifest(model.folder)
    problems = _structure(model, manifest)
    compared = Compared()
    if not problems and checkpoint.model_type not in BY_SEQUENCE and not is_adapter(checkpoint):
        check_runnable(checkpoint.folder)
        compared = compare_with_transformers(checkpoint.folder, checkpoint.config)
        problems += compared.problems
    digests = manifest["tensors"] if manifest else {}
    damage: dict[str, str] = {}
    with reporter(progress) as report:
        advance = report.phase("verifying", checkpoint.nbytes)
        jobs = (_check(tensor, digests.get(tensor.name), damage, advance) for tensor in checkpoint.tensors.values())
        run_jobs(jobs, threads or default_threads())
    problems += [damage[name] for name in checkpoint.tensors if name in damage]
    if manifest:
        problems += damaged_files(checkpoint.folder, manifest)
    tensors, nbytes, notes = len(checkpoint.tensors), checkpoint.nbytes, (*checkpoint.warnings, *compared.notes)
    return Verification(checkpoint, tuple(problems), tensors, nbytes, manifest is not None, notes)


def _structure(model: SourceModel, manifest: Mapping[str, Any] | None) -> list[str]:
    stored, family = model.tensors, model.family
    fused = next((name for name in stored if family and family.is_fused(name)), None)
    if fused:
        return [f"tensor {fused!r} holds all experts of a layer, as transformers has them in memory: save it with transformers 5"]
    problems = []
    read = settle_head(model)
    for tensor in _expected(read):
        actual = read.tensors.get(tensor.name)
        if actual is None:
            problems.append(f"tensor {tensor.name!r} is missing")
        elif actual.shape != tensor.shape:
            problems.append(f"tensor {tensor.name!r} has shape {list(actual.shape)}, expected {list(tensor.shape)}")
    if family and family.unmodeled and family.nested and not any(map(family.is_unmodeled, stored)):
        problems.append(f"no tensor of what a {family.model_type} has beside its language model is there")
    if manifest:
        problems += [f"tensor {name!r} of the manifest is missing" for name in manifest["tensors"] if name not in stored]
        problems += [f"tensor {name!r} is not in the manifest" for name in stored if name not in manifest["tensors"]]
        files = dict.fromkeys(file.path for tensor in stored.values() for file in tensor.files)
        problems += [f"{file.name} lost its metadata" for file in files if read_metadata(file) != {"format": "pt"}]
    return list(dict.fromkeys(problems))


def _expected(model: SourceModel) -> list[ExpectedTensor]:
    """The tensors that the config calls for; none where moerge does not know the family."""
    where = str(model.folder)
    if model.model_type not in BY_SEQUENCE:
        return expected_of(model, where)
    try:
        return expected_heterogeneous(model.written) if model.model_type == HETEROGENEOUS else expected_routed(model.written)
    except ValueError as error:
        raise InputError(f"{where}: config.json: {error}") from None


def _role_of(model: SourceModel) -> Callable[[str], str | None]:
    """Return a function from a tensor's name to its role, None if the model has no such tensor."""
    if model.model_type == HETEROGENEOUS:
        return {tensor.name: tensor.role for tensor in _expected(model)}.get
    if model.model_type == MODEL_TYPE:
        return partial(routed_role, model.written)
    return model.family.role_of if model.family else lambda name: None


def _check(tensor: Tensor, wanted: str | None, damage: dict[str, str], advance: Advance) -> Job:
    elements = tensor.open()

    def look(start: int) -> tuple[bytes, bool]:
        chunk = elements.read(start, np.empty(min(CHUNK, tensor.size - start), tensor.dtype.storage))
        advance(chunk.nbytes)
        return chunk_digest(chunk), all_finite(chunk, tensor.dtype)

    results = yield [partial(look, start) for start in range(0, tensor.size, CHUNK)]
    if wanted is not None and tensor_digest(digest for digest, _ in results) != wanted:
        damage[tensor.name] = (
            f"tensor {tensor.name!r} in {tensor.files[0].name} is damaged: its bytes are not those that were merged"
        )
    elif not all(finite for _, finite in results):
        damage[tensor.name] = f"tensor {tensor.name!r} in {tensor.files[0].name} holds NaN or infinity"


@dataclass(frozen=True, repr=False)
class Inspection(Displayed):
    """The facts of a checkpoint, from its config and headers.

    `expert_models` are those of experts that are whole models, `experts` the names or numbers of a native mixture's.
    """

    checkpoint: Checkpoint
    family: str | None
    parameters: int
    dtypes: Mapping[str, int]
    roles: tuple[Role, ...]
    vocabulary: int | None
    files: tuple[str, ...]
    manifest: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None = None
    expert_models: tuple[Mapping[str, Any], ...] = ()
    experts: tuple[str, ...] = ()

    @property
    def references(self) -> dict[str, str]:
        """References to the experts of a native mixture, for recipes, by name or number."""
        return {expert: f"{self.checkpoint.location}{SEPARATOR}{expert}" for expert in self.experts}

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        config = read_config(expert_config(self.checkpoint.config))[1]
        return {
            "checkpoint": str(self.checkpoint.folder),
            "model_type": self.checkpoint.model_type,
            "family": self.family,
            "parameters": self.parameters,
            "bytes": self.checkpoint.nbytes,
            "dtypes": dict(self.dtypes),
            "expert_models": [dict(model) for model in self.expert_models],
            "expert_references": self.references,
            "layers": config.get("num_hidden_layers"),
            "hidden_size": config.get("hidden_size"),
            "tied_embeddings": bool(config.get("tie_word_embeddings")),
            "roles": [vars(role) for role in self.roles],
            "tokens": self.vocabulary,
            "vocab_size": config.get("vocab_size"),
            "tokenizer_files": list(self.files),
            "adapter": dict(self.adapter) if self.adapter else None,
            "made_by": {key: self.manifest[key] for key in ("versions", "recipe", "experts")} if self.manifest else None,
        }


@dataclass(frozen=True)
class Role:
    """All tensors of one role: `role` without layer and expert numbers, an example's shape, and totals."""

    role: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int


def inspect(location: str | Path) -> Inspection:
    """Family, sizes, roles, tokenizer and origin of a checkpoint folder or Hub id, without reading a tensor."""
    model = SourceModel.of(open_model(str(location), weights=False))
    checkpoint, family = model.checkpoint, model.family
    tensors = checkpoint.tensors.values()
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype.name] += tensor.size
    tokens = token_ids(checkpoint.folder)
    return Inspection(
        checkpoint=checkpoint,
        family=checkpoint.model_type if checkpoint.model_type in BY_SEQUENCE else family.model_type if family else None,
        parameters=sum(tensor.size for tensor in tensors),
        dtypes=dtypes,
        roles=_roles(model),
        vocabulary=len(tokens) if tokens is not None else None,
        files=tuple(companion_files(checkpoint.folder)),
        manifest=read_manifest(checkpoint.folder),
        adapter=describe_adapter(checkpoint) if is_adapter(checkpoint) else None,
        expert_models=_expert_models(checkpoint) if checkpoint.model_type == HETEROGENEOUS else (),
        experts=() if is_adapter(checkpoint) or checkpoint.model_type in BY_SEQUENCE else expert_labels(checkpoint),
    )


def _expert_models(checkpoint: Checkpoint) -> tuple[dict[str, Any], ...]:
    found = []
    for number, (name, config) in enumerate(
        zip(checkpoint.config.get("expert_names") or (), checkpoint.config.get("expert_configs") or (), strict=False)
    ):
        known, begin = read_config(config)[1], expert_prefix(number)
        own = [tensor.size for tensor in checkpoint.tensors.values() if tensor.name.startswith(begin)]
        facts = {"name": name, "model_type": config.get("model_type"), "layers": known.get("num_hidden_layers")}
        facts |= {"hidden_size": known.get("hidden_size"), "vocab_size": known.get("vocab_size"), "parameters": sum(own)}
        found.append(facts)
    return tuple(found)


def _roles(model: SourceModel) -> tuple[Role, ...]:
    checkpoint, family = model.checkpoint, model.family
    names = checkpoint.config.get("expert_names") if checkpoint.model_type == HETEROGENEOUS else None
    groups: dict[str, list[Tensor]] = {_general(tensor.role, names): [] for tensor in _expected(model)}
    role_of = _role_of(model)
    for name, tensor in checkpoint.tensors.items():
        role = role_of(tensor.name)
        kind = "adapter" if is_adapter(checkpoint) else "buffer" if family and family.is_buffer(name) else "no role"
        plain = tensor.name.removeprefix("base_model.model.")
        groups.setdefault(_general(role, names) if role else f"({kind}) {_general(plain)}", []).append(tensor)
    return tuple(
        Role(role, found[0].shape, len(found), sum(tensor.size for tensor in found)) for role, found in groups.items() if found
    )


def _general(role: str, experts: Sequence[str] | None = None) -> str:
    """The role without numbers; of whole models among the experts, which have different layers, with their names instead."""
    whole = _WHOLE_MODEL.match(role) if experts else None
    if whole and experts and int(whole[1]) < len(experts):
        return f"{experts[int(whole[1])]}.{_general(role[whole.end() :])}"
    return re.sub(r"\.\d+(?=\.|$)", ".*", role)
