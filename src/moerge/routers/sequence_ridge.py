"""A gate for whole sequences, fitted to a few texts: whose text is this, by ridge regression on mean embeddings.

Shapes: E experts, S samples, H features (the width of the mean embedding), R tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from moerge.architecture.decoder_interface import decoder_interface
from moerge.architecture.heterogeneous import EMBEDDING, expert_prefix
from moerge.architecture.sequence import HETEROGENEOUS
from moerge.checkpoint.reader import Checkpoint, open_folder
from moerge.errors import InputError
from moerge.extras import require
from moerge.operations.fitter import FitContext, MoESize
from moerge.routers.base import FittedRouter, Positive, Temperature
from moerge.routers.calibrated import Count, expert_texts
from moerge.routers.sequence import SequenceRouter
from moerge.runtime.tokens import encode_checked, load_tokenizer
from moerge.tensors.linalg import log_softmax
from moerge.tensors.tables import Table
from moerge.texts import TextRequest, Texts

WINDOW, SHORTEST = 64, 16
"""Tokens of a sample where the model has no prefix of its own, and the fewest of a sample that is not a text's first."""
HELD_OUT = 5
"""Every so many-th text of an expert decides how strong the penalty is and how sharp the gate."""
PENALTIES = tuple(10.0**power for power in range(-8, 2))
SHARPNESS = tuple(float(value) for value in np.geomspace(0.03, 1, 24))
SLACK = 0.02
"""Nats a sample for which a softer gate is taken: where texts are easy to tell apart, the sharpest is the most probable one, and
no training could move it any more."""
PENALTY, SHARP = 1e-2, 0.1
"""Where an expert has too few texts to hold any out."""
ROWS = 512


class RidgeSequenceRouter(FittedRouter, SequenceRouter):
    """A gate on the mean input embedding of the prompt, as `learned` has, fitted instead of drawn.

    Texts are cut into windows as long as the prefix that the model routes by (64 tokens where it reads whole prompts). The gate
    is W / s, with W = (X^T X + lambda I)^-1 X^T Y, X the windows' mean embeddings, Y whose text each is from, every expert's
    windows counting the same in total. lambda (`penalty` times the mean of the diagonal of X^T X) and s are those that make a
    fifth of the texts, held out from W meanwhile, most probable under softmax(W x / s), or nearly so with a softer gate; with
    fewer than 5 texts of an expert they are 0.01 and 0.1. No model runs: only the embeddings of the tokens that occur are read.

    Not in the paper, whose gate starts at random.
    """

    kind: ClassVar[str] = "ridge"
    routes_as: ClassVar[str | None] = "learned"
    not_in_config: ClassVar[frozenset[str]] = frozenset({"texts", "tokens", "penalty"})
    temperature: Temperature = 1.0
    texts: Count = 200
    tokens: Annotated[int, Field(ge=2)] = 256
    penalty: Positive | None = None

    def require(self) -> None:
        """The tokenizer is transformers'."""
        require("models", f"the {self.kind} router")

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The first `texts` documents of every expert's entry in the recipe's `calibration`."""
        return tuple(expert_texts(request, expert, self.texts, self.kind) for expert in request.experts)

    def steps(self, calibration: Sequence[Texts]) -> int:
        """The texts that it reads; projectors may want more."""
        return sum(len(texts.documents[: self.texts]) for texts in calibration)

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """The samples twice, and what is decomposed."""
        samples = size.experts * self.texts * (1 + self.tokens // WINDOW)
        return 8 * (2 * samples * size.hidden + 3 * min(samples, size.hidden) ** 2 + samples * ROWS)

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Two decompositions."""
        samples = self.steps(calibration) * (1 + self.tokens // WINDOW)
        return 2.0 * (samples * size.hidden + 10 * min(samples, size.hidden) ** 2) * min(samples, size.hidden)

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """The one gate."""
        (gate,) = context.outputs
        samples = self._samples(context)
        penalty, sharp = self._strengths(samples)
        gate_EH = samples.regression()(penalty) / sharp
        return {gate.name: gate_EH.astype(np.float32)}

    def _samples(self, context: FitContext) -> Samples:
        merged = open_folder(context.folder, name="merged")
        tokenizer = load_tokenizer(context.folder)
        tables, length = gate_tables(merged), window_length(merged.config)
        windows: list[np.ndarray] = []
        experts, documents = [], []
        for index, expert in enumerate(context.experts):
            for number, text in enumerate(context.texts[expert].documents[: self.texts]):
                ids = encode_checked(tokenizer, text, self.tokens, tables[0][0].rows, expert)
                cut = cut_windows(ids, length)
                windows += cut
                experts += [index] * len(cut)
                documents += [number] * len(cut)
                context.advance(1)
            if index not in experts:
                raise InputError(f"calibration.{expert}: no text has a token: name files with some text")
        features_SH = mean_embeddings(windows, tables)
        return Samples(features_SH, np.array(experts, np.int64), np.array(documents, np.int64), len(context.experts))

    def _strengths(self, samples: Samples) -> tuple[float, float]:
        """The penalty and s."""
        held_S = samples.document_S % HELD_OUT == HELD_OUT - 1
        enough = all(held_S[samples.expert_S == expert].any() for expert in range(samples.experts))
        if not enough:
            return self.penalty or PENALTY, SHARP
        solve, held = samples.only(~held_S).regression(), samples.only(held_S)
        tried = [(p, *held.best_sharpness(solve(p))) for p in ([self.penalty] if self.penalty else PENALTIES)]
        penalty, sharp, _ = min(tried, key=lambda each: each[2])
        return penalty, sharp


@dataclass(frozen=True, eq=False)
class Samples:
    """Mean embeddings [S, H], and the expert and document that each is from."""

    feature_SH: np.ndarray
    expert_S: np.ndarray
    document_S: np.ndarray
    experts: int

    def only(self, chosen_S: np.ndarray) -> Samples:
        """Some of them."""
        return Samples(self.feature_SH[chosen_S], self.expert_S[chosen_S], self.document_S[chosen_S], self.experts)

    @property
    def weight_S(self) -> np.ndarray:
        """Such that every expert's weigh 1 together."""
        counts_E = np.bincount(self.expert_S, minlength=self.experts)
        weight_S: np.ndarray = 1 / counts_E[self.expert_S]
        return weight_S

    def regression(self) -> Callable[[float], np.ndarray]:
        """From a penalty to W [E, H]: one decomposition, of whichever of X^T X and X X^T is smaller, serves all penalties."""
        root_S1 = np.sqrt(self.weight_S)[:, None]
        x_SH, y_SE = self.feature_SH * root_S1, np.eye(self.experts)[self.expert_S] * root_S1
        scale = np.square(x_SH).sum() / x_SH.shape[1]
        wide = len(x_SH) < x_SH.shape[1]
        value_K, vector_KK = np.linalg.eigh(x_SH @ x_SH.T if wide else x_SH.T @ x_SH)
        target_KE = vector_KK.T @ (y_SE if wide else x_SH.T @ y_SE)

        def solve(penalty: float) -> np.ndarray:
            solution_KE = vector_KK @ (target_KE / (np.maximum(value_K, 0) + penalty * scale)[:, None])
            weights_EH: np.ndarray = (x_SH.T @ solution_KE if wide else solution_KE).T
            return weights_EH

        return solve

    def best_sharpness(self, weights_EH: np.ndarray) -> tuple[float, float]:
        """The s for which softmax(W x / s) gives these samples' experts the highest probability, and -log of that.

        Of those that are within SLACK of it the softest s.
        """
        score_SE = self.feature_SH @ weights_EH.T
        losses = [(sharp, self._loss(score_SE / sharp)) for sharp in SHARPNESS]
        least = min(loss for _, loss in losses)
        return max(sharp for sharp, loss in losses if loss <= least + SLACK * self.experts), least

    def _loss(self, logit_SE: np.ndarray) -> float:
        return -float(self.weight_S @ log_softmax(logit_SE)[np.arange(len(logit_SE)), self.expert_S])


def gate_tables(merged: Checkpoint) -> list[tuple[Table, float]]:
    """The embeddings whose means the gate reads one after the other, and what each is scaled by."""
    config = merged.config
    if config.get("model_type") != HETEROGENEOUS:
        return [(Table(merged.tensors["model.embed_tokens.0.weight"], "merged"), 1.0)]
    if config.get("embedding") != "separate":
        return [(Table(merged.tensors[EMBEDDING], "merged"), 1.0)]
    decoders = [decoder_interface(own, f"expert {number}") for number, own in enumerate(config["expert_configs"])]
    names = [expert_prefix(number) + decoder.embedding for number, decoder in enumerate(decoders)]
    return [(Table(merged.tensors[n], "merged"), decoder.embedding_scale) for n, decoder in zip(names, decoders, strict=True)]


def window_length(config: Mapping[str, Any]) -> int:
    """Return the number of tokens that the model routes by, where that is fixed."""
    routing = config["routing"]
    return int(routing["prefix_tokens"]) if routing.get("on") == "prefix" else WINDOW


def cut_windows(ids_T: np.ndarray, length: int) -> list[np.ndarray]:
    """A text's tokens in windows one after the other; a short one at the end counts only if it is the first as well."""
    windows = [ids_T[start : start + length] for start in range(0, len(ids_T), length)]
    return [window for index, window in enumerate(windows) if index == 0 or len(window) >= min(SHORTEST, length)]


def mean_embeddings(windows: Sequence[np.ndarray], tables: Sequence[tuple[Table, float]]) -> np.ndarray:
    """The mean embedding of each window, [S, H] in float64, the tables' columns side by side; only rows that occur are read."""
    known = np.unique(np.concatenate(windows))
    feature_SH = np.zeros((len(windows), sum(table.columns for table, _ in tables)))
    for start in range(0, len(known), ROWS):
        chosen_R = known[start : start + ROWS]
        share_SR = np.zeros((len(windows), len(chosen_R)))
        for sample, window in enumerate(windows):
            inside = window[(window >= chosen_R[0]) & (window <= chosen_R[-1])]
            np.add.at(share_SR[sample], np.searchsorted(chosen_R, inside), 1 / len(window))
        rows_RH = np.concatenate([table.take(chosen_R).astype(np.float64) * scale for table, scale in tables], axis=1)
        feature_SH += share_SR @ rows_RH
    return feature_SH
