"""One decoder layer of the sequence-routed model, out of the dense family's own modules. Shapes as in routing_moerge."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .configuration_moerge import MoergeConfig
from .lowrank_moerge import adapt, computing
from .naming_moerge import FAMILIES, ROLES
from .routing_moerge import Prompt, Share, combine
from .versions_moerge import CACHE, DynamicCache, GradientCheckpointingLayer, check_takes, create_masks_for_generate, named


@dataclass(frozen=True, eq=False)
class Lane:
    """The input of one attention besides hidden states: its expert, its rows' mask and positions, and its cache."""

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
        position_ids=mine.position_ids_BT,
        **named(cache),
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


class MoergeDecoderLayer(GradientCheckpointingLayer):
    """`h += sum_i alpha_i attention_i(norm(h)); h += sum_i alpha_i ffn_i(norm(h))`; a shared module runs once for all.

    A norm belongs to the block that it feeds: where norms are separate, a shared attention runs once per chosen expert.
    """

    def __init__(self, config: MoergeConfig, layer_idx: int) -> None:
        super().__init__()
        layer_types = getattr(config.expert_config, "layer_types", None)
        self.layer_type = layer_types[layer_idx] if layer_types else None
        dense = family_class(config, "DecoderLayer")
        check_takes(family_class(config, "Attention").forward, (CACHE, "attention_mask", "position_embeddings"))
        layers = [dense(config.expert_config, layer_idx) for _ in range(max(map(config.modules_of, ROLES)))]
        for name, role in (
            ("input_layernorm", "norm"),
            ("self_attn", "attention"),
            ("post_attention_layernorm", "norm"),
            ("mlp", "ffn"),
        ):
            setattr(self, name, nn.ModuleList(getattr(layer, name) for layer in layers[: config.modules_of(role)]))
        adapt(self, config, layer_idx)

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
        with computing(expert):
            out: Tensor = pick(self.self_attn, expert)(
                hidden_states=normed_RTH,
                attention_mask=lane.mask(self.layer_type),
                position_ids=lane.position_ids_RT,
                use_cache=lane.cache is not None,
                position_embeddings=lane.position_embeddings,
                **named(lane.cache),
            )[0]
        return out

    def _feed(self, hidden_BTH: Tensor, share: Share) -> Tensor:
        normed_RTH = pick(self.post_attention_layernorm, share.expert)(share.take(hidden_BTH))
        with computing(share.expert):
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
