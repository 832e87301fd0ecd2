"""Everything in a smaller mixture that must be computed on text: folded experts and fitted routers, layer by layer.

Two streams of the same texts run: through the mixture as it was, for the routing that is to be matched, and through the smaller
one as far as it is computed, for the inputs that its layers will really see. Shapes: T tokens, D width, E experts that are left,
F neurons.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moerge.architecture.config import normalized_config
from moerge.errors import InputError
from moerge.files import scratch_folder
from moerge.operations.fitter import FitContext, Fitter, MoESize, Unit
from moerge.reduction.choice import Choice, LayerChoice
from moerge.reduction.folding import (
    MOST_NEURONS,
    ExpertWeights,
    fitted_down,
    joint_subspace,
    neuron_order,
    weighted,
)
from moerge.reduction.passing import TextPass, TokenizedText, spread, tokenized
from moerge.reduction.router_fit import RouterFit, fit_router
from moerge.reduction.settings import FittedFold, Fold, Reduction, SubspaceFold
from moerge.runtime.layerwise import Dispatch, Layer, LayerwiseModel, MixtureTensors
from moerge.tensors.source import Source
from moerge.tensors.spec import TensorSpec
from moerge.tensors.streams import read_values
from moerge.texts import Texts, text_of

if TYPE_CHECKING:
    import torch

    from moerge.tensors.tensor import Tensor

_PARTS = ("gate", "up", "down")


class ReductionFitter(Fitter):
    """Computes folded experts and fitted routers of the layers of a choice."""

    kind: ClassVar[str] = "reduction"
    counts: ClassVar[Unit] = "tokens"

    def __init__(
        self, mixture: MixtureTensors, before: Mapping[str, Any], after: Mapping[str, Any], choice: Choice, reduction: Reduction
    ) -> None:
        self._mixture, self._before, self._after = mixture, before, after
        self._choices = {layer.layer: layer for layer in choice.layers}
        self._reduction = reduction
        self.routers: dict[int, RouterFit] = {}

    @property
    def title(self) -> str:
        """Name what is computed."""
        folds = self._reduction.merge is not None and self._reduction.merge.computed
        parts = (["the folded experts"] if folds else []) + (["the routers"] if self._reduction.router == "fit" else [])
        return " and ".join(parts)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what decides the values."""
        fold = self._reduction.merge
        own = {} if fold is None else {"merge": fold.kind, **fold.model_dump()}
        keys = ("router", "tokens", "texts", "similarity_tokens", "dtype", "device")
        return {**own, **{key: getattr(self._reduction, key) for key in keys}}

    @property
    def runs_model(self) -> bool:
        """Return whether text runs."""
        return self._reduction.needs_text

    @property
    def needs_torch(self) -> bool:
        """Return whether torch is in memory while it works."""
        return self._reduction.needs_text

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """Two layers, as they were and as they become, in float32, and one group of experts."""
        layer = max(
            sum(tensor.nbytes for expert in experts for tensor in expert.values()) for experts in self._mixture.experts.values()
        )
        return 4 * layer

    def steps(self, calibration: Sequence[Texts]) -> int:
        """A rough number of tokens times layers."""
        tokens = sum(min(self._reduction.tokens, 1 + len(text_of(doc)) // 4) for texts in calibration for doc in texts.documents)
        return tokens * len(self._choices) if self._reduction.needs_text else len(self._choices)

    def fit(self, context: FitContext) -> Mapping[str, np.ndarray]:
        """Return all outputs by name; large ones lie in a file until they are stored."""
        results = _Results(context.outputs)
        if not self._reduction.needs_text:
            for choice in self._choices.values():
                results.add(self._mixture, choice, self._folded(choice, None, None))
                context.advance(1)
            return results.arrays
        with scratch_folder("moerge-reduce-") as folder, _Streams(self, context, folder) as streams:
            streams.run(results)
        return results.arrays

    def _folded(self, choice: LayerChoice, layer: Layer | None, inputs_TD: torch.Tensor | None) -> dict[int, ExpertWeights]:
        """The folded experts of a layer by their places; none where the plan merges them."""
        fold = self._reduction.merge
        if fold is None or not fold.computed:
            return {}
        groups = ((slot, expert) for slot, expert in enumerate(choice.kept) if len(choice.members(expert)) > 1)
        return {slot: self._group(fold, choice, expert, layer, inputs_TD) for slot, expert in groups}

    def _group(
        self, fold: Fold, choice: LayerChoice, expert: int, layer: Layer | None, inputs_TD: torch.Tensor | None
    ) -> ExpertWeights:
        numbers, weights = choice.members(expert), choice.weights(expert)
        members = [_weights(self._mixture.experts[choice.layer][number]) for number in numbers]
        seen = [_neurons(layer, member, inputs_TD) for member in members] if layer is not None and inputs_TD is not None else []
        if fold.align:
            self._check_neurons(members[0])
            orders = [neuron_order(members[0], member, *((seen[0], seen[n]) if seen else ())) for n, member in enumerate(members)]
            members = [member.permuted(order) for member, order in zip(members, orders, strict=True)]
            seen = [own_TF[:, order] for own_TF, order in zip(seen, orders, strict=True)] if seen else []
        average = weighted(members, weights)
        if isinstance(fold, SubspaceFold):
            return self._projected(fold, members, average, seen, inputs_TD)
        if isinstance(fold, FittedFold):
            assert layer is not None and inputs_TD is not None
            target_TD = sum(w * (own_TF @ m.down_DF.T) for w, own_TF, m in zip(weights, seen, members, strict=True))
            down_DF = fitted_down(average.down_DF, np.asarray(target_TD), _neurons(layer, average, inputs_TD), fold.ridge)
            return average._replace(down_DF=down_DF)
        return average

    def _check_neurons(self, expert: ExpertWeights) -> None:
        neurons = len(expert.gate_FD)
        if neurons > MOST_NEURONS:
            raise InputError(
                f"reduce.merge.align: experts of {neurons:,} neurons take too long to put in order "
                f"(at most {MOST_NEURONS:,}): leave it out"
            )

    def _projected(
        self,
        fold: SubspaceFold,
        members: Sequence[ExpertWeights],
        average: ExpertWeights,
        seen: Sequence[np.ndarray],
        inputs_TD: Any,
    ) -> ExpertWeights:
        """The average on the joint subspace of its members, each of the three matrices on its own."""
        grams: list[Any] = [None, None, None]
        if fold.whiten:
            own_TD = inputs_TD.double().cpu().numpy()
            common = [own_TD.T @ own_TD] * len(members)
            grams = [common, common, [own_TF.T @ own_TF for own_TF in seen]]
        found = []
        for matrices, whole, gram in zip(zip(*members, strict=True), average, grams, strict=True):
            basis_OR = joint_subspace(matrices, fold.rank, gram)
            found.append(basis_OR @ (basis_OR.T @ whole))
        return ExpertWeights(*found)


class _Streams:
    """The texts on their way through the mixture as it was and as it becomes. A context manager."""

    def __init__(self, fitter: ReductionFitter, context: FitContext, folder: Path) -> None:
        self._fitter, self._context = fitter, context
        reduction, mixture = fitter._reduction, fitter._mixture
        smaller = MixtureTensors(mixture.family, normalized_config(fitter._after, mixture.family), mixture.tensors)
        options: dict[str, Any] = {"name": "model", "dtype": reduction.dtype, "device": reduction.device}
        self._new = LayerwiseModel(fitter._after, smaller, **options)
        texts = _all_texts(context, self._new, reduction.tokens)
        total = sum(len(text.ids) for text in texts)
        limit = reduction.similarity_tokens * len({text.domain for text in texts})
        self._places = [spread(len(text.ids), total, limit) for text in texts]
        self._after = TextPass(self._new, texts, folder, context.threads)
        self._before: TextPass | None = None
        if reduction.router == "fit":
            self._before = TextPass(LayerwiseModel(fitter._before, mixture, **options), texts, folder, context.threads)

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in (self._after, self._before):
            if stream is not None:
                stream.__exit__(*exception)

    def run(self, results: _Results) -> None:
        """All layers, in order."""
        choices, mixture = self._fitter._choices, self._fitter._mixture
        for number in range(self._new.layers):
            choice = choices.get(number)
            target_TE = self._target(number, choice)
            if choice is None:
                with self._new.layer(number) as layer:
                    self._move(layer)
                continue
            own_ED = read_values(Source("model", mixture.routers[number])).reshape(mixture.routers[number].shape)
            rows_ED = own_ED[list(choice.kept)]
            kept = [mixture.experts[number][expert] for expert in choice.kept]
            with self._new.layer(number, router_ED=rows_ED, experts=kept) as layer:
                inputs_TD = self._inputs(layer)
                folded = self._fitter._folded(choice, layer, inputs_TD)
            if target_TE is not None and choice.gone:
                self._fitter.routers[number] = fit_router(rows_ED, inputs_TD.double().cpu().numpy(), target_TE)
                rows_ED = self._fitter.routers[number].weight_ED
            results.add(mixture, choice, folded, rows_ED)
            experts = [_as_parts(folded[slot]) if slot in folded else kept[slot] for slot in range(len(kept))]
            with self._new.layer(number, router_ED=rows_ED, experts=self._merged(choice, experts)) as layer:
                self._move(layer)

    def _merged(self, choice: LayerChoice, experts: list[Any]) -> list[Any]:
        """The experts with those that the plan has merged already, which lie in the result's folder."""
        fold = self._fitter._reduction.merge
        if fold is None or fold.computed:
            return experts
        return list(self._written.experts[choice.layer])

    @property
    def _written(self) -> MixtureTensors:
        from moerge.checkpoint.expert import mixture_tensors
        from moerge.checkpoint.reader import open_folder

        checkpoint = open_folder(self._context.folder, name="result")
        _, tensors = mixture_tensors(checkpoint)
        smaller = self._new.mixture
        return MixtureTensors(smaller.family, smaller.config, tensors)

    def _target(self, number: int, choice: LayerChoice | None) -> np.ndarray | None:
        """The probabilities that a fitted router should give sampled tokens: the old ones, added up in groups, [T, E]."""
        if self._before is None:
            return None
        with self._before.model.layer(number) as layer:

            def look(text: int, dispatch: Dispatch) -> np.ndarray:
                logits_TE = layer.logits(dispatch.inputs_TD)[self._places[text].tolist()]
                return np.asarray(logits_TE.double().softmax(dim=-1).cpu().numpy())

            found = [shares_TE for _, shares_TE in self._before.move(layer, look if choice else None) if shares_TE is not None]
        if choice is None:
            return None
        shares_TE = np.concatenate(found)
        grouped_TE = np.stack([shares_TE[:, list(choice.members(expert))].sum(axis=1) for expert in choice.kept], axis=1)
        return np.asarray(grouped_TE / np.maximum(grouped_TE.sum(axis=1, keepdims=True), 1e-300))

    def _inputs(self, layer: Layer) -> torch.Tensor:
        import torch

        return torch.cat([inputs_TD[self._places[text].tolist()] for text, inputs_TD in self._after.inputs(layer)])

    def _move(self, layer: Layer) -> None:
        for text, _ in self._after.move(layer):
            self._context.advance(len(self._after.texts[text].ids))


class _Results:
    """Results by the names of outputs. Experts lie in files until they are stored."""

    def __init__(self, outputs: Sequence[TensorSpec]) -> None:
        self._by_role = {output.role: output for output in outputs}
        self.arrays = _Arrays()

    def add(
        self, mixture: MixtureTensors, choice: LayerChoice, folded: Mapping[int, ExpertWeights], rows_ED: np.ndarray | None = None
    ) -> None:
        """Keep a layer's results."""
        prefix = f"layers.{choice.layer}."
        for role, output in self._by_role.items():
            if role == f"{prefix}router":
                assert rows_ED is not None
                self.arrays[output.name] = rows_ED.astype(np.float32)
            elif role.startswith(prefix):
                self._add_experts(mixture, choice, folded, output)

    def _add_experts(
        self, mixture: MixtureTensors, choice: LayerChoice, folded: Mapping[int, ExpertWeights], output: TensorSpec
    ) -> None:
        """Fill a folded expert's matrix, or a tensor of all experts of which some are folded."""
        file = self.arrays.folder / str(len(self.arrays))
        array = self.arrays[output.name] = np.memmap(file, np.float32, "w+", shape=output.shape)
        number, _, part = output.role.partition(".ffn.")[2].rpartition(".")
        if number:
            array[:] = _as_parts(folded[int(number)])[part]
            return
        for slot, expert in enumerate(choice.kept):
            own = _as_parts(folded[slot]) if slot in folded else _values(mixture.experts[choice.layer][expert])
            array[slot] = np.concatenate([own[name] for name in part.split("_")])


class _Arrays(dict[str, np.ndarray]):
    """Arrays, and the folder that some of them lie in, which is removed with them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="moerge-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _all_texts(context: FitContext, model: LayerwiseModel, tokens: int) -> list[TokenizedText]:
    found: list[TokenizedText] = []
    for domain, texts in context.texts.items():
        found += tokenized(context.models["model"].folder, domain, texts.documents, tokens, model.vocabulary)
    return found


def _values(expert: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {part: read_values(Source("model", tensor)).reshape(tensor.shape) for part, tensor in expert.items()}


def _weights(expert: Mapping[str, Tensor]) -> ExpertWeights:
    own = _values(expert)
    return ExpertWeights(*(own[part].astype(np.float64) for part in _PARTS))


def _as_parts(weights: ExpertWeights) -> dict[str, np.ndarray]:
    return dict(zip(_PARTS, weights, strict=True))


def _neurons(layer: Layer, expert: ExpertWeights, inputs_TD: torch.Tensor) -> np.ndarray:
    """An expert's activations in float64, [T, F]."""
    import torch

    own = {part: torch.from_numpy(np.ascontiguousarray(matrix)) for part, matrix in _as_parts(expert).items()}
    return np.asarray(layer.neurons(own, inputs_TD.double().cpu()).numpy())
