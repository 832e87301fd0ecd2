"""The assembled Mixtral is what MergeME 3.1.1 says: proved on logits, through plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moerge
from moerge.errors import InputError

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3-rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "head-dim": lambda: transformers.LlamaConfig(**SIZES, head_dim=24, rms_norm_eps=1e-4),
    "mistral-sliding": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "mistral-full": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
}
TOKENS = torch.randint(0, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(3))


def save_model(config: Any, folder: Path, seed: int, *, near: Any = None, dtype: Any = None) -> Any:
    """A model whose every weight, norms too, is random; `near` another one if that is given."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    for name, tensor in state.items():
        start = near.state_dict()[name] if near is not None else torch.zeros_like(tensor) + ("norm" in name)
        tensor.copy_(start + torch.randn_like(tensor) * (0.03 if near is not None else 0.15))
    model.tie_weights()
    model.to(dtype or torch.float32).save_pretrained(folder)
    return model.eval()


def write_models(folder: Path, config: Any, dtype: Any = None, count: int = 2) -> dict[str, str]:
    """A base and `count` experts near it."""
    base = save_model(config, folder / "base", 0)
    names = [f"expert{i}" for i in range(count)]
    for i, name in enumerate(names):
        save_model(config, folder / name, i + 1, near=base, dtype=dtype)
    save_model(config, folder / "base", 0, dtype=dtype)
    return {name: str(folder / name) for name in names}


def load(folder: Path, **options: Any) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=options.pop("dtype", torch.float32), **options
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(TOKENS).logits


def force_expert(moe: Any, index: int) -> None:
    """Make every gate choose expert `index` alone, whatever the token."""
    for layer in moe.model.layers:
        gate = layer.mlp.gate

        def forced(module: Any, inputs: Any, output: Any) -> Any:
            router_logits, scores, indices = output
            weights = torch.zeros_like(scores)
            weights[:, 0] = 1
            return router_logits, weights, torch.full_like(indices, index)

        gate.register_forward_hook(forced)


@pytest.mark.parametrize("name", CONFIGS)
def test_identical_experts_give_the_dense_logits(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    dense = save_model(config, tmp_path / "dense", 0)
    experts = {f"copy{i}": str(tmp_path / "dense") for i in range(3)}
    moerge.merge({"experts": experts, "moe": {"top_k": 2}}, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == "mixtral"
    assert moe.config.num_local_experts == 3
    torch.testing.assert_close(logits(moe), logits(dense), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gate_forced_to_an_expert_gives_backbone_plus_its_ffn(name: str, tmp_path: Path) -> None:
    experts = write_models(tmp_path, CONFIGS[name]())
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "merge": {"method": "ties", "density": 0.7}}
    moerge.merge({**recipe, "moe": {"top_k": 1, "include_base": True}}, tmp_path / "moe")
    moerge.merge(recipe, tmp_path / "dense")
    for index, expert in enumerate(["base", *experts]):
        moe = load(tmp_path / "moe")
        force_expert(moe, index)
        by_hand = load(tmp_path / "dense")
        ffn = {key: value for key, value in load(tmp_path / expert).state_dict().items() if ".mlp." in key}
        assert len(ffn) == 3 * SIZES["num_hidden_layers"]
        by_hand.load_state_dict({**by_hand.state_dict(), **ffn})
        torch.testing.assert_close(logits(moe), logits(by_hand), atol=1e-5, rtol=0)


def test_experts_differ_and_top_k_mixes_them(tmp_path: Path) -> None:
    """The tests above would pass on a MoE that ignores its router; this one would not."""
    experts = write_models(tmp_path, CONFIGS["llama"]())
    moerge.merge({"base": str(tmp_path / "base"), "experts": experts, "moe": {"top_k": 2}}, tmp_path / "moe")
    free = logits(load(tmp_path / "moe"))
    forced = []
    for index in range(3):
        moe = load(tmp_path / "moe")
        force_expert(moe, index)
        forced.append(logits(moe))
    assert all((free - other).abs().max() > 1e-3 for other in forced)
    assert (forced[0] - forced[1]).abs().max() > 1e-3


def test_average_backbone_counts_the_base_as_an_expert(tmp_path: Path) -> None:
    experts = write_models(tmp_path, CONFIGS["llama"]())
    recipe = {"base": str(tmp_path / "base"), "experts": experts}
    moerge.merge({**recipe, "moe": {}}, tmp_path / "with")
    moerge.merge({**recipe, "moe": {"include_base": False}}, tmp_path / "without")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {model: load(tmp_path / model).state_dict()[name] for model in ("base", *experts, "with", "without")}
    pair = tensors["expert0"] + tensors["expert1"]
    torch.testing.assert_close(tensors["with"], (tensors["base"] + pair) / 3)
    torch.testing.assert_close(tensors["without"], pair / 2)


def test_bfloat16_moe_is_close_and_generates(tmp_path: Path) -> None:
    dense = save_model(CONFIGS["llama"](), tmp_path / "dense", 0, dtype=torch.bfloat16)
    experts = {f"copy{i}": str(tmp_path / "dense") for i in range(2)}
    moerge.merge({"experts": experts, "moe": {}}, tmp_path / "moe")
    moe = load(tmp_path / "moe", dtype="auto")
    assert moe.dtype == torch.bfloat16
    reference = logits(dense)
    assert (logits(moe) - reference).abs().max() < 0.02 * reference.abs().max()
    new = moe.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert new.shape == (1, TOKENS.shape[1] + 5)


def test_router_depends_on_its_seed_alone_and_looks_like_a_linear_layer(tmp_path: Path) -> None:
    experts = write_models(tmp_path, CONFIGS["llama"]())
    gates = {}
    for run, seed, method in (("a", 1, "average"), ("b", 1, "ties"), ("c", 2, "average")):
        recipe = {
            "base": str(tmp_path / "base"),
            "experts": experts,
            "merge": {"method": method},
            "moe": {"router": {"seed": seed}},
        }
        moerge.merge(recipe, tmp_path / run)
        state = load(tmp_path / run).state_dict()
        gates[run] = torch.stack([value for key, value in state.items() if key.endswith("gate.weight")])
    assert torch.equal(gates["a"], gates["b"])
    assert not torch.equal(gates["a"], gates["c"])
    bound = SIZES["hidden_size"] ** -0.5
    assert gates["a"].abs().max() <= bound
    assert abs(float(gates["a"].std()) / (bound / 3**0.5) - 1) < 0.1
    assert len(torch.unique(gates["a"])) == gates["a"].numel()


def test_sharded_experts_with_mixed_dtypes_become_one_dtype(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    base = save_model(config, tmp_path / "base", 0)
    save_model(config, tmp_path / "half", 1, near=base, dtype=torch.float16)
    sharded = save_model(config, tmp_path / "sharded", 2, near=base, dtype=torch.bfloat16)
    sharded.save_pretrained(tmp_path / "sharded2", max_shard_size="10KB")
    experts = {"half": str(tmp_path / "half"), "sharded": str(tmp_path / "sharded2")}
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "merge": {"method": "linear"}, "moe": {}, "dtype": "bfloat16"}
    moerge.merge(recipe, tmp_path / "moe")
    moe = load(tmp_path / "moe", dtype="auto")
    assert {tensor.dtype for tensor in moe.state_dict().values()} == {torch.bfloat16}
    half = load(tmp_path / "half").state_dict()["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(moe.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][1, SIZES["intermediate_size"] :], half)


def test_tensors_on_disk_are_per_expert_as_other_programs_expect(tmp_path: Path) -> None:
    dense = save_model(CONFIGS["llama"](), tmp_path / "dense", 0)
    moerge.merge({"experts": {"a": str(tmp_path / "dense"), "b": str(tmp_path / "dense")}, "moe": {}}, tmp_path / "moe")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "moe" / "model.safetensors")
    prefix = "model.layers.2.block_sparse_moe"
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for expert in range(2):
        for short, long in names.items():
            assert torch.equal(
                stored[f"{prefix}.experts.{expert}.{short}.weight"], dense.state_dict()[f"model.layers.2.mlp.{long}.weight"]
            )
    assert stored[f"{prefix}.gate.weight"].shape == (2, SIZES["hidden_size"])


@pytest.fixture
def biased(tmp_path: Path) -> dict[str, str]:
    config = transformers.LlamaConfig(**SIZES, attention_bias=True)
    save_model(config, tmp_path / "biased", 0)
    return {"a": str(tmp_path / "biased"), "b": str(tmp_path / "biased")}


def test_biases_are_refused_not_dropped(biased: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="attention_bias is true and Mixtral has no biases"):
        moerge.plan({"experts": biased, "moe": {"format": "mixtral"}})
    moerge.merge({"experts": biased}, tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(load(tmp_path / "biased")))


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "mistral-sliding"])
def test_config_reads_alike_in_old_and_new_transformers(name: str, tmp_path: Path) -> None:
    """What 4.5x reads at the top level is there beside what 5.x reads."""
    save_model(CONFIGS[name](), tmp_path / "dense", 0)
    moerge.merge({"experts": {"a": str(tmp_path / "dense"), "b": str(tmp_path / "dense")}, "moe": {}}, tmp_path / "moe")
    moerge.merge({"experts": {"a": str(tmp_path / "dense"), "b": str(tmp_path / "dense")}}, tmp_path / "flat")
    for folder in ("moe", "flat"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        read = transformers.AutoConfig.from_pretrained(tmp_path / folder)
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == read.rope_parameters["rope_theta"]
        assert written["torch_dtype"] == "float32" == str(read.dtype).removeprefix("torch.")
        scaling = written["rope_scaling"]
        assert (scaling or {"rope_type": "default"})["rope_type"] == read.rope_parameters["rope_type"]
