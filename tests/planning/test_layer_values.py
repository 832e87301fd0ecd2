"""Values of config.json that belong to layers, in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.planning.assemble.layer_values import reordered
from tests.helpers.command import moerge
from tests.helpers.hf_models import GROUPED, load, logits, random_model, read_config, save, torch, transformers


@pytest.mark.parametrize(
    ("key", "value", "order", "expected"),
    [
        ("layer_types", ["a", "b", "c"], [2, 0, 0], ["c", "a", "a"]),
        ("no_rope_layers", [1, 0, 1], [1], [0]),
        ("intermediate_size", [8, 16, 24], [1, 2], [16, 24]),
        ("full_attn_idxs", [0, 2], [2, 1, 2], [0, 2]),
        ("first_k_dense_replace", 1, [0, 0, 2], 2),
        ("num_kv_shared_layers", 1, [0, 2, 2], 2),
        ("num_kv_shared_layers", 1, [0, 1], 0),
        ("per_layer_config", {"2": {"head_dim": 4}}, [2, 0, 2], {"0": {"head_dim": 4}, "2": {"head_dim": 4}}),
    ],
)
def test_what_belongs_to_layers_follows_them(key: str, value: Any, order: list[int], expected: Any) -> None:
    assert reordered({"num_hidden_layers": 3, "eos_token_id": [1, 2, 3]}, {key: value}, order) == {key: expected}


def test_what_is_derived_is_written_where_layers_differ() -> None:
    derived = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "mlp_layer_types": ["dense", "dense"]}
    assert reordered(derived, {}, [1]) == {"layer_types": ["b"]}
    assert reordered(derived, {"mlp_layer_types": ["dense", "dense"]}, [0, 1]) == {}


@pytest.mark.parametrize(
    ("key", "value", "order"),
    [("first_k_dense_replace", 1, [1, 0]), ("num_kv_shared_layers", 1, [2, 0]), ("kv_source_layers", [0, 0, 1], [0, 2])],
)
def test_an_order_that_no_value_says_is_refused(key: str, value: Any, order: list[int]) -> None:
    with pytest.raises(InputError, match=f"slices: config.json's {key} "):
        reordered({"num_hidden_layers": 3, key: value}, {}, order)


LISTS = {
    "Cohere2": ("layer_types", ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]),
    "SmolLM3": ("no_rope_layers", [0, 1, 1, 0]),
    "Qwen3_5Text": ("layer_types", ["linear_attention", "full_attention", "linear_attention", "full_attention"]),
    "Gemma4Text": ("layer_types", ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]),
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MORE: dict[str, dict[str, Any]] = {
    "Cohere2": {"sliding_window": 4},
    "SmolLM3": {},
    "Qwen3_5Text": {"head_dim": 8, **_LINEAR},
    "Gemma4Text": {"head_dim": 8, "global_head_dim": 8, "sliding_window": 4, "hidden_size_per_layer_input": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LISTS)
def test_a_sliced_model_is_transformers_own_with_these_layers(kind: str, tmp_path: Path) -> None:
    """The judge: a model of transformers that is made of the same layers of the source, with a config written by hand."""
    key, values = LISTS[kind]
    order = [0, 2, 1]
    config = getattr(transformers, f"{kind}Config")(**{**GROUPED, "num_hidden_layers": 4, key: values, **_MORE[kind]})
    source = random_model(config, 1)
    save(source, tmp_path / "a")
    ranges = [[0, 1], [2, 3], [1, 2]]
    parts = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": span}]} for span in ranges]
    recipe = tmp_path / "slices.yaml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": parts}))
    result = moerge("merge", recipe, tmp_path / "out", "--quiet")
    assert result.code == 0, result.err
    assert read_config(tmp_path / "out")[key] == [values[layer] for layer in order]
    judge = type(config)(**{**GROUPED, "num_hidden_layers": 3, key: [values[layer] for layer in order], **_MORE[kind]})
    model = random_model(judge, 2)
    state = source.state_dict()
    prefix = next(name for name in state if "layers.0." in name).partition("layers.0.")[0] + "layers."
    own = {
        name: state[name]
        if not name.startswith(prefix)
        else state[f"{prefix}{order[int(name[len(prefix) :].partition('.')[0])]}.{name[len(prefix) :].partition('.')[2]}"]
        for name in model.state_dict()
    }
    model.load_state_dict(own)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=0)
