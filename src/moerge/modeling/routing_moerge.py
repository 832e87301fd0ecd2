"""Routing of whole sequences: from a prompt to weights over the experts.

Every kind of routing is a pure function of the prompt (and of the model's weights). Shapes: B sequences, T tokens, E experts,
H hidden, N predicted tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Share:
    """One expert's part in a batch: which rows it computes (None: all) and with what weight (None: one)."""

    expert: int
    rows_R: Tensor | None = None
    weight_R11: Tensor | None = None

    def detach(self) -> Share:
        """The share without the graph of its weight."""
        return replace(self, weight_R11=None if self.weight_R11 is None else self.weight_R11.detach())

    def take(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that this expert computes; a tensor of one row stands for all of them."""
        if self.rows_R is None or tensor.shape[0] == 1:
            return tensor
        return tensor.index_select(0, self.rows_R.to(tensor.device))


WHOLE = Share(0)
"""The part of a shared module: everything."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Weights of the experts for each sequence, the scores they come from, and what these are based on.

    `alpha` [B, E] is softmax over the scores of the top K and zero elsewhere; `scores` [B, E] has every expert's.
    """

    alpha: Tensor
    scores: Tensor
    based_on: str

    def take(self, rows_R: Tensor) -> Routing:
        """The routing of these rows, in this order."""
        rows_R = rows_R.to(self.alpha.device)
        return Routing(self.alpha.index_select(0, rows_R), self.scores.index_select(0, rows_R), self.based_on)

    def repeat(self, times: int) -> Routing:
        """The routing of a batch that repeats every row `times` times, as beam search does."""
        return self.take(torch.arange(len(self.alpha)).repeat_interleave(times))

    def to(self, device: Any) -> Routing:
        """The routing on another device."""
        return Routing(self.alpha.to(device), self.scores.to(device), self.based_on)

    def detach(self) -> Routing:
        """The routing without its graph."""
        return Routing(self.alpha.detach(), self.scores.detach(), self.based_on)

    def shares(self, *, idle: bool = False) -> list[Share]:
        """The experts with work to do. With `idle`, an expert without any computes row 0 with weight 0.

        That keeps every parameter in the graph, without which training on several processes stops.
        """
        chosen_BE = (self.alpha.detach() > 0).cpu()
        if not bool(chosen_BE.any(1).all()):
            raise ValueError("a sequence has no expert: its scores are not numbers")
        found = []
        for expert in range(chosen_BE.shape[1]):
            rows_R = chosen_BE[:, expert].nonzero()[:, 0]
            if not len(rows_R):
                if not idle:
                    continue
                rows_R = torch.zeros(1, dtype=torch.long)
            rows_R = rows_R.to(self.alpha.device)
            every = len(rows_R) == len(chosen_BE) and bool(chosen_BE[0, expert])
            weight_R = self.alpha[:, expert] if every else self.alpha[rows_R, expert]
            found.append(Share(expert, None if every else rows_R, weight_R[:, None, None]))
        return found


@dataclass(frozen=True, eq=False)
class Prompt:
    """The input of the model: tokens or embeddings, the mask over past and present tokens, and the positions.

    `read_BT` says which of the present tokens routing may read; None: all that are not padding.
    """

    input_ids_BT: Tensor | None
    embeds_BTH: Tensor | None
    mask: Tensor | None
    position_ids_BT: Tensor
    read_BT: Tensor | None = None

    def take(self, share: Share) -> Prompt:
        """The rows that an expert computes."""
        return Prompt(*(None if part is None else share.take(part) for part in self._parts))  # type: ignore[arg-type]

    def row(self, index: int) -> Prompt:
        """The tokens of one row that routing reads, as fresh tensors that autograd can keep."""
        real_T = self.routed_BT[index]
        ids_T = self.ids_BT[index][real_T]
        return Prompt(ids_T[None].clone(), None, None, self.position_ids_BT[index][real_T][None].clone())

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.input_ids_BT, self.embeds_BTH, self.mask, self.position_ids_BT, self.read_BT

    @property
    def ids_BT(self) -> Tensor:
        """The tokens; an error where only embeddings are known."""
        if self.input_ids_BT is None:
            raise ValueError("this routing reads the prompt's tokens: pass input_ids, or a routing beside inputs_embeds")
        return self.input_ids_BT

    @property
    def real_BT(self) -> Tensor:
        """Return a mask of the present tokens that are not padding."""
        length = self.position_ids_BT.shape[1]
        if self.mask is None:
            return torch.ones_like(self.position_ids_BT, dtype=torch.bool)
        if self.mask.ndim != 2:
            raise ValueError("routing needs an attention mask of shape [sequences, tokens], or pass a routing")
        return self.mask[:, -length:].bool()

    @property
    def routed_BT(self) -> Tensor:
        """Return a mask of the present tokens that routing reads."""
        return self.real_BT if self.read_BT is None else self.read_BT

    def cropped(self) -> Prompt:
        """Without the tokens behind the last one that routing reads; the prompt itself where there are none."""
        length = self.position_ids_BT.shape[1]
        ends = () if self.read_BT is None else self.read_BT.any(0).nonzero().flatten().tolist()
        end = ends[-1] + 1 if ends else length
        return self if end == length else self.between(0, end)

    def between(self, start: int, end: int) -> Prompt:
        """These of the present tokens; the mask still covers what was before them."""
        kept = [None if part is None else part[:, start:end] for part in self._parts]
        if self.mask is not None:
            if self.mask.ndim != 2:
                raise ValueError("some tokens of a prompt need an attention mask of shape [sequences, tokens]")
            kept[2] = self.mask[:, : self.mask.shape[1] - self.position_ids_BT.shape[1] + end]
        return Prompt(*kept)  # type: ignore[arg-type]


def weigh(scores_BE: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    """alpha = softmax(top-K(scores / temperature)): softmax over the K highest scores of each row, zero elsewhere.

    Of equal scores the first expert's counts as the higher; one that is not a number counts as the lowest.
    """
    scores_BE = torch.where(scores_BE.isnan(), -torch.inf, scores_BE)
    top_BK = scores_BE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    alpha_BK = (scores_BE.gather(-1, top_BK) / temperature).softmax(-1)
    return torch.zeros_like(scores_BE).scatter(-1, top_BK, alpha_BK)


def combine(parts: Sequence[tuple[Share, Tensor]], batch: int) -> Tensor:
    """The weighted sum of what the shares computed, for the whole batch."""
    total = None
    for share, part in parts:
        if share.weight_R11 is not None:
            part = part * share.weight_R11.to(part)
        if share.rows_R is not None:
            total = part.new_zeros(batch, *part.shape[1:]) if total is None else total
            total = total.index_add(0, share.rows_R.to(total.device), part.to(total.device))
        else:
            total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


def log_mixture(parts: Sequence[tuple[Share, Tensor]], batch: int) -> Tensor:
    """log sum_i alpha_i softmax(logits_i), in float32."""
    terms = [(share, _log_term(share, logits_RTV)) for share, logits_RTV in parts]
    device = terms[0][1].device
    largest_BTV = torch.full((batch, *terms[0][1].shape[1:]), -torch.inf, device=device)
    for share, term_RTV in terms:
        rows_R = slice(None) if share.rows_R is None else share.rows_R.to(device)
        largest_BTV[rows_R] = largest_BTV[rows_R].maximum(term_RTV.detach().to(device))
    scaled = [(replace(share, weight_R11=None), (term - share.take(largest_BTV).to(term.device)).exp()) for share, term in terms]
    return combine(scaled, batch).log() + largest_BTV


def _log_term(share: Share, logits_RTV: Tensor) -> Tensor:
    """log(alpha softmax(logits)): minus infinity, with a gradient of zero, for an idle expert."""
    log_p_RTV = logits_RTV.float().log_softmax(-1)
    if share.weight_R11 is None:
        return log_p_RTV
    weight_R11 = share.weight_R11.to(log_p_RTV)
    return log_p_RTV + torch.where(weight_R11 > 0, weight_R11, 1.0).log().where(weight_R11 > 0, -torch.inf)


def sequence_nll(states_BTH: Tensor, head: Callable[[Tensor], Tensor], prompt: Prompt, vocab_size: int) -> Tensor:
    """Mean negative log-likelihood per sequence, of every token but the first; padding is left out.

    The paper's formula starts at j = 1; P(x_1 | nothing) is not something a decoder gives, so the mean is over the t - 1 tokens
    that are predicted. A sequence of a single token has nothing to predict: its mean is 0 (perplexity 1) for every expert.
    """
    real_BT = prompt.routed_BT.to(states_BTH.device)
    ids_BT = prompt.ids_BT.to(states_BTH.device)
    predicted = real_BT[:, 1:] & real_BT[:, :-1]
    rows_N, columns_N = predicted.nonzero(as_tuple=True)
    states_NH, targets_N = states_BTH[rows_N, columns_N], ids_BT[rows_N, columns_N + 1]
    step = max(1, 2**26 // vocab_size)  # logits of a long prompt over a large vocabulary do not fit in memory at once
    nll_N = torch.cat(
        [
            functional.cross_entropy(head(states).float(), targets.to(states.device), reduction="none")
            for states, targets in zip(torch.split(states_NH, step), torch.split(targets_N, step), strict=True)
        ]
    )
    total_B = torch.zeros(len(ids_BT), device=nll_N.device).index_add(0, rows_N.to(nll_N.device), nll_N)
    return total_B / predicted.sum(1).clamp(min=1).to(nll_N.device)


def perplexity(nll_BE: Tensor, options: dict[str, Any]) -> Routing:
    """The paper's routing: alpha = softmax(top-K(1 / PPL)), PPL of the prompt under each expert's own path.

    1/PPL lies in (0, 1], and for prompts of high perplexity it differs little between experts: the K chosen then weigh nearly
    the same. `temperature` below 1 sharpens that; 1 is the paper's.
    """
    return by_scores(nll_BE.neg().exp(), "1 / perplexity of the prompt under each expert", options)


def uniform(prompt: Prompt, experts: int) -> Routing:
    """Every expert with the same weight; top K is not applied."""
    alpha_BE = _per_expert(prompt, experts).fill_(1 / experts)
    return Routing(alpha_BE, torch.ones_like(alpha_BE), "nothing: every expert weighs the same")


def fixed(prompt: Prompt, experts: int, expert: int, name: str) -> Routing:
    """One expert for everything."""
    alpha_BE = _per_expert(prompt, experts)
    alpha_BE[:, expert] = 1.0
    return Routing(alpha_BE, alpha_BE.clone(), f"nothing: always {name}")


def by_chance(prompt: Prompt, experts: int, options: dict[str, Any]) -> Routing:
    """Scores drawn from [0, 1): a function of the seed and the prompt's tokens, whatever the batch, padding and device."""
    scores_BE = [
        [source.random() for _ in range(experts)]
        for ids_T, real_T in zip(prompt.ids_BT, prompt.routed_BT, strict=True)
        for source in [random.Random(_digest(ids_T[real_T.to(ids_T.device)].tolist(), options["seed"]))]
    ]
    like = _per_expert(prompt, experts)
    return by_scores(
        torch.tensor(scores_BE).to(like), f"the prompt's tokens and the seed {options['seed']}, drawn at random", options
    )


def learned(embeds_BTH: Tensor, prompt: Prompt, gate: torch.nn.Linear, options: dict[str, Any]) -> Routing:
    """A gate on the mean of the prompt's input embeddings; gradients reach it through alpha."""
    real_BT1 = prompt.routed_BT.to(embeds_BTH.device)[..., None]
    mean_BH = (embeds_BTH * real_BT1).sum(1, dtype=torch.float32) / real_BT1.sum(1).clamp(min=1)
    scores_BE = gate(mean_BH.to(gate.weight)).float()
    return by_scores(scores_BE, "the gate on the mean embedding of the prompt", options)


def by_scores(scores_BE: Tensor, based_on: str, options: dict[str, Any]) -> Routing:
    """The routing that scores give; `options` are top_k and temperature."""
    temperature = options["temperature"]
    if temperature != 1:
        based_on += f", at temperature {temperature:g}"
    return Routing(weigh(scores_BE, options["top_k"], temperature), scores_BE, based_on)


def _per_expert(prompt: Prompt, experts: int) -> Tensor:
    given = prompt.embeds_BTH if prompt.input_ids_BT is None else prompt.input_ids_BT
    assert given is not None
    return torch.zeros(len(given), experts, device=given.device)


def _digest(tokens: list[int], seed: int) -> int:
    text = f"{seed}:" + ",".join(map(str, tokens))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
