"""Losses of tuning. Shapes: B sequences, T tokens, V vocabulary, N routed things, E experts, M largest logits.

What is routed is a token in a native MoE and a sequence in a sequence-routed one; the formulas are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moerge.distillation import DistillationTarget, soft_cross_entropy

_NOT_LEARNED = -100
"""torch's label of what does not count."""


def cross_entropy(logits_BTV: torch.Tensor, ids_BT: torch.Tensor, learned_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Autoregressive cross-entropy: the mean over predicted tokens, or over those of them that are `learned`, in nats."""
    labels_BT = ids_BT if learned_BT is None else ids_BT.masked_fill(~learned_BT, _NOT_LEARNED)
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_NOT_LEARNED)


def load(scores_NE: torch.Tensor, top_k: int) -> torch.Tensor:
    """f [E]: which fraction of all choices each expert gets; it sums to 1 and has no gradient. Ties as torch.topk breaks them."""
    chosen_NK = scores_NE.detach().topk(min(top_k, scores_NE.shape[-1]), dim=-1).indices
    return torch.bincount(chosen_NK.flatten(), minlength=scores_NE.shape[-1]).to(_wide(scores_NE)) / chosen_NK.numel()


def load_balance(scores_NE: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
    """Switch's auxiliary loss (arXiv 2101.03961, equation 4): E * sum_i f_i P_i, P_i the mean probability of expert i.

    1 where the load is even, E where one expert gets everything. f is a fraction of choices, so that top_k does not scale the
    loss; transformers' own version counts each token's choices separately (top_k where the load is even), and takes f and P over
    all layers together, which lets one layer's favourite make up for another's. `load_E` may be that of more than these scores:
    over all processes the gradient is then that of the whole batch.
    """
    return scores_NE.shape[-1] * (load_E * scores_NE.softmax(-1).mean(0)).sum()


def router_z(scores_NE: torch.Tensor) -> torch.Tensor:
    """The router z-loss (ST-MoE, arXiv 2202.08906, equation 5): the mean of logsumexp(scores)^2."""
    return scores_NE.logsumexp(-1).square().mean()


def router_entropy(scores_NE: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the router's probabilities over all experts, in nats: log E where it does not care."""
    log_p_NE = scores_NE.log_softmax(-1)
    return -(log_p_NE.exp() * log_p_NE).sum(-1).mean()


def forward_kl(logits_NV: torch.Tensor, target: DistillationTarget, temperature: float) -> torch.Tensor:
    """KL(teacher || student) * T^2, the mean over tokens in nats: `soft_cross_entropy` less the teacher's own entropy.

    Where only the teacher's largest logits were kept, its probabilities are those among them, while the student's are over the
    whole vocabulary: the loss is 0 only for a student that puts all its mass on the teacher's M tokens.
    """
    log_p_NM = F.log_softmax(target.logits.to(logits_NV) / temperature, dim=-1)
    entropy = -(log_p_NM.exp() * log_p_NM).sum(-1).mean() * temperature**2
    return soft_cross_entropy(logits_NV, target, temperature) - entropy


def _wide(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
