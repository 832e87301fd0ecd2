"""Routers of a dense merge of mixtures: `routers` in a recipe says where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moerge.architecture.config import normalized_config
from moerge.architecture.family import ExpectedTensor
from moerge.checkpoint.expert import mixture_tensors
from moerge.checkpoint.reader import open_folder
from moerge.checkpoint.staging import STATISTICS
from moerge.errors import InputError
from moerge.files import atomic_path
from moerge.operations.fitter import FitContext, MoESize
from moerge.operations.operations import Fit, Operation
from moerge.routers.base import Router
from moerge.routers.calibrated import CalibratedRouter
from moerge.routers.calibration import Agreement, Routed, agreement, fit_gate
from moerge.runtime.layerwise import LayerwiseModel, MixtureTensors
from moerge.runtime.tokens import encode_checked, load_tokenizer

_REPORT = "calibration.json"


class BaseRouters(Router):
    """The base's routers."""

    kind: ClassVar[str] = "base"


class AverageRouters(Router):
    """The plain mean of the experts' routers, whatever the method for the rest."""

    kind: ClassVar[str] = "average"


class MergedRouters(Router):
    """Routers merged like any other tensor, by the recipe's method."""

    kind: ClassVar[str] = "merged"


class CalibratedRouters(CalibratedRouter):
    """Routers fitted to the experts' own routing on the merged model's activations (HARC, arXiv 2606.03391; see `calibration`).

    Layer after layer: the expert's texts run through the merged model whose earlier routers are fitted already, and the layer's
    router is fitted to say of these states what each expert's own router says of them. `start` is the router to begin with,
    `newton` the number of Newton steps after HARC's one, `iterations` the most conjugate-gradient steps in each. What it did is
    in router_statistics/calibration.json of the result.
    """

    kind: ClassVar[str] = "calibrated"
    texts: Annotated[int, Field(ge=1)] = 50
    start: Literal["average", "base"] = "average"
    newton: Annotated[int, Field(ge=0, le=50)] = 3
    iterations: Annotated[int, Field(ge=1, le=10000)] = 100

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """One layer, the states of all texts and the router inputs of one layer, several times over in float64."""
        return size.nbytes // max(1, size.layers) + 10 * self.texts * self.tokens * size.hidden * 8

    def passes(self, experts: int) -> int:
        """Each text runs up to each router, and through each layer."""
        return 2

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """One fit a layer, front to back."""
        names, gates = list(context.texts), {int(output.role.split(".")[1]): output for output in context.outputs}
        model = self._model(context)
        owners, states = self._texts_of(context, model)
        fitted, report = {}, []
        for number in range(model.layers):
            router_EH = None
            if number in gates:
                gate = gates[number]
                start_EH = self._start(context, gate.role, names)
                with model.layer(number, router_ED=start_EH) as layer:
                    inputs = [layer.inputs(state_TH).float().cpu().numpy() for state_TH in states]
                sources = {name: self._routed(context, gate.role, name, owners, inputs) for name in names}
                fit_EH = fit_gate(list(sources.values()), start_EH, newton=self.newton, iterations=self.iterations)
                router_EH = fitted[gate.name] = fit_EH.astype(np.float32)
                top_k = int(model.mixture.config["num_experts_per_tok"])
                report += [_compared(number, name, source, start_EH, router_EH, top_k) for name, source in sources.items()]
            with model.layer(number, router_ED=router_EH) as layer:
                states = [layer.run(state_TH) for state_TH in states]
        _write(context, report)
        return fitted

    def _model(self, context: FitContext) -> LayerwiseModel:
        checkpoint = open_folder(context.folder)
        family, tensors = mixture_tensors(checkpoint)
        assert family is not None
        mixture = MixtureTensors(family, normalized_config(checkpoint.config, family), tensors)
        return LayerwiseModel(checkpoint.config, mixture, name=str(context.folder), dtype=self.dtype, device=self.device)

    def _texts_of(self, context: FitContext, model: LayerwiseModel) -> tuple[list[str], list[Any]]:
        """The expert that each text belongs to, and the embeddings of its tokens."""
        tokenizer, owners, states = load_tokenizer(context.folder), [], []
        for name, texts in context.texts.items():
            for document in texts.documents:
                ids = encode_checked(tokenizer, document, self.tokens, model.vocabulary, name).tolist()
                if ids:
                    owners.append(name)
                    states.append(model.embed(ids))
                context.advance(1)
            if name not in owners:
                raise InputError(f"calibration.{name}: no text has a token: name a file with some")
        return owners, states

    def remarks(self, context: FitContext) -> tuple[str, ...]:
        """The KL and the overlap, before and after."""
        rows = json.loads((context.folder / STATISTICS / _REPORT).read_text(encoding="utf-8"))["layers"]

        def mean(when: str, key: str) -> float:
            return float(np.mean([row[when][key] for row in rows]))

        worst = min(rows, key=lambda row: row["after"]["overlap"])
        return (
            f"the {self.kind} routers: KL from the experts' own routing {mean('before', 'kl'):.3g} before and "
            f"{mean('after', 'kl'):.3g} after; tokens with the same experts {mean('before', 'overlap'):.0%} before and "
            f"{mean('after', 'overlap'):.0%} after, fewest in layer {worst['layer']} on {worst['expert']} "
            f"({worst['after']['overlap']:.0%})",
        )

    def operation(self, gate: ExpectedTensor) -> Operation:
        """Room for the router."""
        return Fit(self)

    def _start(self, context: FitContext, role: str, names: Sequence[str]) -> np.ndarray:
        if self.start == "base":
            return context.read("base", role)
        mean_EH: np.ndarray = np.mean([context.read(name, role).astype(np.float64) for name in names], axis=0)
        return mean_EH.astype(np.float32)

    def _routed(self, context: FitContext, role: str, name: str, owners: Sequence[str], states: Sequence[np.ndarray]) -> Routed:
        own = [state_TH for owner, state_TH in zip(owners, states, strict=True) if owner == name]
        return Routed(np.concatenate(own), context.read(name, role))


ROUTERS: Mapping[str, type[Router]] = {
    known.kind: known for known in (CalibratedRouters, BaseRouters, AverageRouters, MergedRouters)
}
"""Where the routers of merged mixtures may come from."""


def _compared(layer: int, expert: str, source: Routed, before_EH: np.ndarray, after_EH: np.ndarray, top_k: int) -> dict[str, Any]:
    def told(found: Agreement) -> dict[str, float]:
        return {"kl": found.kl, "overlap": found.overlap}

    before, after = agreement(source, before_EH, top_k), agreement(source, after_EH, top_k)
    return {"layer": layer, "expert": expert, "tokens": len(source.states_TH), "before": told(before), "after": told(after)}


def _write(context: FitContext, report: Sequence[Mapping[str, Any]]) -> None:
    folder = context.folder / STATISTICS
    folder.mkdir(exist_ok=True)
    with atomic_path(folder / _REPORT) as beside:
        beside.write_text(json.dumps({"layers": list(report)}, indent=1) + "\n", encoding="utf-8")
