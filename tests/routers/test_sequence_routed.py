"""Recipes with `format: moerge`: the folder loads with transformers either way, and computes what its experts compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moerge
from tests.helpers.command import moerge as command
from tests.helpers.command import refuses
from tests.helpers.tiny import (
    EXPERTS,
    edit_config,
    llama_config,
    llama_tensors,
    make_models,
    read_tensors,
    write_checkpoint,
    write_recipe,
)

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

from moerge.modeling import ROLES, code_files, register, separate_name  # noqa: E402

pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 5, 9, 33, 7, 40, 12]])
BASE = {"base": "base", "experts": {name: name for name in EXPERTS}}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in float32 whose norms, embeddings and all else differ."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, dtype="F32", tied=request.param, config={"torch_dtype": "float32"})
    return folder


def merged(models: Path, out: Path, *, merge: Any = None, **moe: Any) -> Path:
    recipe = write_recipe(models, f"{out.name}.yaml", merge=merge or {"method": "average"}, moe={"format": "moerge", **moe})
    moerge.merge(recipe, out, threads=1)
    return out


def load(folder: Path, **options: Any) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


def is_tied(models: Path) -> bool:
    return bool(json.loads((models / "base" / "config.json").read_text())["tie_word_embeddings"])


@pytest.mark.parametrize("expert", ["base", "code"])
@pytest.mark.parametrize("mix", ["layer", "output", "logits"])
def test_fixed_with_everything_separate_is_the_expert(models: Path, tmp_path: Path, expert: str, mix: str) -> None:
    out = merged(models, tmp_path / "out", separate=list(ROLES), mix=mix, router={"kind": "fixed", "expert": expert})
    expected, actual = logits(load(models / expert)), logits(load(out))
    if mix == "logits":  # mixed as probabilities
        expected, actual = expected.log_softmax(-1), actual.log_softmax(-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(load(models / "math")).log_softmax(-1), actual.log_softmax(-1), atol=1e-3)


def test_separate_ffn_is_the_merged_backbone_with_the_expert_s_ffn(models: Path, tmp_path: Path) -> None:
    """A dense checkpoint of the two, written by hand, computes the same."""
    dare = {"method": "dare", "density": 0.5, "seed": 3}
    out = merged(models, tmp_path / "out", merge=dare, router={"kind": "fixed", "expert": "math"})
    dense = tmp_path / "dense"
    moerge.merge({**BASE, "merge": dare, "base": str(models / "base"), "experts": _absolute(models)}, dense, threads=1)
    stored = read_tensors(dense)
    stored |= {name: tensor for name, tensor in read_tensors(models / "math").items() if ".mlp." in name}
    config = json.loads((models / "base" / "config.json").read_text())
    write_checkpoint(tmp_path / "by-hand", stored, config, dtype="F32")
    torch.testing.assert_close(logits(load(out)), logits(load(tmp_path / "by-hand")), rtol=0, atol=1e-5)


def _absolute(models: Path) -> dict[str, str]:
    return {name: str(models / name) for name in EXPERTS}


def test_tensors_are_copies_and_merges(models: Path, tmp_path: Path) -> None:
    out = merged(models, tmp_path / "out", merge={"method": "ties"}, separate=["attention", "norm"])
    dense = tmp_path / "dense"
    moerge.merge({"base": str(models / "base"), "experts": _absolute(models), "merge": {"method": "ties"}}, dense, threads=1)
    found, shared = read_tensors(out), read_tensors(dense)
    experts = {name: read_tensors(models / name) for name in ("base", *EXPERTS)}
    expected = {}
    for name, tensor in shared.items():
        if "attn" in name or "norm" in name:
            expected |= {separate_name(name, i): tensors[name] for i, tensors in enumerate(experts.values())}
        else:
            expected[separate_name(name, 0)] = tensor
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert ("lm_head.0.weight" in found) is not is_tied(models)


def test_a_stored_head_is_left_out_where_embeddings_are_tied(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=True)
    for seed, name in enumerate(("base", "math", "code")):
        tensors = llama_tensors(config, seed=seed)
        write_checkpoint(tmp_path / name, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, config)
    recipe = write_recipe(tmp_path, experts=["math", "code"], moe={"format": "moerge"})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    assert not [name for name in read_tensors(tmp_path / "out") if name.startswith("lm_head")]
    load(tmp_path / "out")


def test_it_loads_without_moerge(models: Path, tmp_path: Path) -> None:
    """In a process that cannot import moerge, from the code beside the weights; and generates greedily as it does here."""
    out = merged(models, tmp_path / "out", separate=["ffn", "attention"])
    assert {name: (out / name).read_bytes() for name in code_files()} == {n: p.read_bytes() for n, p in code_files().items()}
    script = (
        "import sys; sys.modules['moerge'] = None\n"
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules.')\n"
        f"print(model.generate(torch.tensor({IDS.tolist()}), max_new_tokens=8, do_sample=False).tolist())"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    model = load(out)
    assert type(model).__module__ == "moerge.modeling.modeling_moerge"
    here = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert json.loads(result.stdout) == here.tolist()


def test_perplexity_routes_by_the_experts_perplexities(models: Path, tmp_path: Path) -> None:
    """With everything separate the paths are the experts themselves: alpha = softmax(top-2(1 / PPL))."""
    out = merged(models, tmp_path / "out", separate=list(ROLES))
    scores = []
    for name in ("base", *EXPERTS):
        dense = load(models / name)
        with torch.no_grad():
            scores.append(float(torch.exp(-dense(IDS, labels=IDS).loss)))
    kept = sorted(range(4), key=lambda i: -scores[i])[:2]
    alpha = torch.zeros(4)
    alpha[kept] = torch.tensor([scores[i] for i in kept]).softmax(0)
    routing = load(out).route(IDS)
    torch.testing.assert_close(routing.scores[0], torch.tensor(scores), rtol=1e-4, atol=0)
    torch.testing.assert_close(routing.alpha[0], alpha, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "stored"),
    [
        ({}, {"kind": "perplexity", "top_k": 2, "temperature": 1.0}),
        ({"kind": "perplexity", "temperature": 0.1}, {"kind": "perplexity", "top_k": 2, "temperature": 0.1}),
        (
            {"kind": "task_vector", "roles": ["ffn"], "layers": [1]},
            {"kind": "task_vector", "top_k": 2, "temperature": 1.0, "roles": ["ffn"], "layers": [1]},
        ),
        ({"kind": "random", "seed": 4}, {"kind": "random", "top_k": 2, "temperature": 1.0, "seed": 4}),
        ({"kind": "uniform"}, {"kind": "uniform"}),
        ({"kind": "fixed", "expert": "knowledge"}, {"kind": "fixed", "expert": "knowledge"}),
        ({"kind": "learned", "seed": 1, "std": 0.5}, {"kind": "learned", "top_k": 2, "temperature": 1.0}),
    ],
)
def test_every_kind_of_routing(models: Path, tmp_path: Path, router: dict[str, Any], stored: dict[str, Any]) -> None:
    out = merged(models, tmp_path / "out", **({"router": router} if router else {}))
    config = json.loads((out / "config.json").read_text())
    assert config["routing"] == stored
    assert moerge.verify(out, threads=1).problems == ()
    model = load(out)
    expected = {"roles": None, "layers": None} if stored["kind"] == "task_vector" else {}
    assert model.config.routing == {**expected, **stored}
    alpha = model.route(IDS).alpha
    torch.testing.assert_close(alpha.sum(-1), torch.ones(1))
    assert (alpha > 0).sum() == {"uniform": 4, "fixed": 1}.get(stored["kind"], 2)


def test_the_learned_gate_is_drawn_by_its_seed(models: Path, tmp_path: Path) -> None:
    gates = {}
    for name, router in {"a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 2}, "wide": {"seed": 1, "std": 3.0}}.items():
        gates[name] = read_tensors(merged(models, tmp_path / name, router={"kind": "learned", **router}))["router.weight"]
    assert gates["a"].shape == (4, 16)
    assert (gates["a"] == gates["b"]).all() and not (gates["a"] == gates["c"]).any()
    assert abs(gates["a"]).max() < 1 / 4 < 1 < abs(gates["wide"]).max() < 3 * 3**0.5  # bound 1 / sqrt(hidden size)
    planned = moerge.plan(models / "a.yaml")
    assert planned.warnings == ("the learned router is untrained: the MoE mixes its experts blindly until it is fine-tuned",)


def test_seed_option_replaces_the_seeds_of_routing(models: Path) -> None:
    def routing(**router: Any) -> Any:
        recipe = {"base": str(models / "base"), "experts": _absolute(models), "moe": {"format": "moerge", "router": router}}
        return moerge.plan(recipe, seed=9).config["routing"]

    assert routing(kind="random", seed=1)["seed"] == 9
    assert routing(kind="random")["seed"] == 9
    assert routing() == {"kind": "perplexity", "top_k": 2, "temperature": 1.0}
    assert routing(kind="fixed", expert="base") == {"kind": "fixed", "expert": "base"}


def test_config_dtype_and_experts(tmp_path: Path) -> None:
    make_models(tmp_path, config={"rope_theta": 5e5, "pad_token_id": 0})
    out = merged(
        tmp_path,
        tmp_path / "out",
        include_base=False,
        separate=["embedding", "head", "ffn"],
        mix="output",
        router={"kind": "uniform"},
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["dtype"]) == ("moerge", ["MoergeForCausalLM"], "bfloat16")
    assert (config["expert_names"], config["mix"]) == (list(EXPERTS), "output")
    assert [config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, 0]
    assert "top_k" not in config
    model = load(out)
    assert (model.dtype, model.config.separate) == (torch.bfloat16, ["ffn", "embedding", "head"])
    assert model.config.expert_config.rope_parameters["rope_theta"] == 5e5
    edit_config(out, mix="layer")
    assert moerge.verify(out, threads=1).problems == ("config.json was changed after the merge",)


def test_verify_and_inspect_know_the_layout(models: Path, tmp_path: Path) -> None:
    out = merged(models, tmp_path / "out", separate=["ffn", "norm"], router={"kind": "learned"})
    found = moerge.inspect(out).to_json()
    assert (found["family"], found["layers"], found["hidden_size"], found["tied_embeddings"]) == (
        "moerge",
        2,
        16,
        is_tied(models),
    )
    roles = {role["role"]: role["tensors"] for role in found["roles"]}
    assert roles["embedding"] == roles["router"] == 1
    assert (roles["layers.*.norm.*.attention"], roles["norm.*.final"]) == (8, 4)
    assert (roles["layers.*.attention.q"], roles["layers.*.ffn.*.up"]) == (2, 8)
    assert not [role for role in roles if "(no role)" in role]
    (out / "moerge.json").unlink()
    assert moerge.verify(out, threads=1).problems == ()
    names = [*json.loads((out / "config.json").read_text())["expert_names"], "more"]
    edit_config(out, expert_names=names)
    problems = moerge.verify(out, threads=1).problems
    assert "tensor 'model.layers.0.mlp.4.gate_proj.weight' is missing" in problems
    assert "tensor 'router.weight' has shape [4, 16], expected [5, 16]" in problems


def test_models_saved_by_transformers_verify(models: Path, tmp_path: Path) -> None:
    load(merged(models, tmp_path / "out")).save_pretrained(tmp_path / "saved")
    assert moerge.verify(tmp_path / "saved", threads=1).problems == ()
    assert {role.role for role in moerge.inspect(tmp_path / "saved").roles} == {
        role.role for role in moerge.inspect(tmp_path / "out").roles
    }


def test_experts_of_another_family_than_llama(tmp_path: Path) -> None:
    config = llama_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_bias=True, torch_dtype="float32")
    for seed, name in enumerate(("base", "math", "code")):
        tensors = {key: value for key, value in llama_tensors(config, seed=seed).items() if not key.endswith("o_proj.bias")}
        write_checkpoint(tmp_path / name, tensors, config, dtype="F32")
    router = {"kind": "fixed", "expert": "math"}
    recipe = write_recipe(tmp_path, experts=["math", "code"], moe={"format": "moerge", "separate": list(ROLES), "router": router})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "math")), rtol=0, atol=1e-5)
    assert moerge.verify(tmp_path / "out", threads=1).problems == ()
    assert [role.role for role in moerge.inspect(tmp_path / "out").roles][:2] == ["embedding.*", "layers.*.norm.*.attention"]


def test_the_model_card_says_how_to_load_it(models: Path, tmp_path: Path) -> None:
    card = (merged(models, tmp_path / "out", separate=["ffn"], mix="output") / "README.md").read_text()
    assert "# A sequence-routed mixture of experts merged from 3 experts" in card
    assert "trust_remote_code=True" in card and "moerge.modeling.register()" in card
    assert "routed as a whole, by its prompt: perplexity (top_k 2, temperature 1.0), mixed by layer" not in card
    assert "routed as a whole, by its prompt: perplexity (top_k 2, temperature 1.0), mixed by output." in card


HEAD = "base: base\nexperts: {math: math, code: code}\nmoe:\n  format: moerge\n"
BAD = {
    HEAD
    + "  separate: [fnn]\n": "line 5: moe.separate[0] should be 'ffn', 'attention', 'norm', 'embedding' or 'head', not 'fnn'",
    HEAD + "  mix: layers\n": "line 5: moe.mix should be 'layer', 'output' or 'logits', not 'layers'",
    HEAD
    + "  router: {kind: perplexty}\n": "moe.router.kind: unknown sequence router kind 'perplexty': did you mean 'perplexity'?",
    HEAD + "  router: {temprature: 1}\n": "line 5: moe.router.temprature: unknown key, did you mean 'temperature'?",
    HEAD + "  router: {temperature: 0}\n": "line 5: moe.router.temperature should be greater than or equal to 0.000001, not 0",
    HEAD + "  router: {kind: learned, std: 1.0e+39}\n": "line 5: moe.router.std should be less than or equal to 100, not 1e+39",
    HEAD + "  router: {top_k: 1}\n": "line 5: moe.router.top_k: unknown key, 'top_k' stands beside 'router', in 'moe'",
    HEAD + "  router: {kind: uniform, seed: 1}\n": "line 5: moe.router.seed: unknown key",
    HEAD + "  router: {kind: fixed}\n": "line 5: moe.router.expert is missing",
    HEAD
    + "  router: {kind: fixed, expert: mat}\n": "moe.router.expert: 'mat' is not an expert of this recipe, did you mean 'math'?",
    HEAD + "  top_k: 1\n  router: {kind: uniform}\n": "line 5: moe.top_k has no effect on 'uniform' routing: remove it",
    HEAD + "  top_k: 4\n": "line 5: moe.top_k is 4, but there are only 3 experts",
    HEAD + "  router: {kind: task_vector, roles: [attention]}\n": (
        "line 5: moe.router.roles: 'attention' is not separate, so its task vectors are not there, known: ffn"
    ),
    HEAD + "  router: {kind: task_vector, layers: [2]}\n": "moe.router.layers: layer 2, but the models have 2 (from 0)",
    HEAD + "  router: {kind: task_vector, layers: [-1]}\n": "moe.router.layers[0] should be greater than or equal to 0, not -1",
    HEAD + "  include_base: false\n  router: {kind: task_vector}\n": (
        "line 6: moe.router.kind task_vector measures from the base, so it has to be one of the experts"
    ),
    HEAD + "  router: {kind: hidden}\n": "line 5: moe.router.kind: 'hidden' routes tokens and 'moerge' routes sequences",
    "base: base\nexperts: {math: math}\nmoe: {router: {kind: task_vector}}\n": (
        "line 3: moe.router.kind: 'task_vector' routes whole sequences, which needs 'format: moerge'"
    ),
    "base: base\nexperts: {math: math}\nmoe:\n  separate: [ffn, attention]\n": (
        "line 4: moe.separate[1]: token-routed models keep only 'ffn' separate, not 'attention': use 'format: moerge'"
    ),
    "base: base\nexperts: {math: math}\nmoe:\n  mix: layer\n": "line 4: moe.mix is for models that route whole sequences",
    "base: base\nexperts: {math: math}\nmoe: {format: moerg}\n": "unknown MoE format 'moerg': did you mean 'moerge'?",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_recipes(text: str, models: Path, tmp_path: Path) -> None:
    recipe = models / "bad.yaml"
    recipe.write_text(text)
    refuses(recipe, tmp_path / "out", BAD[text])


def test_tied_embeddings_are_separate_together(tmp_path: Path) -> None:
    make_models(tmp_path, tied=True)
    recipe = write_recipe(tmp_path, moe={"format": "moerge", "separate": ["ffn", "head"]})
    refuses(recipe, tmp_path / "out", "moe.separate: embedding and head are tied in these models: keep both separate or neither")


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "math", "code")):
        config = llama_config()
        write_checkpoint(
            tmp_path / name,
            {**llama_tensors(config, seed=seed), "model.extra.weight": llama_tensors(config)["model.norm.weight"]},
            config,
        )
    recipe = write_recipe(tmp_path, experts=["math", "code"], moe={"format": "moerge"})
    refuses(
        recipe, tmp_path / "out", "'model.extra.weight' is no tensor of a dense model that the sequence-routed model can be made"
    )
    for name in ("base", "math", "code"):
        edit_config(tmp_path / name, model_type="bloom")
    refuses(
        recipe,
        tmp_path / "out",
        "experts of type 'bloom' cannot be routed by sequence (it takes: llama, mistral, qwen2, qwen3)",
    )


def test_planning_imports_no_torch(models: Path) -> None:
    script = (
        "import sys, moerge\n"
        f"moerge.plan({{'base': {str(models / 'base')!r}, 'experts': {_absolute(models)!r}, 'moe': {{'format': 'moerge'}}}})\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_plan_says_what_it_is(models: Path) -> None:
    recipe = write_recipe(models, "plan.yaml", moe={"format": "moerge", "separate": ["ffn"]})
    result = command("plan", recipe, "--json")
    assert result.json["model_type"] == "moerge"
    assert result.json["operations"] == {"average": 14 if is_tied(models) else 15, "copy": 24}
    assert "sequence-routed MoE of 4 experts" in " ".join(command("plan", recipe).out.split())
