"""Native mixtures of families without a table of ours, proved on logits through plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from tests.helpers.command import moerge as command
from tests.helpers.command import refuses
from tests.helpers.hf_models import GROUPED, load, logits, random_model, save, torch, transformers
from tests.helpers.tiny import read_values, write_recipe
from tests.helpers.tokenizers_of_all_kinds import byte_level

pytestmark = pytest.mark.slow

_LINEAR = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8}
_MAMBA = {"n_heads": 4, "d_head": 16, "d_state": 8, "n_groups": 1, "expand": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": (
        "qwen3_5_moe_text",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            **{f"linear_{key}": value for key, value in _LINEAR.items()},
        },
    ),
    "lfm2": ("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    "ernie4_5": ("ernie4_5_moe", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_moe", {"head_dim": 8}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention", "mamba"],
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            **{f"mamba_{key}": value for key, value in _MAMBA.items()},
        },
    ),
}
FFN = {"lfm2": "feed_forward", "granitemoehybrid": "shared_mlp"}
SHARED = ("qwen3_5_text", "ernie4_5", "hunyuan_v1_dense", "granitemoehybrid")


def make(family: str, **more: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **{**GROUPED, "num_hidden_layers": 3, **CASES[family][1], **more})


def write_experts(folder: Path, config: Any) -> dict[str, Any]:
    base = random_model(config, 0)
    models = {"base": base, **{name: random_model(config, seed, near=base) for seed, name in ((1, "math"), (2, "code"))}}
    for name, model in models.items():
        save(model, folder / name)
    return models


def routers(moe: Any) -> list[Any]:
    found = [module for module in moe.modules() if type(module).__name__.endswith(("Router", "Gate"))]
    assert found
    return found


@contextmanager
def forced(moe: Any, expert: int) -> Iterator[None]:
    """Every router chooses one expert, whatever the token."""

    def choose(module: Any, inputs: Any, output: Any) -> Any:
        alone = torch.zeros_like(output[1])
        alone[:, 0] = 1
        return output[0], alone, torch.full_like(output[2], expert)

    handles = [router.register_forward_hook(choose) for router in routers(moe)]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CASES)
def test_identical_experts_give_the_dense_logits(family: str, tied: bool, tmp_path: Path) -> None:
    dense = random_model(make(family, tie_word_embeddings=tied), 0)
    save(dense, tmp_path / "dense")
    experts = {f"copy{i}": str(tmp_path / "dense") for i in range(3)}
    moerge.merge({"experts": experts, "moe": {"top_k": 2}}, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == CASES[family][0]
    torch.testing.assert_close(logits(moe), logits(dense), atol=2e-5, rtol=0)
    assert logits(dense).std() > 0.05
    assert moerge.verify(tmp_path / "moe").problems == ()


@pytest.mark.parametrize("family", CASES)
def test_a_forced_expert_gives_the_backbone_with_its_ffn(family: str, tmp_path: Path) -> None:
    models = write_experts(tmp_path, make(family))
    recipe = {"base": str(tmp_path / "base"), "experts": {name: str(tmp_path / name) for name in ("math", "code")}}
    recipe["merge"] = {"method": "ties", "density": 0.7}
    moerge.merge({**recipe, "moe": {"top_k": 1}}, tmp_path / "moe")
    moerge.merge(recipe, tmp_path / "dense")
    moe, by_hand = load(tmp_path / "moe"), load(tmp_path / "dense")
    seen = []
    for index, model in enumerate(models.values()):
        ffn = {name: value for name, value in model.state_dict().items() if f".{FFN.get(family, 'mlp')}." in name}
        by_hand.load_state_dict({**by_hand.state_dict(), **ffn})
        with forced(moe, index):
            seen.append(logits(moe))
        torch.testing.assert_close(seen[-1], logits(by_hand), atol=2e-5, rtol=0)
    assert (seen[0] - seen[1]).abs().max() > 1e-3 < (seen[1] - seen[2]).abs().max()


@pytest.mark.parametrize("family", SHARED)
def test_a_shared_expert_makes_up_its_weight(family: str, tmp_path: Path) -> None:
    models = write_experts(tmp_path, make(family))
    moe = {"top_k": 1, "shared": "base", "shared_weight": 0.25}
    moerge.merge(write_recipe(tmp_path, experts=("math", "code"), moe=moe), tmp_path / "moe")
    moerge.merge(write_recipe(tmp_path, experts=("math", "code")), tmp_path / "dense")
    found, by_hand = load(tmp_path / "moe"), load(tmp_path / "dense")
    named = FFN.get(family, "mlp")
    for number, layer in enumerate(by_hand.model.layers):
        own, shared = (getattr(models[name].model.layers[number], named) for name in ("code", "base"))
        getattr(layer, named).forward = lambda x, own=own, shared=shared: 0.75 * own(x) + 0.25 * shared(x)
    with forced(found, 1):
        torch.testing.assert_close(logits(found), logits(by_hand), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "layers", "chosen"), [("lfm2", "1-", (1, 2)), ("ernie4_5", "1", (1,)), ("ernie4_5", "0-1", (0, 1))]
)
def test_mixtures_in_some_layers(family: str, layers: str, chosen: tuple[int, ...], tmp_path: Path) -> None:
    models = write_experts(tmp_path, make(family))
    moerge.merge(write_recipe(tmp_path, experts=("math", "code"), moe={"top_k": 1, "layers": layers}), tmp_path / "moe")
    moe, by_hand = load(tmp_path / "moe"), load(tmp_path / "base")
    math = models["math"].state_dict()
    places = [f"layers.{layer}.{FFN.get(family, 'mlp')}." for layer in chosen]
    own = {name: value for name, value in math.items() if any(place in name for place in places)}
    backbone = {name: torch.from_numpy(value) for name, value in read_values(tmp_path / "moe").items()}
    by_hand.load_state_dict({name: backbone.get(name, value) for name, value in by_hand.state_dict().items()} | own)
    assert len(routers(moe)) == len(chosen)
    with forced(moe, 1):
        torch.testing.assert_close(logits(moe), logits(by_hand), atol=2e-5, rtol=0)


@pytest.fixture(params=CASES)
def calibrated(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base and two experts, and text of words that only one of them has."""
    by_bytes = request.param == "qwen3_5_text"  # transformers takes its own tokenizer class for it, whatever the folder says
    write_experts(tmp_path, make(request.param, **({"vocab_size": 256} if by_bytes else {})))
    for model in ("base", "math", "code") if by_bytes else ():
        byte_level(tmp_path / model)
    for number, name in enumerate(("base", "math", "code")):
        words = [f"w{3 + 20 * number + word}" for word in range(5)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(" ".join(words[i:] + words[:i]) for i in range(5)))
        (tmp_path / f"{name}-held-out.txt").write_text("\n\n".join(" ".join(words[i::-1] + words[:i:-1]) for i in range(5)))
    return tmp_path


def test_every_router_without_training(calibrated: Path) -> None:
    names = ("base", "math", "code")
    texts = {"calibration": {name: f"{name}.txt" for name in names}}
    for kind in ("perplexity", "hidden", "projection", "ridge"):
        sections = {} if kind == "projection" else texts
        recipe = write_recipe(calibrated, experts=("math", "code"), moe={"router": {"kind": kind}}, **sections)
        moerge.merge(recipe, calibrated / kind)
        stored = read_values(calibrated / kind)
        gates = [value for name, value in stored.items() if name.endswith((".gate.weight", "wg.weight", "layer.weight"))]
        assert len(gates) == 3 and all(np.abs(gate[1:]).max() > 0.01 for gate in gates)
    options = [part for name in names for part in ("--text", f"{name}={calibrated / name}-held-out.txt")]
    found = command("route", calibrated / "ridge", *options, "--json").json
    accuracy = {name: found["texts"][name]["accuracy"] for name in names}
    assert all(value > 0.6 for value in accuracy.values()), accuracy


@pytest.mark.parametrize(
    ("family", "flags", "moe", "message"),
    [
        ("lfm2", {}, {"layers": "0-1"}, "moe.layers: lfm2_moe cannot have experts in the layers 0-1 only"),
        ("lfm2", {}, {"shared": "a"}, "moe.shared: lfm2_moe has no place for a shared expert"),
        (
            "granitemoehybrid",
            {"num_local_experts": 2, "intermediate_size": 48},
            {},
            "'granitemoehybrid' that are mixtures themselves: name one of a's experts as MIXTURE#EXPERT",
        ),
    ],
)
def test_what_cannot_be_is_refused(family: str, flags: dict[str, Any], moe: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(random_model(make(family, **flags), 0), tmp_path / "dense")
    refuses(write_recipe(tmp_path, base=None, experts={"a": "dense", "b": "dense"}, moe=moe), tmp_path / "out", message)
