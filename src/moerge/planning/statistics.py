"""While planning: from a method and the folders that a recipe names to each expert's statistic of each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.files import is_file
from moerge.methods.average import Average, Linear
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.operations import Merge, Output
from moerge.statistics.files import Used, open_statistics, statistics_file
from moerge.tensors.source import Source
from moerge.tensors.views.rows import RowsTensor

if TYPE_CHECKING:
    from moerge.recipe.schema import Recipe

_WHAT = {"fisher": "Fisher information", "gram": "Gram matrix"}


class Binder:
    """Finds statistics for one recipe; only headers are read. `used` are those found so far, by model and file."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint]) -> None:
        self._recipe, self._models = recipe, models
        self._averaged: dict[str, list[str]] = {}
        self._open = cache(open_statistics)
        self.used: dict[tuple[str, Path], Used] = {}

    def bind(self, merge: Merge) -> Merge:
        """The operation with its statistics, or a plain mean where the models have none of such a tensor.

        Raises InputError that names the command to run where they were not gathered, and for statistics of another model.
        """
        method = merge.method
        assert isinstance(method, StatisticsMethod)
        check_weights(merge, self._recipe.source)
        found = [self._find(method, source.model) for source in merge.experts]
        extras = [self._extra(method, *pair) for pair in zip(found, merge.experts, strict=True)]
        if any(extra is None for extra in extras):
            return self._plain(merge)
        return replace(merge, method=method.adapted(found[0].statistics, merge.experts[0].tensor.name), extras=tuple(extras))

    def remarks(self) -> list[str]:
        """Warnings about what was found."""
        listed = [
            f"{len(names)} tensors have no statistics for {method} and are averaged: {', '.join(names[:3])}"
            for method, names in self._averaged.items()
            if method == "fisher"  # regmean is for some tensors only
        ]
        return [*listed, *(remark for used in self.used.values() for remark in self._stale(used))]

    def _plain(self, merge: Merge) -> Merge:
        self._averaged.setdefault(merge.method.name, []).append(merge.experts[0].tensor.name)
        return averaged(merge)

    def _find(self, method: StatisticsMethod, model: str) -> Used:
        recipe = self._recipe.source
        if not method.folders:
            raise InputError(
                f"{recipe}: {method.name} needs 'statistics': name the folder OUT that 'moerge stats {recipe} OUT' writes"
            )
        folders = [self._recipe.folder / Path(folder).expanduser() for folder in method.folders]
        files = [path for folder in folders if is_file(path := statistics_file(folder, model))]
        if not files:
            command = f"moerge stats {recipe} {folders[0]} --expert {model} --kind {method.name}"
            raise InputError(f"{recipe}: there are no statistics of {model} in {_listed(folders)}: gather them with '{command}'")
        if len(files) > 1:
            adding = " ".join(f"--add {path.parent}" for path in files)
            raise InputError(
                f"{recipe}: statistics of {model} lie in {_listed([path.parent for path in files])}: name one of these folders, "
                f"or add them up with 'moerge stats {recipe} OUT --expert {model} {adding}'"
            )
        used = Used(model, self._open(files[0]))
        self.used[model, files[0]] = used
        return used

    def _extra(self, method: StatisticsMethod, used: Used, source: Source) -> Source | None:
        statistics, name, path = used.statistics, source.tensor.name, used.statistics.path
        others = any(names for kind, names in statistics.facts.names.items() if kind != method.kind)
        kind = "all" if others else method.name  # --force replaces the whole file
        again = f"'moerge stats {self._recipe.source} {path.parent} --expert {source.model} --kind {kind} --force'"
        tensor = method.prepared(statistics, name)
        if tensor is None:
            if name in statistics.facts.without.get(method.kind, ()):
                return None
            raise InputError(f"{path} has no {_WHAT[method.kind]} of tensor {name!r}: gather it with {again}")
        if not method.adapted(statistics, name).fits(tensor, source.tensor.shape):
            raise InputError(
                f"{path} is of another model: its {_WHAT[method.kind]} does not fit tensor {name!r}, whose shape is "
                f"{list(source.tensor.shape)} in {source.model}: gather it with {again}"
            )
        if method.kind == "fisher" and statistics.fisher_mean == 0:
            raise InputError(f"{path} holds no Fisher information but zeros: gather it on other text with {again}")
        return Source(used.label, tensor)

    def _stale(self, used: Used) -> list[str]:
        statistics, facts, model = used.statistics, used.statistics.facts.model, self._models[used.model]
        if not model.complete:
            return []
        other = model.revision is not None and facts.revision is not None and model.revision != facts.revision
        changed = facts.folder == str(model.folder.resolve()) and facts.stamps != model.stamps
        if not other and not changed:
            return []
        what = "are of another revision" if other else "are older than its weights"
        return [f"the statistics of {model.name} in {statistics.path} {what}: gather them again if the weights differ"]


def averaged(merge: Merge) -> Merge:
    """The mean with the same weights."""
    return replace(merge, method=Average() if set(merge.weights) == {1.0} else Linear())


def check_weights(merge: Merge, where: str) -> None:
    """InputError for a negative weight, which would make a negative amount of text."""
    for source, weight in zip(merge.experts, merge.weights, strict=True):
        if weight < 0:
            raise InputError(f"{where}: {merge.method.name} needs weights of at least 0, but {source.model} has {weight:g}")


def differing(statistics: Sequence[Used], outputs: Sequence[Output], digests: Mapping[str, str]) -> list[str]:
    """Warnings about statistics of other weights than those that were merged.

    `digests` are of the tensors that were read, by "model:tensor".
    """
    if not statistics:
        return []
    read = {source.label: source.tensor for output in outputs for source in output.operation.sources}
    comparable = {label: digest for label, digest in digests.items() if not isinstance(read.get(label), RowsTensor)}
    found = []
    for used in statistics:
        known = used.statistics.facts.model.digests
        odd = [name for name, digest in known.items() if comparable.get(f"{used.model}:{name}", digest) != digest]
        if odd:
            found.append(
                f"the statistics of {used.model} in {used.statistics.path} were gathered on other weights than were merged, "
                f"such as {odd[0]}: gather them again"
            )
    return found


def _listed(folders: Sequence[Path]) -> str:
    return " and ".join(map(str, folders))
