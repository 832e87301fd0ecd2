"""Texts on their way through a mixture, layer by layer; what its experts do is added up on the way.

Shapes: T tokens, K chosen experts, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moerge.errors import InputError
from moerge.progress import Advance
from moerge.reduction.scores import table_of
from moerge.reduction.states import States
from moerge.reduction.sums import Sums
from moerge.runtime.layerwise import Dispatch, Layer, LayerwiseModel

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
_TINY = 1e-30


@dataclass(frozen=True)
class TokenizedText:
    """A text of a domain as tokens."""

    domain: str
    ids: Sequence[int]


class TextPass:
    """Texts with their states between layers. A context manager; texts run on `threads` at once, each on one thread.

    So that results do not depend on the number of threads, sums inside torch are made by one thread, and those over texts in the
    order of texts.
    """

    def __init__(self, model: LayerwiseModel, texts: Sequence[TokenizedText], folder: Path, threads: int) -> None:
        width = model.embed([0]).shape[1]
        self.model, self.texts = model, texts
        self._states = States([len(text.ids) for text in texts], width, model.dtype, folder)
        self._pool = ThreadPoolExecutor(threads if model.device.type == "cpu" else 1)
        self._threads = threads
        for number, text in enumerate(texts):
            self._states.write(number, model.embed(text.ids))

    def __enter__(self) -> TextPass:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(
        self, layer: Layer, look: Callable[[int, Dispatch], Result] | None = None, *, move: bool = True
    ) -> Iterator[tuple[int, list[Result]]]:
        """Run every text through a layer; yields its number and what `look` returned, in the order of texts.

        With `move` the layer's output takes the place of its input.
        """
        for start in range(0, len(self.texts), self._threads):
            numbers = range(start, min(start + self._threads, len(self.texts)))
            for number, (state_TD, results) in zip(
                numbers, self._pool.map(lambda n: self._run(layer, n, look), numbers), strict=True
            ):
                if move:
                    self._states.write(number, state_TD)
                yield number, results

    def _run(
        self, layer: Layer, number: int, look: Callable[[int, Dispatch], Result] | None
    ) -> tuple[torch.Tensor, list[Result]]:
        results: list[Result] = []
        visit = None if look is None else lambda dispatch: results.append(look(number, dispatch))
        state_TD = self._states.read(number).to(self.model.device)
        return layer.run(state_TD, visit), results


def gather_sums(texts: TextPass, sampled: Mapping[int, int], *, similar: bool, advance: Advance) -> dict[str, Sums]:
    """Pass texts through all layers and add up what their experts do, for each domain.

    Args:
        texts: What runs.
        sampled: The number of tokens of each text, by its number, that every expert runs on.
        similar: True to gather what groups are made of.
        advance: Is told of tokens times layers that are done.

    Returns:
        The sums by domain.
    """
    model = texts.model
    routed = sorted(model.mixture.routers)
    experts, width = model.mixture.routers[routed[0]].shape
    domains = dict.fromkeys(text.domain for text in texts.texts)
    found = {domain: Sums.zeros(len(routed), experts, width, similar=similar) for domain in domains}
    for number in range(model.layers):
        with model.layer(number) as layer:
            look = None
            if number in routed:
                look = lambda text, dispatch, layer=layer: _parts(layer, dispatch, experts, sampled[text] if similar else 0)  # noqa: E731
            for text, parts in texts.each(layer, look):
                for part in parts:
                    _add(found[texts.texts[text].domain], routed.index(number), part)
                advance(len(texts.texts[text].ids))
    return found


def _add(sums: Sums, place: int, part: Mapping[str, Any]) -> None:
    for name, values in part.items():
        if not np.isfinite(values).all():
            raise InputError("calibration: a layer's outputs are not finite: run with 'dtype: float32', or verify the model")
        whole = sums[name]
        whole[place] = np.maximum(whole[place], values) if name == "peak_LE" else whole[place] + values


def _parts(layer: Layer, dispatch: Dispatch, experts: int, sampled: int) -> dict[str, Any]:
    """One text's share of the sums of a layer."""
    chosen_TK, outputs_TKD = dispatch.chosen_TK.cpu().numpy(), dispatch.outputs_TKD.float().cpu().numpy()
    norms_TK = np.linalg.norm(outputs_TKD.astype(np.float64), axis=2)
    flat, outputs_ND = chosen_TK.reshape(-1), outputs_TKD.reshape(-1, outputs_TKD.shape[-1])
    output_ED, peak_E = np.zeros((experts, outputs_ND.shape[1])), np.zeros(experts)
    for expert in np.unique(flat):
        own_ND = outputs_ND[flat == expert]
        output_ED[expert], peak_E[expert] = own_ND.sum(axis=0, dtype=np.float64), np.abs(own_ND).max()
    logits_TE = layer.logits(dispatch.inputs_TD)
    parts = {
        "table_LEAB": table_of(chosen_TK, dispatch.gates_TK.float().cpu().numpy(), norms_TK, experts),
        "output_LED": output_ED,
        "peak_LE": peak_E,
        "mass_LE": logits_TE.softmax(dim=-1).double().sum(dim=0).cpu().numpy(),
        "tokens_L": float(len(chosen_TK)),
    }
    return parts | (_common(layer, dispatch.inputs_TD, logits_TE, sampled) if sampled else {})


def _common(layer: Layer, inputs_TD: torch.Tensor, logits_TE: torch.Tensor, sampled: int) -> dict[str, Any]:
    """What every expert does on `sampled` tokens, evenly spread."""
    import torch

    places = np.linspace(0, len(inputs_TD) - 1, min(sampled, len(inputs_TD))).round().astype(int)
    chosen_TD, logits_TE = inputs_TD[places], logits_TE[places].double()
    outputs_ETD = torch.stack([layer.output(expert, chosen_TD).double() for expert in range(len(layer.experts))])
    products_TEE = torch.einsum("etd,ftd->tef", outputs_ETD, outputs_ETD)
    length_TE = products_TEE.diagonal(dim1=1, dim2=2).clamp_min(_TINY).sqrt()
    cosine_TEE = products_TEE / (length_TE[:, :, None] * length_TE[:, None, :])
    found = {
        "mean_LED": outputs_ETD.sum(dim=1),
        "cosine_LEE": cosine_TEE.sum(dim=0),
        "products_LEE": products_TEE.sum(dim=0),
        "logits_LEE": logits_TE.T @ logits_TE,
    }
    return {**{name: values.cpu().numpy() for name, values in found.items()}, "sampled_L": float(len(places))}
