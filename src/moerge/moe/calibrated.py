"""What routers that look at calibration text have in common: settings, reading it, running the merged model over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from moerge.calibration import Texts, read_texts
from moerge.errors import InputError
from moerge.moe.context import FitContext
from moerge.moe.moments import Moments, load_moments, read_facts, save_moments
from moerge.moe.router import FittedRouter
from moerge.moe.running import RunningMoE, require_models_extra

if TYPE_CHECKING:
    import torch

    from moerge.recipe.schema import Recipe

Count = Annotated[int, Field(ge=1)]


class RunningRouter(FittedRouter):
    """A router for which the merged model runs, on `device`, in the checkpoint's element type unless `dtype` says otherwise."""

    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @property
    def runs_model(self) -> bool:
        """Whether these settings need the model at all."""
        return True

    def require(self) -> None:
        """The merged model runs in transformers."""
        if self.runs_model:
            require_models_extra(f"the {self.kind} router")

    def memory_bytes(self, model_bytes: int, layers: int, hidden: int) -> int:
        """The whole merged model, and a float64 matrix [hidden, hidden] twice for each layer."""
        return model_bytes * (2 if self.dtype == "float32" else 1) + 2 * layers * hidden**2 * 8

    def running(self, context: FitContext) -> RunningMoE:
        """The merged model in memory."""
        experts, layers = len(context.experts), len(context.gates)
        return RunningMoE(context.folder, experts=experts, layers=layers, device=self.device, dtype=self.dtype)


class CalibratedRouter(RunningRouter):
    """A router fitted to what the merged model's routers see on each expert's calibration text.

    Of each expert at most `texts` documents of at most `tokens` tokens are run, one by one. Meanwhile the routers are
    overruled: with `path: own` each text runs through the expert it belongs to, with `path: uniform` through all in equal
    parts.
    """

    texts: Count = 200
    tokens: Annotated[int, Field(ge=2)] = 512
    path: Literal["own", "uniform"] = "own"

    def inputs(self, recipe: Recipe, experts: Sequence[str]) -> tuple[Texts, ...]:
        """The first `texts` documents of every expert's entry in the recipe's `calibration`."""
        return tuple(self._texts(recipe, expert) for expert in experts)

    def _texts(self, recipe: Recipe, expert: str) -> Texts:
        location = recipe.calibration.get(expert)
        if location is None:
            raise InputError(
                f"{recipe.source}: the {self.kind} router needs text for every expert: add '{expert}: FILE' to 'calibration'"
            )
        return read_texts(expert, location, relative_to=recipe.folder, limit=self.texts)

    def path_of(self, expert: int) -> int | None:
        """Where the texts of the expert with this index run."""
        return expert if self.path == "own" else None


class MomentRouter(CalibratedRouter):
    """A calibrated router that needs no more of each text than its `Moments`, which add up.

    `statistics` names a folder (relative to the recipe) where they are kept, a file for each expert. An expert whose file is
    there needs no calibration text any more: so experts can be added, which need text of their own only, or removed. Text that
    is given is used, unless the file stems from the very same text, settings and merged model.
    """

    statistics: str | None = None

    def _texts(self, recipe: Recipe, expert: str) -> Texts:
        if self.statistics is not None and expert not in recipe.calibration:
            saved = _file(recipe.folder / self.statistics, expert)
            if saved.is_file():
                facts = read_facts(saved)
                return Texts(expert, f"{self.statistics}/{saved.name}", (), tuple(facts.get("documents", ())))
        return super()._texts(recipe, expert)

    def remarks(self, context: FitContext) -> tuple[str, ...]:
        """Which statistics stem from another model than the one that was merged now."""
        reused = {name: index for index, name in enumerate(context.experts) if not context.texts[name].documents}
        sources = {name: context.relative_to / context.texts[name].location for name in reused}
        stale = [n for n, i in reused.items() if read_facts(sources[n]).get("model") != self._model_digest(context, i)]
        if not stale:
            return ()
        return (
            f"the router statistics of {', '.join(stale)} were computed on another merged model: "
            "the gates are approximate unless its attention and norms were much the same",
        )

    def _model_digest(self, context: FitContext, index: int) -> str:
        return context.model_digest(self.path_of(index))

    def moments(self, context: FitContext) -> list[Moments]:
        """The statistics of every expert, from its file or from its text."""
        shape = len(context.gates), context.gates[0].shape[1]
        folder = None if self.statistics is None else context.relative_to / self.statistics
        model: list[RunningMoE] = []
        return [self._moments_of(context, index, folder, shape, model) for index in range(len(context.experts))]

    def _moments_of(
        self, context: FitContext, index: int, folder: Path | None, shape: tuple[int, int], model: list[RunningMoE]
    ) -> Moments:
        """`model` is loaded for the first expert that needs it."""
        expert = context.experts[index]
        texts, facts = context.texts[expert], self._facts(context, index)
        saved = _file(folder, expert) if folder is not None else None
        if saved is not None and saved.is_file() and (not texts.documents or _same(saved, facts)):
            return load_moments(saved, *shape)
        if not model:
            model.append(self.running(context))
        moments = collect(model[0], texts.documents, self.tokens, self.path_of(index), facts)
        if saved is not None:
            save_moments(saved, moments)
        return moments

    def _facts(self, context: FitContext, index: int) -> dict[str, Any]:
        texts = context.texts[context.experts[index]]
        settings = {"tokens_a_text": self.tokens, "path": self.path, "device": self.device, "dtype": self.dtype}
        return {"documents": list(texts.hashes), "text": texts.digest, "model": self._model_digest(context, index), **settings}


def collect(
    model: RunningMoE, documents: Sequence[str], tokens: int, path: int | None, facts: dict[str, Any] | None = None
) -> Moments:
    """The sums over all router inputs while `documents` run on `path`."""
    totals = Accumulator()
    for document in documents:
        totals.add(model.router_inputs(model.encode(document, tokens), path))
    return totals.moments(facts or {})


class Accumulator:
    """Adds up router inputs: products in float32 a text at a time, totals in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: list[torch.Tensor] = []
        self._moments: list[torch.Tensor] = []

    def add(self, inputs_LTH: Sequence[torch.Tensor]) -> None:
        """One text's router inputs, a tensor [T, H] for each layer."""
        self.tokens += len(inputs_LTH[0])
        self._sums = _added(self._sums, [state_TH.sum(dim=0).double() for state_TH in inputs_LTH])
        self._moments = _added(self._moments, [(state_TH.T @ state_TH).double() for state_TH in inputs_LTH])

    def moments(self, facts: dict[str, Any]) -> Moments:
        """What was added so far."""
        if self.tokens == 0:
            raise InputError("calibration: no text has a token: name files with some text")
        return Moments(self.tokens, _stacked(self._sums), _stacked(self._moments), facts)


def _stacked(parts: list[torch.Tensor]) -> np.ndarray:
    return np.stack([part.cpu().numpy() for part in parts]).astype(np.float32)


def _added(totals: list[torch.Tensor], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts


def _file(folder: Path, expert: str) -> Path:
    return folder / f"{expert}.safetensors"


def _same(saved: Path, facts: dict[str, Any]) -> bool:
    known = read_facts(saved)
    return all(known.get(key) == value for key, value in facts.items())


def gates_of(context: FitContext, make: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """The gate that `make(layer)` returns, for every layer, by name."""
    return {gate.name: make(layer) for layer, gate in enumerate(context.gates)}
