"""A merge as a model that runs, without a checkpoint: tensors are merged into memory, and again only where a recipe changed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.checkpoint.manifest import to_json
from moerge.execution.executor import Executor
from moerge.execution.store import MemoryStore
from moerge.merging.pipeline import merge
from moerge.operations.operations import Merge, Output
from moerge.planning.plan import Plan, describe
from moerge.runtime.loading import Loaded, device_or_default, explained, load, load_config, load_model, load_tokenizer
from moerge.tensors.digest import file_digest
from moerge.tensors.threads import default_threads

if TYPE_CHECKING:
    import torch


@dataclass
class RunningMerge:
    """Plans as models that run, one after the other.

    Tensors that the next plan computes as the last one did stay as they are. A plan whose routers are computed from the merged
    model is merged into a temporary folder instead, since these read files.

    Args:
        device: The device that models run on; None for a GPU where there is one.
        dtype: The element type that models run in, such as "float32"; None for the one that the recipe writes.
        threads: Threads that merge; None for all cores.
    """

    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    merged: int = 0
    """Tensors that the last plan had to merge."""
    _store: _ChangedOnly = field(default_factory=lambda: _ChangedOnly(), repr=False)
    _loaded: Loaded | None = field(default=None, repr=False)
    _files: str = field(default="", repr=False)

    def load(self, plan: Plan, name: str = "the merged model") -> Loaded:
        """The plan's model with its tokenizer. What `load` returned before is the same model, with other weights.

        Raises InputError where the inputs or the merged values are not finite, or transformers cannot load the model.
        """
        if plan.fit_jobs:
            return self._from_folder(plan, name)
        self._store.expect(plan.outputs, plan)
        Executor(self._store).run(plan.outputs, self.threads or default_threads())
        changed = {output.name: output for output in plan.outputs if output.name in self._store.changed}
        self.merged = len(changed)
        files = file_digest(
            to_json({"config": dict(plan.config), **{key: file_digest(text) for key, text in plan.files.items()}})
        )
        if self._loaded is None or files != self._files or not self._put(changed.values()):
            self._loaded, self._files = self._new(plan, name), files
        return self._loaded

    def _put(self, outputs: Iterable[Output]) -> bool:
        """Overwrite parameters of the model; False where it has them under other names or in other shapes."""
        import torch

        assert self._loaded is not None
        parameters = self._loaded.model.state_dict()
        changed = {output.name: self._tensor(output) for output in outputs}
        if not all(name in parameters and parameters[name].shape == value.shape for name, value in changed.items()):
            return False
        with torch.no_grad():
            for name, value in changed.items():
                parameters[name].copy_(value)
        return True

    def _new(self, plan: Plan, name: str) -> Loaded:
        import torch
        import transformers

        from moerge.modeling import register

        with _small_files(plan) as folder:
            if plan.config.get("auto_map"):
                register()
            config, tokenizer = load_config(folder), load_tokenizer(folder)
        with torch.device("meta"), explained(name):
            auto: Any = transformers.AutoModelForCausalLM
            kind = type(auto.from_config(config))
        tensors = {output.name: self._tensor(output).clone() for output in plan.outputs}
        model = load_model(None, name=name, dtype=self.dtype, auto=kind, config=config, state_dict=tensors)
        return Loaded(name, model.to(device_or_default(self.device)).eval(), tokenizer)

    def _from_folder(self, plan: Plan, name: str) -> Loaded:
        self._loaded, self.merged = None, len(plan.outputs)
        with tempfile.TemporaryDirectory(prefix="moerge-") as home:
            merge(plan, Path(home) / "merged", threads=self.threads)
            return replace(load(Path(home) / "merged", dtype=self.dtype, device=self.device), name=name)

    def _tensor(self, output: Output) -> torch.Tensor:
        import torch

        stored_N = self._store.arrays[output.name]
        dtype = getattr(torch, str(output.dtype.torch_name))
        raw = stored_N.view(f"u{stored_N.itemsize}" if stored_N.itemsize == 1 else f"i{stored_N.itemsize}")
        return torch.from_numpy(raw).view(dtype).reshape(output.shape)


class _ChangedOnly(MemoryStore):
    """Tensors in memory, of which those count as finished whose operation was carried out before."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[str] = set()
        self._made: dict[str, str] = {}
        self._wanted: dict[str, str] = {}

    def expect(self, outputs: Iterable[Output], plan: Plan) -> None:
        """Say what will be computed; tensors of other shapes or names are forgotten."""
        described = {output.name: _description(output) for output in outputs}
        spanned = file_digest(to_json({name: text for name, text in described.items() if text[1]}))
        inputs = {model.name: [str(part) for part in model.identity] for model in plan.models}
        common = file_digest(to_json({"inputs": inputs, "vocabulary": dict(plan.vocabulary)}))
        self._wanted = {name: f"{common}{text}{spanned if spans else ''}" for name, (text, spans) in described.items()}
        for name in [name for name, made in self._made.items() if self._wanted.get(name) != made]:
            del self._made[name], self.arrays[name]
        self.changed = self._wanted.keys() - self._made.keys()

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """The tensor is complete."""
        self._made[output.name] = self._wanted[output.name]

    def finished(self, output: Output) -> bool:
        """Return whether the tensor is what it would become."""
        return output.name in self._made


def _description(output: Output) -> tuple[str, bool]:
    """All that decides a tensor, and whether that includes what other tensors are."""
    spans = isinstance(output.operation, Merge) and output.operation.method.spans_model
    return json.dumps([output.dtype.name, output.shape, describe(output.operation)], default=str), spans


@contextmanager
def _small_files(plan: Plan) -> Iterator[Path]:
    """A folder with everything of the result but its tensors."""
    with tempfile.TemporaryDirectory(prefix="moerge-") as name:
        for file, content in {**plan.files, "config.json": to_json(plan.config)}.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)
