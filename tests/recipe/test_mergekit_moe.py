"""mergekit-moe's files: the base's backbone, experts copied, gates from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import moerge
from moerge.recipe import load_recipe
from tests.helpers import tiny
from tests.helpers.command import moerge as command
from tests.recipe.mergekit_files import MOE

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

LAYERS, HIDDEN = 2, 16
MODELS = ("math", "code", "math")
PROMPTS = ((["w5 w6 w7", "w8"], ["w30 w31"]), (["w10 w11 w12"], []), (["w40 w3"], []))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.make_models(tmp_path, dtype="F32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(mode: str, text: str = MOE) -> Path:
    path = Path(f"{mode}.yml")
    path.write_text(text.replace("{mode}", mode))
    return path


def gates(mode: str) -> list[np.ndarray]:
    out = moerge.merge(write(mode), f"{mode}-out", threads=2).folder
    assert moerge.verify(out, threads=1).problems == ()
    values = tiny.read_values(out)
    return [values[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(LAYERS)]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_experts_are_copied_and_the_backbone_is_the_base(here: Path) -> None:
    out = moerge.merge(write("uniform_random"), "out", threads=1).folder
    made, base = tiny.read_values(out), tiny.read_values(Path("base"))
    experts = [tiny.read_values(Path(model)) for model in MODELS]
    expected = {name: value for name, value in base.items() if ".mlp." not in name}
    for layer in range(LAYERS):
        for index, expert in enumerate(experts):
            for theirs, ours in (("gate", 1), ("down", 2), ("up", 3)):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{index}.w{ours}.weight"
                expected[name] = expert[f"model.layers.{layer}.mlp.{theirs}_proj.weight"]
    drawn = {name: made.pop(name) for name in list(made) if name.endswith(".gate.weight")}
    assert made.keys() == expected.keys()
    assert [name for name in expected if (made[name] != expected[name]).any()] == []
    for gate in drawn.values():
        assert gate.shape == (3, HIDDEN) and np.abs(gate).max() <= 1 / np.sqrt(HIDDEN)
    manifest = moerge.inspect(out).manifest
    assert manifest["experts"] == ["math", "code", "math_2"] and manifest["recipe"]["base_model"] == "base"
    config = moerge.inspect(out).checkpoint.config
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)


def test_cheap_embed_sums_the_embeddings_of_the_prompts(here: Path) -> None:
    embedding = tiny.read_values(Path("base"))["model.embed_tokens.weight"].astype(np.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")

    def summed(texts: list[str]) -> np.ndarray:
        ids = [token for text in texts for token in [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
        return unit(embedding[ids].sum(axis=0))

    rows = [summed(positive) - (summed(negative) if negative else 0) for positive, negative in PROMPTS]
    for gate in gates("cheap_embed"):
        np.testing.assert_allclose(gate, unit(np.stack(rows)), atol=1e-6)


def router_inputs(index: int, text: str) -> list[np.ndarray]:
    """What the router of each layer sees of a text on an expert's path: the input of the mlp of the base with that expert's."""
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    own = tiny.read_values(Path(MODELS[index]))
    ffn = {name: torch.from_numpy(value) for name, value in own.items() if ".mlp." in name}
    assert not model.load_state_dict(ffn, strict=False).unexpected_keys
    seen: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].detach().double().numpy()))
    ids = transformers.AutoTokenizer.from_pretrained("base")(text, return_tensors="pt").input_ids
    with torch.no_grad():
        model(ids)
    return seen


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_gates_are_router_inputs_of_the_prompts(mode: str, here: Path) -> None:
    found = gates(mode)
    pool = (lambda state: state.mean(axis=0)) if mode == "hidden_avg" else (lambda state: state[-1])
    for layer in range(LAYERS):
        rows = []
        for index, (positive, negative) in enumerate(PROMPTS):
            means = [[pool(router_inputs(index, text)[layer]) for text in texts] for texts in (positive, negative) if texts]
            rows.append(np.mean(means[0], axis=0) - (np.mean(means[1], axis=0) if negative else 0))
        np.testing.assert_allclose(found[layer], unit(np.stack(rows)), atol=1e-5)


def test_residual_scale_multiplies_what_an_expert_adds(here: Path) -> None:
    plain = yaml.safe_load(MOE.replace("{mode}", "uniform_random"))
    scaled = yaml.safe_load(MOE.replace("{mode}", "uniform_random"))
    scaled["experts"][1]["residual_scale"] = 0.3
    one, other = (tiny.read_values(moerge.merge(file, out).folder) for file, out in ((plain, "plain"), (scaled, "scaled")))
    for name, values in one.items():
        factor = np.float32(0.3) if ".experts.1.w2." in name else np.float32(1)
        np.testing.assert_array_equal(other[name], values * factor, err_msg=name)


def test_noise_comes_before_residual_scale_and_differs_between_experts(here: Path) -> None:
    plain, noisy = (yaml.safe_load(MOE.replace("{mode}", "uniform_random")) for _ in range(2))
    for expert, noise in zip(noisy["experts"], (0.5, 0.0, 0.5), strict=True):
        expert["noise_scale"] = noise
    noisy["experts"][0]["residual_scale"] = 0.25
    one, other = (tiny.read_values(moerge.merge(file, out).folder) for file, out in ((plain, "plain"), (noisy, "noisy")))
    noises: dict[str, list[np.ndarray]] = {"0": [], "2": []}
    for name, values in one.items():
        number = name.split(".experts.")[1][0] if ".experts." in name else ""
        if number not in noises:
            np.testing.assert_array_equal(other[name], values, err_msg=name)
            continue
        scale = 0.25 if number == "0" and ".w2." in name else 1
        noises[number].append((other[name] / scale - values).reshape(-1))
    first, third = (np.concatenate(noises[number]) for number in noises)
    for noise_N in (first, third):
        assert abs(noise_N.std() / 0.5 - 1) < 0.05 and abs(noise_N.mean()) < 0.03
    assert abs(np.corrcoef(first, third)[0, 1]) < 0.05


def test_threads_do_not_matter(here: Path) -> None:
    made = [moerge.merge(write("hidden"), f"out-{threads}", threads=threads).folder for threads in (1, 3)]
    first, second = (tiny.read_tensors(folder) for folder in made)
    assert all((first[name] == second[name]).all() for name in first)


def test_prompts_in_a_recipe_of_ours(here: Path) -> None:
    prompts = {
        name: {"positive": positive, "negative": negative} for name, (positive, negative) in zip("abc", PROMPTS, strict=True)
    }
    recipe = {
        "base": "base",
        "experts": dict(zip("abc", MODELS, strict=True)),
        "merge": {"method": "passthrough", "model": "base"},
        "moe": {"include_base": False, "router": {"kind": "hidden", "prompts": prompts, "negative": "none", "pool": "last"}},
    }
    out = moerge.merge(recipe, "ours", threads=1).folder
    for layer, gate in enumerate(gates("hidden")):
        np.testing.assert_array_equal(tiny.read_values(out)[f"model.layers.{layer}.block_sparse_moe.gate.weight"], gate)
    assert moerge.inspect(out).manifest["calibration"]["a"]["documents"] != []


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"prompts": {"a": {"positive": ["w5"]}}}, "recipe: moe.router.prompts: there are none for b: every expert needs some"),
        ({"prompts": {"z": {"positive": ["w5"]}}}, "recipe: moe.router.prompts: 'z' is not an expert, known: a, b"),
        ({"prompts": {"a": {"positive": []}}}, "recipe: moe.router.prompts.a.positive should not be empty"),
        (
            {"prompts": {"a": {"positive": ["w5"]}, "b": {"positive": ["w6"]}}, "statistics": "kept"},
            "recipe: moe.router: prompts are few and have no 'statistics': remove one of the two",
        ),
    ],
)
def test_bad_prompts(router: dict[str, Any], message: str, here: Path) -> None:
    moe = {"include_base": False, "router": {"kind": "hidden", **router}}
    with pytest.raises(moerge.InputError) as raised:
        moerge.plan({"base": "base", "experts": {"a": "math", "b": "code"}, "moe": moe})
    assert str(raised.value) == message


def test_what_a_person_sees(here: Path) -> None:
    result = command("plan", write("hidden"))
    assert "a mergekit-moe file: experts math, code, math_2 on the attention and norms of base" in " ".join(result.out.split())
    assert result.err.startswith("warning: differs from mergekit: hidden states are what the result's routers see")
    assert command("plan", write("random")).err.splitlines()[0].startswith("warning: differs from mergekit: random gates have")
    assert "differs" not in command("plan", write("cheap_embed")).err + command("plan", write("uniform_random")).err


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_as_a_recipe_of_ours_it_says_the_same(mode: str, here: Path) -> None:
    file = write(mode)
    Path("ours.yaml").write_text(command("plan", file, "--as-recipe").out)
    first, second = moerge.plan(file), moerge.plan("ours.yaml")
    described = [[(o.name, o.action, o.hyperparameters, o.dtype) for o in plan.outputs] for plan in (first, second)]
    assert described[0] == described[1] and first.config == second.config
    assert second.recipe.warnings == () and len(second.outputs) == 15 + LAYERS * (3 * 3 + 1)


def test_defaults() -> None:
    expert = {"source_model": "a", "positive_prompts": ["x"]}
    data = {"base_model": "b", "experts": [expert, {**expert, "positive_prompts": ["y"]}]}
    moe = load_recipe(data).moe
    assert moe is not None
    assert (moe.top_k, moe.router.kind, moe.format, moe.include_base) == (2, "hidden", "auto", False)
    assert (moe.router.pool, moe.router.negative, moe.router.temperature) == ("last", "none", 1.0)
    assert load_recipe({**data, "architecture": "qwen3"}).moe.format == "qwen3_moe"
    assert load_recipe({**data, "gate_mode": "random"}, seed=4).moe.router.seed == 4


def test_prompts_that_are_all_the_same(here: Path) -> None:
    data = yaml.safe_load(MOE.format(mode="cheap_embed"))
    for expert in data["experts"]:
        expert["positive_prompts"], expert["negative_prompts"] = ["w5"], []
    with pytest.raises(moerge.InputError, match="experts all have the same prompts, by which no router can tell them apart"):
        load_recipe(data)
    data["experts"] = data["experts"][:1]
    with pytest.raises(moerge.InputError, match="experts: a MoE needs at least two experts"):
        load_recipe(data)
