"""The base of routers that read calibration text: settings, reading it, running the merged model over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from moerge.checkpoint.staging import STATISTICS
from moerge.errors import InputError
from moerge.extras import require
from moerge.operations.fitter import FitContext, MoESize
from moerge.routers.base import FittedRouter
from moerge.routers.moments import GramStatistics, load_moments, read_facts, save_moments
from moerge.runtime.forced_routing import ForcedRoutingModel
from moerge.runtime.replicas import ModelReplicas
from moerge.texts import Document, TextRequest, Texts, read_texts, text_of

if TYPE_CHECKING:
    import torch


Count = Annotated[int, Field(ge=1)]


def expert_texts(request: TextRequest, expert: str, limit: int, kind: str) -> Texts:
    """The first `limit` documents of an expert's calibration text; InputError if the recipe has none."""
    location = request.calibration.get(expert)
    if location is None:
        raise InputError(
            f"{request.source}: the {kind} router needs text for every expert: add '{expert}: FILE' to 'calibration'"
        )
    return read_texts(expert, location, relative_to=request.folder, limit=limit)


class ModelRouter(FittedRouter):
    """A router for which the merged model runs, on `device`, in the checkpoint's element type unless `dtype` says otherwise."""

    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @property
    def runs_model(self) -> bool:
        """Return whether these settings need the model at all."""
        return True

    def require(self) -> None:
        """The merged model runs in transformers."""
        if self.runs_model:
            require("models", f"the {self.kind} router")

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """The whole merged model, a float64 matrix [hidden, hidden] twice for each layer, and the texts that run."""
        return size.nbytes * (2 if self.dtype == "float32" else 1) + 2 * size.layers * size.hidden**2 * 8

    def running(self, context: FitContext) -> ForcedRoutingModel:
        """The merged model in memory."""
        experts, layers = len(context.experts), len(context.outputs)
        return ForcedRoutingModel(context.folder, experts=experts, layers=layers, device=self.device, dtype=self.dtype)

    def replicas(self, context: FitContext) -> ModelReplicas:
        """Return replicas of the merged model, one for each thread."""
        return ModelReplicas(self.running(context), context.threads)


class CalibratedRouter(ModelRouter):
    """A router fitted to what the merged model's routers see on each expert's calibration text.

    Of each expert at most `texts` documents of at most `tokens` tokens are run, one by one. Meanwhile the routers are
    overruled: with `path: own` each text runs through the expert it belongs to, with `path: uniform` through all in equal
    parts.
    """

    texts: Count = 200
    tokens: Annotated[int, Field(ge=2)] = 512
    path: Literal["own", "uniform"] = "own"

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """Besides, what each of the texts that run at once makes the routers see, and what losses it has."""
        states = threads * self.tokens * (size.layers * size.hidden + 3 * size.vocabulary) * 4
        return super().memory_bytes(size, threads) + states

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Two for each parameter on the path of each token of each pass, and two for each product of router inputs."""
        modules = 1 if self.path == "own" else size.experts
        tokens = sum(_tokens(document, self.tokens) for texts in calibration for document in texts.documents)
        products = size.layers * size.hidden**2
        return 2.0 * tokens * (self.passes(size.experts) * (size.shared + modules * size.module) + products)

    def passes(self, experts: int) -> int:
        """Return the number of times that each text runs."""
        return 1

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The first `texts` documents of every expert's entry in the recipe's `calibration`."""
        return tuple(self._texts(request, expert) for expert in request.experts)

    def _texts(self, request: TextRequest, expert: str) -> Texts:
        return expert_texts(request, expert, self.texts, self.kind)

    def path_of(self, expert: int) -> int | None:
        """Return the expert on which the texts of the expert with this index run."""
        return expert if self.path == "own" else None


class MomentRouter(CalibratedRouter):
    """A calibrated router that needs no more of each text than its `GramStatistics`, which add up.

    They are kept in the mixture, a file for each expert, or in the folder that `statistics` names (relative to the recipe). An
    expert whose file is there, in that folder or in the mixture that it is taken from, needs no calibration text any more: so
    experts can be added, which need text of their own only, or removed. Text that is given is used, unless the file stems from
    the very same text, settings and merged model.
    """

    statistics: str | None = None

    def _texts(self, request: TextRequest, expert: str) -> Texts:
        if expert in request.calibration:
            return super()._texts(request, expert)
        own, kept = request.statistics.get(expert), self.statistics
        places = [] if kept is None else [(f"{kept}/{expert}.safetensors", _file(request.folder / kept, expert))]
        places += [] if own is None else [(str(own.absolute()), own)]
        for location, file in places:
            if file.is_file():
                return Texts(expert, location, (), tuple(read_facts(file).get("documents", ())))
        if own is None:
            return super()._texts(request, expert)
        raise InputError(
            f"{request.source}: the {self.kind} router needs text of {expert}, since {own.parent} has no statistics of it: "
            f"add '{expert}: FILE' to 'calibration'"
        )

    def remarks(self, context: FitContext) -> tuple[str, ...]:
        """Warn about statistics that stem from another model than the one that was merged now."""
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

    def moments(self, context: FitContext) -> list[GramStatistics]:
        """The statistics of every expert, from its file or from its text."""
        shape = len(context.outputs), context.outputs[0].shape[1]
        folder = context.folder / STATISTICS if self.statistics is None else context.relative_to / self.statistics
        found = []
        with ExitStack() as stack:
            replicas = None
            for index, expert in enumerate(context.experts):
                texts, facts = context.texts[expert], self._facts(context, index)
                target = _file(folder, expert)
                saved = target if texts.documents else context.relative_to / texts.location
                reused = not texts.documents or (saved.is_file() and _same(saved, facts))
                if reused:
                    found.append(load_moments(saved, *shape))
                    context.advance(len(texts.documents))
                else:
                    replicas = replicas or stack.enter_context(self.replicas(context))  # only now: it may not be needed at all
                    found.append(collect(replicas, texts.documents, self.tokens, self.path_of(index), facts, context.advance))
                if saved != target or not reused:
                    save_moments(target, found[-1])
        return found

    def _facts(self, context: FitContext, index: int) -> dict[str, Any]:
        texts = context.texts[context.experts[index]]
        settings = {"tokens_a_text": self.tokens, "path": self.path, "device": self.device, "dtype": self.dtype}
        return {"documents": list(texts.hashes), "text": texts.digest, "model": self._model_digest(context, index), **settings}


def collect(
    replicas: ModelReplicas,
    documents: Sequence[Document],
    tokens: int,
    path: int | None,
    facts: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> GramStatistics:
    """The sums over all router inputs while `documents` run on `path`."""
    totals = Accumulator(replicas)
    ids = [replicas.model.encode(document, tokens) for document in documents]
    for batch in replicas.run(lambda model, ids_1T: model.router_inputs(ids_1T, path), ids):
        totals.add(batch)
        advance(len(batch))
    return totals.moments(facts or {})


class Accumulator:
    """Adds up router inputs text after text: products in float32 a text at a time, totals in float64."""

    def __init__(self, replicas: ModelReplicas) -> None:
        self.tokens = 0
        self._replicas = replicas
        self._layers: list[_Layer] = []

    def add(self, inputs: Sequence[Sequence[torch.Tensor]], targets: Sequence[torch.Tensor] | None = None) -> None:
        """Some texts' router inputs, for each text a tensor [T, H] for each layer, and its targets [T, C]."""
        import torch

        if targets is None:
            targets = [torch.ones_like(inputs_LTH[0][:, :1]) for inputs_LTH in inputs]
        self.tokens += sum(map(len, targets))
        self._layers = self._layers or [_Layer() for _ in inputs[0]]
        self._replicas.map_layers(
            lambda layer: self._layers[layer].add([text[layer] for text in inputs], targets), range(len(inputs[0]))
        )

    @property
    def gram_LHH(self) -> np.ndarray:
        """The sum of x^T x, in float64."""
        return np.stack([layer.gram_HH.cpu().numpy() for layer in self._layers])

    @property
    def product_LHC(self) -> np.ndarray:
        """The sum of x^T y over targets y, in float64; of x if there are none."""
        return np.stack([layer.product_HC.cpu().numpy() for layer in self._layers])

    def moments(self, facts: dict[str, Any]) -> GramStatistics:
        """Return the moments of everything added so far."""
        if self.tokens == 0:
            raise InputError("calibration: no text has a token: name files with some text")
        sum_LH = self.product_LHC[..., 0].astype(np.float32)
        return GramStatistics(self.tokens, sum_LH, self.gram_LHH.astype(np.float32), facts)


class _Layer:
    gram_HH: Any = 0.0
    product_HC: Any = 0.0

    def add(self, states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        for state_TH, target_TC in zip(states, targets, strict=True):
            self.gram_HH = self.gram_HH + (state_TH.T @ state_TH).double()
            self.product_HC = self.product_HC + (state_TH.T @ target_TC).double()


def _tokens(document: Document, most: int) -> int:
    """Return the number of tokens of a text, at most `most`, at four characters each."""
    return min(most, 1 + len(text_of(document)) // 4)


def _file(folder: Path, expert: str) -> Path:
    return folder / f"{expert}.safetensors"


def _same(saved: Path, facts: dict[str, Any]) -> bool:
    known = read_facts(saved)
    return all(known.get(key) == value for key, value in facts.items())


def gates_by_name(context: FitContext, make: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """The gate that `make(layer)` returns, for every layer, by name.

    The mean row is subtracted for gates with a sigmoid, which it would drive to 1 for all experts: it says nothing about which.
    """
    gates = {output.name: make(layer) for layer, output in enumerate(context.outputs)}
    if context.gate == "softmax":
        return gates
    return {name: gate_EH - gate_EH.mean(axis=0) for name, gate_EH in gates.items()}
