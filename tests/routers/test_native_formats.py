"""Every native MoE format is what MergeME 3.1.1 says, proved on logits through plain transformers. Mixtral: test_mixtral.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.architecture import moe_formats
from tests.helpers.command import moerge as command
from tests.helpers.command import refuses
from tests.helpers.hf_models import FAMILIES, LINEAR, LLAMA3, TOKENS, YARN, load, logits, random_model, read_config, save, torch
from tests.helpers.tiny import read_values, write_checkpoint, write_recipe
from tests.routers.test_derived_formats import CASES as DERIVED

pytestmark = pytest.mark.slow

FULL, SLIDING = "full_attention", "sliding_attention"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("mixtral", {"rope_parameters": YARN}),
    "llama-linear": ("mixtral", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "llama-biased": ("granitemoe", {"attention_bias": True}),
    "llama-biased-tied": ("granitemoe", {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-biased-head": ("granitemoe", {"attention_bias": True, "head_dim": 12, "num_key_value_heads": 1}),
    "qwen2": ("qwen2_moe", {}),
    "qwen2-tied": ("qwen2_moe", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-sliding": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-linear": ("qwen2_moe", {"rope_parameters": LINEAR, "rms_norm_eps": 1e-4}),
    "qwen3": ("qwen3_moe", {}),
    "qwen3-tied": ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-yarn": ("qwen3_moe", {"rope_parameters": YARN, "head_dim": 12}),
    "qwen3-llama3": ("qwen3_moe", {"rope_parameters": LLAMA3}),
    "qwen3-sliding": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "olmo2": ("flex_olmo", {}),
    "olmo2-tied": ("flex_olmo", {"tie_word_embeddings": True, "attention_bias": True}),
    "olmo2-linear": ("flex_olmo", {"rope_parameters": LINEAR}),
    "olmo2-yarn": ("flex_olmo", {"rope_parameters": YARN, "rms_norm_eps": 1e-4}),
    "granite": ("granitemoe", {}),
    "granite-tied": ("granitemoe", {"tie_word_embeddings": True, "attention_bias": True}),
    "granite-llama3": ("granitemoe", {"rope_parameters": LLAMA3}),
    "granite-yarn": ("granitemoe", {"rope_parameters": YARN}),
}
PLAIN = ("llama-biased", "qwen2", "qwen3", "olmo2", "granite")
GATES = {
    "mixtral": "block_sparse_moe.gate.weight",
    "qwen2_moe": "mlp.gate.weight",
    "qwen3_moe": "mlp.gate.weight",
    "flex_olmo": "mlp.gate.weight",
    "granitemoe": "block_sparse_moe.router.layer.weight",
}


def make(case: str) -> Any:
    return FAMILIES[case.partition("-")[0]](**CASES[case][1])


def write_experts(folder: Path, config: Any, **options: Any) -> dict[str, Any]:
    """A base, and two experts near it."""
    base = random_model(config, 0)
    models = {"base": base, **{name: random_model(config, seed, near=base) for seed, name in ((1, "math"), (2, "code"))}}
    for name, model in models.items():
        save(model.to(options.get("dtype", torch.float32)), folder / name)
    return models


@contextmanager
def forced(moe: Any, expert: int) -> Iterator[None]:
    """Every router of a model chooses one expert, whatever the token."""

    def choose(module: Any, inputs: Any, output: Any) -> Any:
        router_logits, weights, chosen = output
        alone = torch.zeros_like(weights)
        alone[:, 0] = 1
        return router_logits, alone, torch.full_like(chosen, expert)

    routers = [module for module in moe.modules() if type(module).__name__.endswith("Router")]
    assert len(routers) == moe.config.num_hidden_layers
    handles = [router.register_forward_hook(choose) for router in routers]
    yield
    for handle in handles:
        handle.remove()


def test_every_format_is_proved_here_or_in_its_own_file() -> None:
    assert {name for name, _ in CASES.values()} == set(GATES)
    assert set(GATES) | {name for name, _ in DERIVED.values()} == set(moe_formats())


@pytest.mark.parametrize("case", CASES)
def test_identical_experts_give_the_dense_logits(case: str, tmp_path: Path) -> None:
    dense = random_model(make(case), 0)
    save(dense, tmp_path / "dense")
    experts = {f"copy{i}": str(tmp_path / "dense") for i in range(3)}
    moerge.merge({"experts": experts, "moe": {"top_k": 2}}, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == CASES[case][0]
    assert moe.config.num_experts_per_tok == 2
    torch.testing.assert_close(logits(moe), logits(dense), atol=1e-5, rtol=0)
    assert moerge.verify(tmp_path / "moe").problems == ()
    assert logits(dense).std() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_a_forced_expert_gives_the_backbone_with_its_ffn(case: str, tmp_path: Path) -> None:
    models = write_experts(tmp_path, make(case))
    recipe = {"base": str(tmp_path / "base"), "experts": {name: str(tmp_path / name) for name in ("math", "code")}}
    recipe["merge"] = {"method": "ties", "density": 0.7}
    moerge.merge({**recipe, "moe": {"top_k": 1}}, tmp_path / "moe")
    moerge.merge(recipe, tmp_path / "dense")
    moe, by_hand = load(tmp_path / "moe"), load(tmp_path / "dense")
    seen = []
    for index, model in enumerate(models.values()):
        ffn = {name: value for name, value in model.state_dict().items() if ".mlp." in name}
        assert len(ffn) == 3 * 2
        by_hand.load_state_dict({**by_hand.state_dict(), **ffn})
        with forced(moe, index):
            seen.append(logits(moe))
        torch.testing.assert_close(seen[-1], logits(by_hand), atol=1e-5, rtol=0)
    assert (seen[0] - seen[1]).abs().max() > 1e-3 < (seen[1] - seen[2]).abs().max()


@pytest.mark.parametrize("case", PLAIN)
def test_free_routing_mixes_experts_with_weights_that_add_up_to_one(case: str, tmp_path: Path) -> None:
    """With all experts chosen and equal gate rows, the output of a layer is the mean of its experts'."""
    models = write_experts(tmp_path, make(case))
    recipe = {"base": str(tmp_path / "base"), "experts": {name: str(tmp_path / name) for name in ("math", "code")}}
    moerge.merge({**recipe, "moe": {"top_k": 3}}, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    mixed = logits(moe)
    for name, value in moe.named_parameters():
        if name.endswith((".gate.weight", ".router.weight")):
            torch.nn.init.zeros_(value)
    even = logits(moe)
    assert (mixed - even).abs().max() > 1e-4
    moerge.merge(recipe, tmp_path / "dense")
    dense = load(tmp_path / "dense")
    ffns = [[layer.mlp for layer in model.model.layers] for model in (models["base"], models["math"], models["code"])]
    for number, layer in enumerate(dense.model.layers):
        layer.mlp.forward = lambda x, number=number: sum(ffn[number](x) for ffn in ffns) / 3
    backbone = {name: value for name, value in load_backbone(tmp_path / "moe").items() if name in dense.state_dict()}
    dense.load_state_dict(backbone, strict=False)
    torch.testing.assert_close(even, logits(dense), atol=1e-5, rtol=0)


def load_backbone(folder: Path) -> dict[str, Any]:
    return {name: torch.from_numpy(value) for name, value in read_values(folder).items()}


@pytest.mark.parametrize("case", PLAIN)
def test_bfloat16_is_close_and_generates(case: str, tmp_path: Path) -> None:
    dense = random_model(make(case), 0, dtype=torch.bfloat16)
    save(dense, tmp_path / "dense")
    moerge.merge({"experts": {f"copy{i}": str(tmp_path / "dense") for i in range(2)}, "moe": {}}, tmp_path / "moe")
    moe = load(tmp_path / "moe", dtype="auto")
    assert {tensor.dtype for tensor in moe.state_dict().values()} == {torch.bfloat16}
    reference = logits(dense)
    assert (logits(moe) - reference).abs().max() < 0.03 * reference.abs().max()
    new = moe.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert new.shape == (1, TOKENS.shape[1] + 5)


@pytest.mark.parametrize("case", PLAIN)
def test_tensors_on_disk_are_laid_out_as_other_programs_expect(case: str, tmp_path: Path) -> None:
    models = write_experts(tmp_path, make(case))
    recipe = {"experts": {name: str(tmp_path / name) for name in ("math", "code")}, "moe": {}}
    moerge.merge(recipe, tmp_path / "moe")
    stored, kind = read_values(tmp_path / "moe"), CASES[case][0]
    dense = [{n: v.numpy() for n, v in models[name].state_dict().items() if ".1.mlp." in n} for name in ("math", "code")]
    assert stored[f"model.layers.1.{GATES[kind]}"].shape == (2, 32)
    if kind == "granitemoe":
        prefix = "model.layers.1.block_sparse_moe"
        halves = [[one[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")] for one in dense]
        np.testing.assert_array_equal(stored[f"{prefix}.input_linear.weight"], [np.concatenate(pair) for pair in halves])
        down = [one["model.layers.1.mlp.down_proj.weight"] for one in dense]
        np.testing.assert_array_equal(stored[f"{prefix}.output_linear.weight"], down)
        return
    for expert, tensors in enumerate(dense):
        for part in ("gate", "up", "down"):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            np.testing.assert_array_equal(stored[name], tensors[f"model.layers.1.mlp.{part}_proj.weight"])


def test_configs_read_alike_in_old_and_new_transformers(tmp_path: Path) -> None:
    """What 4.5x reads at the top level is there, and what families assume differently is written out."""
    written = {}
    for case in ("llama-biased", "qwen2-sliding", "qwen3-yarn", "olmo2", "granite"):
        save(random_model(make(case), 0), tmp_path / case)
        experts = {"a": str(tmp_path / case), "b": str(tmp_path / case)}
        moerge.merge({"experts": experts, "moe": {}}, tmp_path / f"{case}-moe")
        config = written[case] = read_config(tmp_path / f"{case}-moe")
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert config["torch_dtype"] == config["dtype"] == "float32"
        assert (config["num_experts_per_tok"], config["pad_token_id"], config["eos_token_id"]) == (2, 0, 2)
        assert config.get("num_experts", config.get("num_local_experts")) == 2
    qwen2, qwen3, olmo = written["qwen2-sliding"], written["qwen3-yarn"], written["olmo2"]
    assert qwen2["layer_types"] == [FULL, SLIDING]
    assert (qwen2["use_sliding_window"], qwen2["sliding_window"], qwen2["max_window_layers"]) == (True, 4, 1)
    assert (qwen2["norm_topk_prob"], qwen3["norm_topk_prob"], olmo["norm_topk_prob"]) == (True, True, True)
    assert (qwen2["moe_intermediate_size"], qwen3["moe_intermediate_size"], olmo["intermediate_size"]) == (48, 48, 48)
    assert (qwen2["num_experts"], qwen3["num_experts"], olmo["num_experts"]) == (2, 2, 2)
    assert qwen3["rope_scaling"]["rope_type"] == "yarn" and qwen3["rope_theta"] == 7000.0
    assert written["llama-biased"]["attention_multiplier"] == 8**-0.5
    assert (written["granite"]["attention_multiplier"], written["granite"]["logits_scaling"]) == (0.2, 2.0)


def test_the_shared_expert_of_qwen2_moe_is_nothing(tmp_path: Path) -> None:
    """It has to be there, since llama.cpp reads it: zeros, positive ones, behind a gate that is not zero."""
    save(random_model(make("qwen2"), 0), tmp_path / "dense")
    recipe = write_recipe(tmp_path, base=None, experts={"a": "dense", "b": "dense"}, moe={})
    planned = command("plan", recipe)
    assert "zeros" in planned.out
    moerge.merge(recipe, tmp_path / "moe")
    shared = {name: value for name, value in read_values(tmp_path / "moe").items() if "shared_expert" in name}
    assert len(shared) == 2 * 4
    assert {value.shape for value in shared.values()} == {(64, 32), (32, 64), (1, 32)}
    for name, value in shared.items():
        assert value.all() if name.endswith("shared_expert_gate.weight") else not value.view(np.uint32).any()


def test_joined_experts_of_several_types_and_shards(tmp_path: Path) -> None:
    """Each expert's values are rounded once, whatever type the others have."""
    models = write_experts(tmp_path, make("granite"))
    models["math"].half().save_pretrained(tmp_path / "math")
    models["code"].bfloat16().save_pretrained(tmp_path / "code", max_shard_size="10KB")
    (tmp_path / "code" / "model.safetensors").unlink()
    recipe = write_recipe(tmp_path, experts=("math", "code"), moe={}, merge={"method": "linear"}, dtype="bfloat16")
    for threads in (1, 3):
        moerge.merge(recipe, tmp_path / f"moe{threads}", threads=threads)
    stored = read_values(tmp_path / "moe1")["model.layers.0.block_sparse_moe.output_linear.weight"]
    down = [models[name].bfloat16().model.layers[0].mlp.down_proj.weight.detach().float().numpy() for name in models]
    np.testing.assert_array_equal(stored, down)
    files = [(tmp_path / f"moe{threads}" / "model.safetensors").read_bytes() for threads in (1, 3)]
    assert files[0] == files[1]


def test_a_joined_tensor_names_the_expert_with_nan(tmp_path: Path) -> None:
    write_experts(tmp_path, make("granite"))
    values = read_values(tmp_path / "code")
    values["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    write_checkpoint(tmp_path / "code", values, read_config(tmp_path / "code"), dtype="F32")
    recipe = write_recipe(tmp_path, experts=("math", "code"), moe={})
    refuses(recipe, tmp_path / "out", "code: tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinity")
    assert command("merge", recipe, tmp_path / "out", "--allow-nonfinite", "--quiet").code == 0
    assert moerge.verify(tmp_path / "out").problems


OBSTACLES = [
    ("llama", {"mlp_bias": True}, {}, "cannot build a mixtral model: mlp_bias is true and Mixtral has no biases"),
    (
        "llama",
        {"attention_bias": True},
        {"format": "mixtral"},
        "attention_bias is true and Mixtral has no biases, so they would be lost: choose 'format: granitemoe', which has",
    ),
    ("granite", {"mlp_bias": True}, {}, "mlp_bias is true and GraniteMoe has no biases in its experts"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {},
        "cannot build a qwen3_moe model: some layers have a sliding window and others have not",
    ),
    ("qwen2", {}, {"format": "mixtral"}, "moe.format: experts of type 'qwen2' do not map to mixtral exactly (it takes: llama, m"),
    ("gemma2", {}, {}, "no token-routed MoE format is known for experts of type 'gemma2' (known: ernie4_5, granite,"),
    ("phi3", {}, {}, "no token-routed MoE format is known for experts of type 'phi3'"),
    ("mixtral", {}, {}, "no token-routed MoE format is known for experts of type 'mixtral'"),
]


@pytest.mark.parametrize(("name", "flags", "moe", "message"), OBSTACLES)
def test_what_a_format_cannot_express_is_refused(
    name: str, flags: dict[str, Any], moe: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(random_model(FAMILIES[name](**flags), 0), tmp_path / "dense")
    recipe = write_recipe(tmp_path, base=None, experts={"a": "dense", "b": "dense"}, moe=moe)
    refuses(recipe, tmp_path / "out", message)


CAUTIONS = [
    ("qwen2-sliding", "transformers 4 takes the sliding window of some layers for one of all layers in a Qwen2-MoE"),
    ("llama-biased-head", "transformers 4 cannot load a GraniteMoe with a head_dim of its own (12): use transformers 5"),
]


@pytest.mark.parametrize("case", [*PLAIN, *(case for case, _ in CAUTIONS)])
def test_what_older_programs_get_wrong_is_a_warning(case: str, tmp_path: Path) -> None:
    save(random_model(make(case), 0), tmp_path / "dense")
    recipe = write_recipe(tmp_path, base=None, experts={"a": "dense", "b": "dense"}, moe={})
    warned = [text for text in command("plan", recipe, "--json").json["warnings"] if "transformers 4" in text]
    assert len(warned) == (case in dict(CAUTIONS))
    assert not warned or dict(CAUTIONS)[case] in warned[0]


def test_auto_prefers_mixtral_and_takes_granitemoe_by_name(tmp_path: Path) -> None:
    dense = random_model(FAMILIES["llama"](), 0)
    save(dense, tmp_path / "dense")
    experts = {"a": str(tmp_path / "dense"), "b": str(tmp_path / "dense")}
    assert moerge.plan({"experts": experts, "moe": {}}).config["model_type"] == "mixtral"
    moerge.merge({"experts": experts, "moe": {"format": "granitemoe"}}, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == "granitemoe"
    torch.testing.assert_close(logits(moe), logits(dense), atol=1e-5, rtol=0)


@pytest.fixture(params=["llama", *PLAIN])
def calibrated(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base and two experts, and text of words that only one of them has."""
    case = request.param
    write_experts(tmp_path, FAMILIES["llama"]() if case == "llama" else make(case))
    for number, name in enumerate(("base", "math", "code")):
        words = [f"w{3 + 20 * number + word}" for word in range(5)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(" ".join(words[i:] + words[:i]) for i in range(5)))
        (tmp_path / f"{name}-held-out.txt").write_text("\n\n".join(" ".join(words[i::-1] + words[:i:-1]) for i in range(5)))
    return tmp_path


def test_ridge_and_route(calibrated: Path) -> None:
    """A router fitted to each expert's text sends that text there; `route` sees the gates that the model has."""
    names = ("base", "math", "code")
    texts = {name: f"{name}.txt" for name in names}
    recipe = write_recipe(calibrated, experts=("math", "code"), moe={"router": {"kind": "ridge"}}, calibration=texts)
    moerge.merge(recipe, calibrated / "moe")
    moe = load(calibrated / "moe")
    written = {
        name: value for name, value in read_values(calibrated / "moe").items() if name.endswith(GATES[moe.config.model_type])
    }
    assert len(written) == 2 and all(np.abs(gate).max() > 0.01 for gate in written.values())
    options = [part for name in names for part in ("--text", f"{name}={calibrated / name}-held-out.txt")]
    found = command("route", calibrated / "moe", *options, "--json").json
    assert (found["level"], found["experts"]) == ("token", list(names))
    assert all(found["texts"][name]["accuracy"] > 0.8 for name in names)
    seen: list[Any] = []
    for module in moe.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output[0].softmax(-1)))
    shares = []
    for document in (calibrated / "math-held-out.txt").read_text().split("\n\n"):
        seen.clear()
        logits(moe, torch.tensor([[int(word[1:]) for word in document.split()]]))
        assert len(seen) == 2
        shares.append(torch.cat(seen).mean(0))
    expected = torch.stack(shares).mean(0).tolist()
    assert list(found["texts"]["math"]["alpha"].values()) == pytest.approx(expected, abs=1e-5)


def test_projection_without_a_norm_before_the_ffn(tmp_path: Path) -> None:
    """OLMo 2 has none, so the sign of the mean is that of the embeddings alone."""
    write_experts(tmp_path, make("olmo2"))
    recipe = write_recipe(tmp_path, experts=("math", "code"), moe={"router": {"kind": "projection", "sign": "mean"}})
    moerge.merge(recipe, tmp_path / "moe")
    gate = read_values(tmp_path / "moe")["model.layers.0.mlp.gate.weight"]
    np.testing.assert_allclose(np.linalg.norm(gate, axis=1), [0, 1, 1], atol=1e-5)
    embedding = read_values(tmp_path / "base")["model.embed_tokens.weight"].astype(np.float64)
    mean = (embedding / np.sqrt(np.mean(embedding**2, axis=1, keepdims=True))).mean(axis=0)
    assert (gate[1:] @ mean > 0).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sequence_routing_fixed_to_an_expert_gives_its_logits(family: str, tmp_path: Path) -> None:
    from moerge.modeling import register

    register()
    models = write_experts(tmp_path, FAMILIES[family](tie_word_embeddings=family == "qwen2"))
    separate = ["ffn", "attention", "norm", "embedding", "head"]
    for name in ("base", "code"):
        moe = {"format": "moerge", "separate": separate, "router": {"kind": "fixed", "expert": name}}
        recipe = write_recipe(tmp_path, experts=("math", "code"), moe=moe)
        assert command("merge", recipe, tmp_path / f"to-{name}", "--quiet").code == 0
        torch.testing.assert_close(logits(load(tmp_path / f"to-{name}")), logits(models[name]), atol=1e-5, rtol=0)
        roles = command("inspect", tmp_path / f"to-{name}", "--json").json["roles"]
        assert not [role["role"] for role in roles if role["role"].startswith("(")]
