"""Several adapters merged into one (`output: adapter`): as peft's add_weighted_adapter does, and as merging into a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from moerge.tensors.views.low_rank import read_float32
from tests.helpers.command import moerge as command
from tests.helpers.hf_models import FAMILIES, load, random_model, save, torch
from tests.helpers.tiny import read_values

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    base = save(random_model(FAMILIES["llama"](tie_word_embeddings=False), 1), folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        model = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def recipe(here: Path, method: str = "task_arithmetic", *, output: Any = "adapter", **merge: Any) -> dict[str, Any]:
    settings = {"scale": 1.0} if method in ("task_arithmetic", "ties", "dare") else {}
    experts = {name: str(here / name) for name in ADAPTERS}
    return {"base": str(here / "base"), "experts": experts, "merge": {"method": method, **settings, **merge}, "output": output}


def changes(here: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to the base, by moerge's reading, which is tested against peft's."""
    base = locate(str(here / "base"))
    found = apply_adapter(locate(str(adapter)), base)
    return {key: read_float32(tensor) - read_float32(base.tensors[key]) for key, tensor in found.tensors.items()}


def weighted(here: Path, combination: str, rank: int, **options: Any) -> dict[str, np.ndarray]:
    """What peft's merge of both adapters adds to the base."""
    model = peft.PeftModel.from_pretrained(load(here / "base"), here / "a", adapter_name="a")
    model.load_adapter(here / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type=combination, svd_rank=rank, **options)
    model.set_adapter("both")
    merged, before = model.merge_and_unload(adapter_names=["both"]).state_dict(), load(here / "base").state_dict()
    return {key: (value - before[key]).numpy() for key, value in merged.items()}


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_the_sum_is_pefts_svd(here: Path, tmp_path: Path, rank: int) -> None:
    moerge.merge_adapters(recipe(here, output={"kind": "adapter", "rank": rank}), tmp_path / "out")
    ours, theirs = changes(here, tmp_path / "out"), weighted(here, "svd", rank)
    assert sum(bool(value.any()) for value in ours.values()) == 6
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], atol=2e-3 * max(1e-9, np.abs(theirs[key]).max()), err_msg=key)


def test_ties_is_pefts_of_density_1(here: Path, tmp_path: Path) -> None:
    merge = recipe(here, "ties", output={"kind": "adapter", "rank": 32}, density=1.0, aggregate="mean")
    moerge.merge_adapters(merge, tmp_path / "out")
    ours, theirs = changes(here, tmp_path / "out"), weighted(here, "ties_svd", 32, density=1.0)
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("method", "merge"),
    [("ties", {"density": 0.5}), ("dare", {"density": 0.5}), ("linear", {}), ("average", {}), ("della", {"density": 0.6})],
)
def test_at_full_rank_it_is_the_merged_model(here: Path, tmp_path: Path, method: str, merge: dict[str, Any]) -> None:
    whole = recipe(here, method, output={"kind": "adapter", "rank": 64}, **merge)
    moerge.merge_adapters(whole, tmp_path / "out")
    model = {key: value for key, value in whole.items() if key != "output"}
    moerge.merge({**model, "dtype": "float32"}, tmp_path / "model")
    wanted, base = read_values(tmp_path / "model"), read_values(here / "base")
    for key, value in changes(here, tmp_path / "out").items():
        np.testing.assert_allclose(value, wanted[key] - base[key], atol=2e-6, err_msg=key)


def test_a_low_rank_is_the_best_there_is(here: Path, tmp_path: Path) -> None:
    """The default is the largest rank of the adapters; what is lost is what Eckart and Young say."""
    result = moerge.merge_adapters(recipe(here, "ties", density=0.5), tmp_path / "out")
    assert result.rank == 3
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(here / "base") and "ties of a, b" in (tmp_path / "out/README.md").read_text()
    moerge.merge_adapters(recipe(here, "ties", output={"kind": "adapter", "rank": 64}, density=0.5), tmp_path / "full")
    low, full = changes(here, tmp_path / "out"), changes(here, tmp_path / "full")
    key = "model.layers.1.self_attn.q_proj.weight"
    sigma = np.linalg.svd(full[key].astype(np.float64), compute_uv=False)
    lost = np.linalg.norm(full[key] - low[key].astype(np.float64))
    np.testing.assert_allclose(lost, np.sqrt((sigma[3:] ** 2).sum()), rtol=2e-3)


def test_peft_loads_it_and_other_parts_stay(here: Path, tmp_path: Path) -> None:
    moerge.merge_adapters(recipe(here, output={"kind": "adapter", "rank": 5}), tmp_path / "out")
    model = peft.PeftModel.from_pretrained(load(here / "base"), tmp_path / "out")
    keys = set(peft.get_peft_model_state_dict(model))
    assert keys == set(locate(str(tmp_path / "out")).tensors)
    tokens = torch.tensor([[3, 7, 9, 5]])
    model_a, model_b = (peft.PeftModel.from_pretrained(load(here / "base"), here / name).merge_and_unload() for name in "ab")
    base, summed = load(here / "base").state_dict(), load(here / "base")
    summed.load_state_dict({k: a + model_b.state_dict()[k] - base[k] for k, a in model_a.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, summed(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_adapters_store_whole_is_merged_and_stored_whole(here: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(here / "base"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for key, parameter in model.named_parameters():
        if "lm_head.modules_to_save" in key or "lora_B" in key:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "c")
    whole = recipe(here, "linear")
    whole["experts"] = {"a": whole["experts"]["a"], "c": str(tmp_path / "c")}
    moerge.merge_adapters(whole, tmp_path / "out")
    found = changes(here, tmp_path / "out")
    np.testing.assert_allclose(found["lm_head.weight"], 0.05, atol=1e-6)
    assert not found["model.embed_tokens.weight"].any()


def test_the_command(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(here)))
    assert "as a LoRA of the adapters' largest rank" in " ".join(command("plan", file).out.split())
    first = command("merge", file, tmp_path / "out", "--threads", 1, "--quiet")
    assert first.code == 0, first.err
    assert command("verify", tmp_path / "out", "--quiet").code == 0
    assert command("merge", file, tmp_path / "again", "--threads", 3, "--quiet").code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    again = command("merge", file, tmp_path / "out")
    assert (again.code, "already exists" in again.err) == (2, True)
    forced = command("merge", file, tmp_path / "new", "--force")
    assert (forced.code, "--force is for models" in forced.err) == (2, True)


BAD = [
    ({"output": "lora"}, r"output\.kind"),
    ({"output": {"kind": "adapter", "rank": 0}}, r"output\.rank"),
    ({"output": {"kind": "adapter", "ranks": 4}}, r"output\.ranks: unknown key"),
    ({"base": None}, "base"),
    ({"moe": {}}, "output: adapter is for dense models: remove 'moe'"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=range(len(BAD)))
def test_what_makes_no_adapter_is_refused(here: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    whole = {key: value for key, value in {**recipe(here), **changed}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        moerge.merge_adapters(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_written_instead(here: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="merge_adapters"):
        moerge.merge(recipe(here), tmp_path / "out")
    with pytest.raises(InputError, match="has no 'output: adapter'"):
        moerge.merge_adapters({key: value for key, value in recipe(here).items() if key != "output"}, tmp_path / "out")


def test_learning_makes_no_adapter(here: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output: learned merges are models"):
        moerge.learn(recipe(here), tmp_path / "out")
