"""Override patterns: which tensors they mean, and that the first one that matches wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerge import plan
from moerge.recipe.rules import matches
from tests.helpers.tiny import make_models, write_recipe

LAYER = "model.layers.{}.{}.weight"


@pytest.mark.parametrize(
    ("pattern", "role", "name", "expected"),
    [
        ("attention", "layers.3.attention.q", LAYER.format(3, "self_attn.q_proj"), True),
        ("attention.q", "layers.3.attention.q", LAYER.format(3, "self_attn.q_proj"), True),
        ("attention.q", "layers.3.attention.k", LAYER.format(3, "self_attn.k_proj"), False),
        ("att", "layers.3.attention.q", LAYER.format(3, "self_attn.q_proj"), False),
        ("layers.3", "layers.3.ffn.up", LAYER.format(3, "mlp.up_proj"), True),
        ("layers.3", "layers.30.ffn.up", LAYER.format(30, "mlp.up_proj"), False),
        ("layers.0-1.attention", "layers.0.attention.v", LAYER.format(0, "self_attn.v_proj"), True),
        ("layers.0-1.attention", "layers.1.attention.v", LAYER.format(1, "self_attn.v_proj"), True),
        ("layers.0-1.attention", "layers.2.attention.v", LAYER.format(2, "self_attn.v_proj"), False),
        ("layers.0-1.attention", "layers.1.ffn.up", LAYER.format(1, "mlp.up_proj"), False),
        ("layers.8-12.ffn.down", "layers.9.ffn.down", LAYER.format(9, "mlp.down_proj"), True),
        ("layers.8-12.ffn.down", "layers.13.ffn.down", LAYER.format(13, "mlp.down_proj"), False),
        ("layers.*.norm", "layers.5.norm.ffn", LAYER.format(5, "post_attention_layernorm"), True),
        ("layers", "layers.5.norm.ffn", LAYER.format(5, "post_attention_layernorm"), True),
        ("layers", "norm.final", "model.norm.weight", False),
        ("norm", "norm.final", "model.norm.weight", True),
        ("norm", "layers.5.norm.ffn", LAYER.format(5, "post_attention_layernorm"), True),
        ("embedding", "embedding", "model.embed_tokens.weight", True),
        ("head", "embedding", "model.embed_tokens.weight", False),
        ("*_proj.weight", "layers.5.ffn.up", LAYER.format(5, "mlp.up_proj"), True),
        ("model.layers.[01].*", "layers.1.ffn.up", LAYER.format(1, "mlp.up_proj"), True),
        ("model.layers.[01].*", "layers.2.ffn.up", LAYER.format(2, "mlp.up_proj"), False),
        ("lm_head.weight", "head", "lm_head.weight", True),
        ("thing.*", "", "thing.weight", True),
        ("attention", "", "thing.weight", False),
    ],
)
def test_matches(pattern: str, role: str, name: str, expected: bool) -> None:
    assert matches(pattern, role, name) is expected


def test_the_first_override_that_matches_wins(tmp_path: Path) -> None:
    make_models(tmp_path)
    overrides = [
        {"match": "layers.0-0.attention", "method": "ties"},
        {"match": "attention", "method": "linear"},
        {"match": "ffn.down", "method": "dare"},
        {"match": "*norm.weight", "method": "task_arithmetic"},
    ]
    planned = plan(write_recipe(tmp_path, merge={"overrides": overrides}))
    actions: dict[str, set[str]] = {}
    for output in planned.outputs:
        actions.setdefault(output.action, set()).add(output.role)
    parts = ("q", "k", "v", "o")
    assert actions == {
        "ties": {f"layers.0.attention.{part}" for part in parts},
        "linear": {f"layers.1.attention.{part}" for part in parts},
        "dare": {"layers.0.ffn.down", "layers.1.ffn.down"},
        "task_arithmetic": {"norm.final", *(f"layers.{i}.norm.{which}" for i in (0, 1) for which in ("attention", "ffn"))},
        "average": {"embedding", "head", *(f"layers.{i}.ffn.{part}" for i in (0, 1) for part in ("gate", "up"))},
    }
