"""Token-level routing in our own format: any family's own model, with mixtures in the place of its feed-forward modules."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.modeling import register
from tests.helpers.command import moerge as command
from tests.helpers.command import refuses
from tests.helpers.hf_models import FAMILIES, GROUPED, TOKENS, load, logits, random_model, read_config, save, torch, transformers
from tests.helpers.tiny import make_models, read_values, write_recipe

pytestmark = pytest.mark.slow

BY_TOKEN = {"format": "moerge", "level": "token"}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
LINEAR = {f"linear_{key}": value for key, value in {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8}.items()}
DERIVED: dict[str, dict[str, Any]] = {
    "phi": {},
    "olmo": {},
    "olmo3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "stablelm": {},
    "cohere": {},
    "cohere2": {},
    "starcoder2": {"sliding_window": None},
    "falcon": {"ffn_hidden_size": 48, "new_decoder_architecture": False},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "qwen3_5_text": {
        "head_dim": 8,
        **LINEAR,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
    "seed_oss": {},
    "nemotron": {},
    "arcee": {},
    "persimmon": {},
}
TABLED = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2")
KINDS = ("gemma3_text", "phi3", "gpt_neox", "gpt2", "glm4", "olmo3")


def make(family: str, **more: Any) -> Any:
    if family in FAMILIES:
        return FAMILIES[family](**more)
    return transformers.AutoConfig.for_model(family, **{**GROUPED, **DERIVED[family], **more})


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def write_experts(folder: Path, config: Any) -> dict[str, Any]:
    base = random_model(config, 0)
    models = {"base": base, **{name: random_model(config, seed, near=base) for seed, name in ((1, "math"), (2, "code"))}}
    for name, model in models.items():
        save(model, folder / name)
    return models


def merge(folder: Path, *, out: str = "moe", recipe: dict[str, Any] | None = None, **moe: Any) -> Any:
    moerge.merge(write_recipe(folder, experts=("math", "code"), moe={**BY_TOKEN, **moe}, **(recipe or {})), folder / out)
    return load(folder / out)


def feed_forwards(model: Any) -> list[Any]:
    """A dense model's feed-forward modules, by layer."""
    named = [
        (name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in ("mlp", "feed_forward", "ffn")
    ]
    return [module for name, module in named if "vision" not in name]


@pytest.mark.parametrize("family", [*TABLED, *DERIVED])
def test_identical_experts_give_the_dense_logits_and_text(family: str, tmp_path: Path) -> None:
    dense = random_model(make(family), 0)
    save(dense, tmp_path / "dense")
    moerge.merge({"experts": {f"copy{i}": str(tmp_path / "dense") for i in range(3)}, "moe": BY_TOKEN}, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert (moe.config.model_type, moe.config.expert_config.model_type) == ("moerge_token", family)
    torch.testing.assert_close(logits(moe), logits(dense), atol=2e-5, rtol=0)
    assert logits(dense).std() > 0.02
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompts = {"input_ids": TOKENS[:, :6], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    assert torch.equal(moe.generate(**prompts, **options), dense.generate(**prompts, **options))
    assert moerge.verify(tmp_path / "moe").problems == ()
    assert not [role.role for role in moerge.inspect(tmp_path / "moe").roles if role.role.startswith("(")]


@pytest.mark.parametrize("family", KINDS)
def test_experts_are_chosen_and_weighed_token_by_token(family: str, tmp_path: Path) -> None:
    """Against a loop over tokens, with the experts' own dense modules on the merged backbone."""
    models = write_experts(tmp_path, make(family))
    moe = merge(tmp_path, top_k=2, router={"kind": "random", "std": 1.0})
    stored = read_values(tmp_path / "moe")
    by_hand = load(tmp_path / "base")
    names = {name: name.removeprefix("dense.").replace("embed_out", "lm_head") for name in stored}
    by_hand.load_state_dict({names[name]: torch.from_numpy(value) for name, value in stored.items()}, strict=False)
    gates = [torch.from_numpy(value) for name, value in sorted(stored.items()) if name.endswith("router.weight")]
    chosen: set[tuple[int, ...]] = set()
    own = [feed_forwards(model) for model in models.values()]

    def route(states: Any, number: int) -> Any:
        rows = []
        for token in states.reshape(-1, states.shape[-1]):
            scores = gates[number] @ token
            best = scores.topk(2).indices
            chosen.add(tuple(best.tolist()))
            weights = (scores[best].double().exp() / scores[best].double().exp().sum()).float()
            rows.append(sum(w * own[i][number](token[None, None])[0, 0] for w, i in zip(weights, best, strict=True)))
        return torch.stack(rows).reshape(states.shape)

    for number, module in enumerate(feed_forwards(by_hand)):
        module.forward = partial(route, number=number)
    torch.testing.assert_close(logits(moe), logits(by_hand), atol=2e-5, rtol=0)
    assert len(chosen) > 3
    found = moe(TOKENS, output_router_logits=True).router_logits
    assert [tuple(layer.shape) for layer in found] == [(TOKENS.numel(), 3)] * 2


def test_a_shared_expert_and_mixtures_in_some_layers(tmp_path: Path) -> None:
    models = write_experts(tmp_path, make("gemma3_text", num_hidden_layers=3, layer_types=["full_attention"] * 3))
    moe = merge(tmp_path, top_k=1, shared="base", shared_weight=0.25, layers="1-")
    moerge.merge(write_recipe(tmp_path, experts=("math", "code")), tmp_path / "dense")
    by_hand = load(tmp_path / "dense")
    for router in (module for name, module in moe.named_modules() if name.endswith(".router")):
        torch.nn.init.zeros_(router.weight)  # the first expert, math
    for number in (1, 2):
        math, shared = (models[name].model.layers[number].mlp for name in ("math", "base"))
        by_hand.model.layers[number].mlp.forward = lambda x, a=math, b=shared: 0.75 * a(x) + 0.25 * b(x)
    torch.testing.assert_close(logits(moe), logits(by_hand), atol=2e-5, rtol=0)
    assert read_config(tmp_path / "moe")["moe_layers"] == [1, 2]
    assert moerge.verify(tmp_path / "moe").problems == ()


ALONE = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
assert "moerge" not in sys.modules and not [name for name in sys.modules if name.startswith("moerge.")]
model.save_pretrained(sys.argv[2])
with torch.no_grad():
    print(json.dumps(model.eval()(input_ids=torch.tensor([[3, 9, 27, 5]])).logits[0, -1].tolist()))
"""


def test_it_loads_where_moerge_is_not_installed(tmp_path: Path) -> None:
    write_experts(tmp_path, make("gemma2"))
    moe = merge(tmp_path)
    expected = logits(moe, torch.tensor([[3, 9, 27, 5]]))[0, -1].tolist()
    for folder in ("moe", "again"):  # what is saved from there loads there too
        arguments = [tmp_path / folder, tmp_path / ("again" if folder == "moe" else "third")]
        done = subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-5)


def test_gradients_and_checkpointing(tmp_path: Path) -> None:
    """What the router and every expert that was chosen learn from, the same with and without checkpointed layers."""
    write_experts(tmp_path, make("gemma3_text"))
    moe = merge(tmp_path)
    found = []
    for checkpointed in (False, True):
        moe.zero_grad()
        if checkpointed:
            moe.activation_checkpointing_enable({"use_reentrant": False})
        moe.train()
        moe(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append({name: value.grad.clone() for name, value in moe.named_parameters()})
    assert all(grad.abs().max() > 0 for name, grad in found[0].items())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


KINDS_WITH_TEXT = [(family, {"n_positions": 256} if family == "gpt2" else {}) for family in KINDS]


@pytest.fixture(params=KINDS_WITH_TEXT, ids=KINDS)
def calibrated(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base and two experts, and text of words that only one of them has."""
    family, sizes = request.param
    write_experts(tmp_path, make(family, **sizes))
    for number, name in enumerate(("base", "math", "code")):
        words = [f"w{3 + 20 * number + word}" for word in range(5)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(" ".join(words[i:] + words[:i]) for i in range(5)))
        (tmp_path / f"{name}-held-out.txt").write_text("\n\n".join(" ".join(words[i::-1] + words[:i:-1]) for i in range(5)))
    return tmp_path


def test_every_router_without_training(calibrated: Path) -> None:
    """All of them run on the routed model; a ridge router sends each text to its expert, and `route` sees it."""
    names = ("base", "math", "code")
    texts = {"calibration": {name: f"{name}.txt" for name in names}}
    for kind in ("perplexity", "hidden", "projection"):
        moe = merge(calibrated, out=kind, router={"kind": kind}, recipe={} if kind == "projection" else texts)
        gates = [value for name, value in moe.named_parameters() if name.endswith("router.weight")]
        assert len(gates) == 2 and all(gate[1:].abs().max() > 0.01 for gate in gates)
    merge(calibrated, router={"kind": "ridge"}, recipe=texts)
    options = [part for name in names for part in ("--text", f"{name}={calibrated / name}-held-out.txt")]
    result = command("route", calibrated / "moe", *options, "--json")
    assert result.code == 0, result.err
    found = result.json
    assert (found["level"], found["experts"]) == ("token", list(names))
    assert all(found["texts"][name]["accuracy"] > 0.8 for name in names)


def test_tuning_the_router_and_one_expert(tmp_path: Path) -> None:
    write_experts(tmp_path, make("gemma3_text"))
    before = {name: value.clone() for name, value in merge(tmp_path).state_dict().items()}
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(f"w{(i * j) % 50 + 3}" for j in range(1, 20)) for i in range(1, 12)))
    settings = {"model": "moe", "data": {"text": "text.txt"}, "learning_rate": 1e-2, "batch": 2, "length": 16, "steps": 4}
    settings |= {"device": "cpu", "train": ["router", "experts.math"], "losses": {"load_balance": 0.1, "router_z": 0.01}}
    (tmp_path / "tune.yaml").write_text(json.dumps(settings))
    result = command("tune", tmp_path / "tune.yaml", tmp_path / "tuned", "--quiet")
    assert result.code == 0, result.err
    after = load(tmp_path / "tuned").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".router." in name or ".experts." in name}
    for name in (name for name in moved if ".experts." in name):
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]])
    assert command("generate", tmp_path / "tuned", "--prompt", "w3 w4").code == 0


def test_bfloat16_of_any_width(tmp_path: Path) -> None:
    """Rows of a number of bytes that torch's grouped product refuses."""
    dense = random_model(make("gemma3_text", intermediate_size=45), 0, dtype=torch.bfloat16)
    save(dense, tmp_path / "dense")
    moerge.merge({"experts": {f"copy{i}": str(tmp_path / "dense") for i in range(2)}, "moe": BY_TOKEN}, tmp_path / "moe")
    moe = load(tmp_path / "moe", dtype="auto")
    reference = logits(dense)
    assert (logits(moe) - reference).abs().max() < 0.03 * reference.abs().max()


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"level": "token", "format": "moerge", "mix": "layer"}, "moe.mix is for models that route whole sequences"),
        ({"level": "token", "format": "moerge", "router": {"kind": "fixed", "expert": "math"}}, "moe.router.kind"),
        ({"level": "token", "format": "moerge", "separate": ["attention"]}, "token-routed models keep only 'ffn' separate"),
        ({"level": "sequence"}, "moe.level: native formats route tokens"),
        ({"level": "tokens", "format": "moerge"}, "moe.level"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(moe: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_models(tmp_path)
    refuses(write_recipe(tmp_path, experts=("math", "code"), moe=moe), tmp_path / "out", message)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "'opt' cannot be routed by token: a opt has no module of its own"),
        ("apertus", {}, "'apertus' cannot be routed by token: the feed-forward module of a apertus has 'layers.N.ffn.act_fn"),
    ],
)
def test_families_whose_feed_forward_cannot_be_routed(family: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(random_model(transformers.AutoConfig.for_model(family, **{**GROUPED, **keys}), 0), tmp_path / "dense")
    recipe = write_recipe(tmp_path, base=None, experts={"a": "dense", "b": "dense"}, moe=BY_TOKEN)
    refuses(recipe, tmp_path / "out", message)


def test_a_config_that_says_nonsense_is_an_error(tmp_path: Path) -> None:
    from moerge.modeling import MoergeTokenConfig

    own = make("gemma").to_dict()
    for keys, message in (
        ({"expert_names": ["a", "a"]}, "expert_names"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"moe_layers": [2]}, "moe_layers"),
        ({"shared_weight": 1.5}, "shared_weight"),
        ({"expert_config": {}}, "expert_config"),
    ):
        with pytest.raises(ValueError, match=message):
            MoergeTokenConfig(**{"expert_config": own, "expert_names": ["a", "b"], **keys})
    config = MoergeTokenConfig(expert_config=own, expert_names=["a", "b"], feed_forward="model.layers.{layer}.ffn")
    with pytest.raises(ValueError, match=r"feed_forward: models of type 'gemma' have no model.layers.0.ffn"):
        transformers.AutoModelForCausalLM.from_config(config)
