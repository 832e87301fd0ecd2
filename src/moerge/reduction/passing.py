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
from moerge.reduction.sums import PEAK, Sums
from moerge.runtime.layerwise import Dispatch, Layer, LayerwiseModel
from moerge.runtime.tokens import encode_checked, load_tokenizer
from moerge.texts import Document

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Look = Callable[[int, Dispatch], Result]
"""Receives a text's number and what its tokens do at a layer's experts."""
_TINY = 1e-30


@dataclass(frozen=True)
class TokenizedText:
    """A text of a domain as tokens."""

    domain: str
    ids: Sequence[int]


def tokenized(folder: Path, domain: str, documents: Sequence[Document], tokens: int, rows: int) -> list[TokenizedText]:
    """A domain's documents, each up to so many tokens; InputError if there is no token, or one beyond the embedding's rows."""
    tokenizer = load_tokenizer(folder)
    every = (encode_checked(tokenizer, document, tokens, rows, domain).tolist() for document in documents)
    found = [TokenizedText(domain, ids) for ids in every if ids]
    if not found:
        raise InputError(f"calibration.{domain}: no text has a token: name a file with some for this domain")
    return found


class TextPass:
    """Texts with their states between layers. A context manager; texts run on `threads` at once.

    States lie in `folder` where memory would not do. Sums over texts are to be made in the order of texts, so that results do not
    depend on the number of threads.
    """

    def __init__(self, model: LayerwiseModel, texts: Sequence[TokenizedText], folder: Path, threads: int) -> None:
        self.model, self.texts = model, texts
        self._states = States([len(text.ids) for text in texts], model.width, model.dtype, folder)
        self._threads = threads if model.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._threads)
        for number, text in enumerate(texts):
            self._states.write(number, model.embed(text.ids))

    def __enter__(self) -> TextPass:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def move(self, layer: Layer, look: Look[Result] | None = None) -> Iterator[tuple[int, Result | None]]:
        """Run every text through a layer, whose output takes the place of its input.

        Yields each text's number and what `look` returned for it, in the order of texts.
        """

        def work(number: int) -> tuple[torch.Tensor, list[Result]]:
            seen: list[Result] = []
            visit = None if look is None else lambda dispatch: seen.append(look(number, dispatch))
            return layer.run(self._states.read(number).to(self.model.device), visit), seen

        for number, (state_TD, seen) in self._in_order(work):
            self._states.write(number, state_TD)
            yield number, seen[0] if seen else None

    def inputs(self, layer: Layer) -> Iterator[tuple[int, torch.Tensor]]:
        """Each text's number and router inputs [T, D] in a layer, in the order of texts; nothing moves."""
        yield from self._in_order(lambda number: layer.inputs(self._states.read(number).to(self.model.device)))

    def _in_order(self, work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
        """`work` for all texts, as many at once as there are threads."""
        for start in range(0, len(self.texts), self._threads):
            numbers = range(start, min(start + self._threads, len(self.texts)))
            yield from zip(numbers, self._pool.map(work, numbers), strict=True)


def spread(length: int, total: int, limit: int) -> np.ndarray:
    """The places, evenly spread, of a text's share of `limit` tokens where all texts have `total`; at least one."""
    count = length if total <= limit else min(length, max(1, round(limit * length / total)))
    return np.asarray(np.linspace(0, length - 1, count).round().astype(int))


def gather_sums(texts: TextPass, sampled: Mapping[int, np.ndarray], advance: Advance) -> dict[str, Sums]:
    """Pass texts through all layers and add up what their experts do, for each domain.

    Args:
        texts: What runs.
        sampled: Places of the tokens of each text, by its number, that every expert runs on; empty if no grouping needs that.
        advance: Is told of tokens times layers that are done.

    Returns:
        The sums by domain.
    """
    model = texts.model
    routed = sorted(model.mixture.routers)
    experts, width = model.mixture.routers[routed[0]].shape
    domains = dict.fromkeys(text.domain for text in texts.texts)
    found = {domain: Sums.zeros(len(routed), experts, width, similar=bool(sampled)) for domain in domains}
    for number in range(model.layers):
        with model.layer(number) as layer:

            def look(text: int, dispatch: Dispatch, layer: Layer = layer) -> dict[str, Any]:
                return _parts(layer, dispatch, experts) | (_common(layer, dispatch, sampled[text]) if sampled else {})

            for text, parts in texts.move(layer, look):
                if parts is not None:
                    _add(found[texts.texts[text].domain], routed.index(number), parts)
                advance(len(texts.texts[text].ids))
    return found


def _add(sums: Sums, place: int, parts: Mapping[str, Any]) -> None:
    for name, values in parts.items():
        if not np.isfinite(values).all():
            raise InputError("calibration: a layer's outputs are not finite: run with 'dtype: float32', or verify the model")
        whole = sums[name]
        whole[place] = np.maximum(whole[place], values) if name == PEAK else whole[place] + values


def _parts(layer: Layer, dispatch: Dispatch, experts: int) -> dict[str, Any]:
    """One text's share of the sums of a layer."""
    chosen_TK, outputs_TKD = dispatch.chosen_TK.cpu().numpy(), dispatch.outputs_TKD.float().cpu().numpy()
    norms_TK = np.linalg.norm(outputs_TKD.astype(np.float64), axis=2)
    flat, outputs_ND = chosen_TK.reshape(-1), outputs_TKD.reshape(-1, outputs_TKD.shape[-1])
    output_ED, peak_E = np.zeros((experts, outputs_ND.shape[1])), np.zeros(experts)
    for expert in np.unique(flat):
        own_ND = outputs_ND[flat == expert]
        output_ED[expert], peak_E[expert] = own_ND.sum(axis=0, dtype=np.float64), np.abs(own_ND).max()
    return {
        "table_LEAB": table_of(chosen_TK, dispatch.gates_TK.float().cpu().numpy(), norms_TK, experts),
        "output_LED": output_ED,
        PEAK: peak_E,
        "mass_LE": layer.logits(dispatch.inputs_TD).softmax(dim=-1).double().sum(dim=0).cpu().numpy(),
        "tokens_L": float(len(chosen_TK)),
    }


def _common(layer: Layer, dispatch: Dispatch, places: np.ndarray) -> dict[str, Any]:
    """Sums of what every expert does on the tokens at some places."""
    import torch

    inputs_TD = dispatch.inputs_TD[torch.from_numpy(places)]
    logits_TE = layer.logits(inputs_TD).double()
    outputs_ETD = torch.stack([layer.output(expert, inputs_TD).double() for expert in range(len(layer.experts))])
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
