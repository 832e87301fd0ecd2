"""One decoder layer of the sequence-routed model, out of the dense family's own modules. Shapes as in routing_moerge."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_moerge import MoergeConfig
from .naming_moerge import FAMILIES
from .routing_moerge import Prompt, Share


@dataclass(frozen=True, eq=False)
class Lane:
    """What one attention needs besides hidden states: whose it is, its rows' mask and positions, and its cache."""

    share: Share
    masks: Any
    position_ids_RT: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    cache: DynamicCache | None

    def mask(self, layer_type: str | None) -> Any:
        """The attention mask of a layer: families with several kinds of layers have a mask for each."""
        return self.masks[layer_type] if isinstance(self.masks, dict) else self.masks


def make_lane(
    share: Share, prompt: Prompt, hidden_BTH: Tensor, rotary: nn.Module, expert_config: Any, cache: DynamicCache | None
) -> Lane:
    """The lane of a share of this prompt; `hidden_BTH` says dtype and device."""
    mine = prompt.take(share)
    rows_RTH = share.take(hidden_BTH)
    masks = create_masks_for_generate(
        config=expert_config,
        inputs_embeds=rows_RTH,
        attention_mask=mine.mask,
        past_key_values=cache,
        position_ids=mine.position_ids_BT,
    )
    return Lane(share, masks, mine.position_ids_BT, rotary(rows_RTH, position_ids=mine.position_ids_BT), cache)


def family_class(config: MoergeConfig, name: str) -> Any:
    """A class of the experts' family in transformers, such as `DecoderLayer`."""
    family = config.expert_config.model_type
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), FAMILIES[family] + name)


def pick(group: Any, expert: int) -> nn.Module:
    """An expert's module of a group (a ModuleList); the only one if it is shared."""
    module: nn.Module = group[expert if len(group) > 1 else 0]
    return module


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


class MoergeDecoderLayer(GradientCheckpointingLayer):
    """`h += sum_i alpha_i attention_i(norm(h)); h += sum_i alpha_i ffn_i(norm(h))`; a shared module runs once for all.

    A norm belongs to the block that it feeds: where norms are separate, a shared attention runs once per chosen expert.
    """

    def __init__(self, config: MoergeConfig, layer_idx: int) -> None:
        super().__init__()
        layer_types = getattr(config.expert_config, "layer_types", None)
        self.layer_type = layer_types[layer_idx] if layer_types else None
        dense = family_class(config, "DecoderLayer")
        layers = [dense(config.expert_config, layer_idx) for _ in range(config.num_experts if config.separate else 1)]
        for name, role in (
            ("input_layernorm", "norm"),
            ("self_attn", "attention"),
            ("post_attention_layernorm", "norm"),
            ("mlp", "ffn"),
        ):
            setattr(self, name, nn.ModuleList(getattr(layer, name) for layer in layers[: config.modules_of(role)]))

    def forward(self, hidden_BTH: Tensor, lanes: Sequence[Lane], ffn_shares: Sequence[Share]) -> Tensor:
        """The residual stream after this layer."""
        batch = len(hidden_BTH)
        attended = [(lane.share, self._attend(hidden_BTH, lane)) for lane in lanes]
        hidden_BTH = hidden_BTH + combine(attended, batch).to(hidden_BTH.device)
        fed = [(share, self._feed(hidden_BTH, share)) for share in ffn_shares]
        return hidden_BTH + combine(fed, batch).to(hidden_BTH.device)

    def _attend(self, hidden_BTH: Tensor, lane: Lane) -> Tensor:
        expert = lane.share.expert
        normed_RTH = pick(self.input_layernorm, expert)(lane.share.take(hidden_BTH))
        out: Tensor = pick(self.self_attn, expert)(
            hidden_states=normed_RTH,
            attention_mask=lane.mask(self.layer_type),
            position_ids=lane.position_ids_RT,
            past_key_values=lane.cache,
            use_cache=lane.cache is not None,
            position_embeddings=lane.position_embeddings,
        )[0]
        return out

    def _feed(self, hidden_BTH: Tensor, share: Share) -> Tensor:
        normed_RTH = pick(self.post_attention_layernorm, share.expert)(share.take(hidden_BTH))
        out: Tensor = pick(self.mlp, share.expert)(normed_RTH)
        return out


def dense_parts(config: MoergeConfig) -> tuple[nn.ModuleList, nn.ModuleList, nn.Module]:
    """Embeddings, final norms and the rotary embedding of a model with this configuration."""
    expert = config.expert_config
    embeddings = nn.ModuleList(
        nn.Embedding(expert.vocab_size, expert.hidden_size, expert.pad_token_id) for _ in range(config.modules_of("embedding"))
    )
    norm = family_class(config, "RMSNorm")
    norms = nn.ModuleList(norm(expert.hidden_size, eps=expert.rms_norm_eps) for _ in range(config.modules_of("norm")))
    return embeddings, norms, family_class(config, "RotaryEmbedding")(config=expert)


def heads(config: MoergeConfig) -> nn.ModuleList:
    """The output layers."""
    expert = config.expert_config
    return nn.ModuleList(nn.Linear(expert.hidden_size, expert.vocab_size, bias=False) for _ in range(config.modules_of("head")))


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
