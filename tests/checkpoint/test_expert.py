"""One expert of a native mixture as a model: against transformers' own mixture with that expert alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moerge
from moerge.architecture.registry import MOE_FORMATS
from moerge.checkpoint.expert import ExpertCheckpoint, expert_labels
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from tests.helpers.hf_models import CASES, FAMILIES, load, logits, random_model, save
from tests.helpers.tiny import make_models, read_tensors

FORMATS = [MOE_FORMATS.get(name) for name in MOE_FORMATS.names()]
MIXTURES = [
    case for case in CASES if case.split("-")[0] in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe")
]
DENSE = {"mixtral": "llama", "qwen3_moe": "qwen3", "flex_olmo": "olmo2", "granitemoe": "granite"}


def only(model: Any, expert: int) -> Any:
    """The mixture with all its experts replaced by one, all of them chosen: their weights add up to 1."""
    config = model.config.to_dict()
    count = config.get("num_experts") or config.get("num_local_experts")
    alone = type(model)(type(model.config)(**{**config, "num_experts_per_tok": count}))
    alone.load_state_dict(model.state_dict())
    for name, parameter in alone.named_parameters():
        if ".experts." in name:
            parameter.data[:] = parameter.data[expert].clone()
    return alone.eval()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", MIXTURES)
def test_an_expert_computes_what_the_mixture_does_with_it_alone(case: str, tmp_path: Path) -> None:
    model = random_model(CASES[case](), seed=1)
    save(model, tmp_path / "moe")
    moerge.merge({"experts": {"one": f"{tmp_path}/moe#2"}, "merge": {"method": "average"}}, tmp_path / "out")
    dense = load(tmp_path / "out")
    torch.testing.assert_close(logits(dense), logits(only(model, 2)), rtol=1e-4, atol=1e-5)
    exact = "dense-layers" not in case
    assert dense.config.model_type == (DENSE.get(case.split("-")[0]) if exact else None) or dense.config.num_experts == 1


@pytest.mark.parametrize(("kind", "named"), [("mistral", "mistral"), ("llama", "llama")])
def test_the_dense_type_is_that_of_the_other_models(kind: str, named: str, tmp_path: Path) -> None:
    mixture = CASES["mixtral"]()
    save(random_model(mixture, seed=1), tmp_path / "moe")
    alike = {"rms_norm_eps": mixture.rms_norm_eps, "rope_parameters": mixture.rope_parameters}
    dense = FAMILIES[kind](**alike, **({"sliding_window": None} if kind == "mistral" else {}))
    save(random_model(dense, seed=2), tmp_path / "dense")
    recipe = {"experts": {"one": f"{tmp_path}/moe#0", "two": str(tmp_path / "dense")}, "merge": {"method": "average"}}
    plan = moerge.plan(recipe)
    assert plan.config["model_type"] == named


def test_experts_of_a_mixture_that_moerge_built_have_names_and_are_the_dense_ones(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    experts = {name: str(models[name]) for name in ("math", "code", "knowledge")}
    moerge.merge({"experts": experts, "moe": {"router": {"kind": "random"}}}, tmp_path / "moe")
    assert expert_labels(locate(str(tmp_path / "moe"))) == ("math", "code", "knowledge")
    code = locate(str(tmp_path / "moe#code"), name="c")
    assert isinstance(code, ExpertCheckpoint) and code.number == 1 and code.expert == "code" and code.model_type == "llama"
    assert code.tensors.keys() == locate(experts["code"]).tensors.keys()
    moerge.merge({"experts": {"c": f"{tmp_path}/moe#1"}, "merge": {"method": "average"}}, tmp_path / "out")
    before, after = read_tensors(models["code"]), read_tensors(tmp_path / "out")
    for name in (name for name in before if ".mlp." in name):
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_references_that_name_nothing_are_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"), base=False)
    moerge.merge({"experts": {n: str(f) for n, f in models.items()}, "moe": {"router": {"kind": "random"}}}, tmp_path / "moe")
    for reference, says in (("moe#coda", "code"), ("moe#2", "#2"), ("math#0", "no native mixture"), ("mo#code", "moe")):
        with pytest.raises(InputError, match=says):
            locate(str(tmp_path / reference), name="x")


def test_a_folder_whose_name_has_the_sign_is_a_folder(tmp_path: Path) -> None:
    model = make_models(tmp_path, experts=("math",), base=False)["math"]
    model.rename(tmp_path / "run#3")
    assert not isinstance(locate(str(tmp_path / "run#3")), ExpertCheckpoint)
