"""A mixture that runs layer by layer computes what transformers computes, and shows what each expert does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moerge.architecture.config import normalized_config
from moerge.checkpoint.expert import mixture_tensors
from moerge.checkpoint.reader import open_folder
from moerge.errors import InputError
from moerge.runtime.layerwise import Dispatch, LayerwiseModel, MixtureTensors
from tests.helpers.hf_models import CASES, TOKENS, load, random_model, save, torch

MIXTURES = [
    name
    for name in CASES
    if name.partition("-")[0] in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe")
    and "tied" not in name
    and name != "qwen2_moe-no-shared"  # which transformers itself cannot run
]


def opened(folder: Path, **options: Any) -> LayerwiseModel:
    """The checkpoint in a folder."""
    checkpoint = open_folder(folder, name="mixture")
    family, tensors = mixture_tensors(checkpoint)
    assert family is not None
    mixture = MixtureTensors(family, normalized_config(checkpoint.config, family), tensors)
    return LayerwiseModel(checkpoint.config, mixture, name="mixture", **options)


def states(model: LayerwiseModel, ids: list[int]) -> list[Any]:
    """The output of each layer."""
    state_TD, found = model.embed(ids), []
    for number in range(model.layers):
        with model.layer(number) as layer:
            state_TD = layer.run(state_TD)
        found.append(state_TD)
    return found


@pytest.mark.parametrize("case", MIXTURES)
def test_layers_put_out_what_the_whole_model_does(case: str, tmp_path: Path) -> None:
    save(random_model(CASES[case](), 1), tmp_path / "model")
    whole = load(tmp_path / "model")
    found = states(opened(tmp_path / "model"), TOKENS[0].tolist())
    with torch.no_grad():
        expected = whole(input_ids=TOKENS[:1], output_hidden_states=True).hidden_states
        last = whole.base_model.norm(found[-1][None])
    for own, right in zip(found[:-1], expected[1:-1], strict=True):
        torch.testing.assert_close(own[None], right, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(last, expected[-1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen3_moe", "granitemoe"])
def test_gates_and_outputs_are_those_that_the_block_adds_up(case: str, tmp_path: Path) -> None:
    save(random_model(CASES[case](), 1), tmp_path / "model")
    model, seen = opened(tmp_path / "model"), list[Dispatch]()
    with model.layer(1) as layer:
        layer.run(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), seen.append)
        dispatch = seen[0]
        logits_TE = layer.logits(dispatch.inputs_TD)
        outputs_ETD = torch.stack([layer.output(expert, dispatch.inputs_TD) for expert in range(3)])
    top = logits_TE.topk(2, dim=-1)
    shares_TK = logits_TE.softmax(dim=-1).gather(1, top.indices)
    normalized = case in ("mixtral", "granitemoe")  # the others do so with norm_topk_prob
    expected_TK = shares_TK / shares_TK.sum(dim=-1, keepdim=True) if normalized else shares_TK
    assert torch.equal(dispatch.chosen_TK, top.indices)
    torch.testing.assert_close(dispatch.gates_TK.float(), expected_TK, atol=1e-6, rtol=1e-5)
    for place in range(2):
        right_TD = outputs_ETD[dispatch.chosen_TK[:, place], torch.arange(9)]
        torch.testing.assert_close(dispatch.outputs_TKD[:, place], right_TD, atol=1e-6, rtol=1e-5)


def test_texts_may_run_at_the_same_time(tmp_path: Path) -> None:
    save(random_model(CASES["mixtral"](), 1), tmp_path / "model")
    model = opened(tmp_path / "model")
    texts = [model.embed(torch.randint(0, 64, (5 + i,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(12)]
    with model.layer(1) as layer:
        alone = [layer.run(text) for text in texts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(layer.run, texts))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_other_experts_and_rows_take_the_place_of_its_own(tmp_path: Path) -> None:
    save(random_model(CASES["mixtral"](), 1), tmp_path / "model")
    model = opened(tmp_path / "model")
    state_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    with model.layer(1) as layer:
        own = layer.run(state_TD)
        rows_ED, order = layer.router.weight.numpy(), [2, 0, 1]
    experts = [model.mixture.experts[1][number] for number in order]
    with model.layer(1, router_ED=rows_ED[order], experts=experts) as layer:
        torch.testing.assert_close(layer.run(state_TD), own, atol=1e-6, rtol=1e-5)
    with model.layer(1, router_ED=rows_ED[:2], experts=experts[:2]) as layer:
        assert not torch.allclose(layer.run(state_TD), own, atol=1e-3)


def test_router_inputs_are_to_be_had_without_the_experts(tmp_path: Path) -> None:
    save(random_model(CASES["mixtral"](), 1), tmp_path / "model")
    model, state_TD, seen = opened(tmp_path / "model"), torch.randn(4, 32), list[Dispatch]()
    with model.layer(1) as layer:
        layer.run(state_TD, seen.append)
        assert torch.equal(layer.inputs(state_TD), seen[0].inputs_TD)


def test_nothing_of_a_layer_stays_in_memory(tmp_path: Path) -> None:
    save(random_model(CASES["qwen2_moe"](), 1), tmp_path / "model")
    model = opened(tmp_path / "model")
    with model.layer(0) as layer:
        layer.run(model.embed([3, 4, 5]))
    assert {parameter.device.type for parameter in model.body.parameters()} == {"meta"}


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save(random_model(CASES["mixtral"](), 1), tmp_path / "model")
    model = opened(tmp_path / "model")
    tensors = {name: tensor for name, tensor in model.mixture.tensors.items() if "layers.1.self_attn.q" not in name}
    broken = MixtureTensors(model.mixture.family, model.mixture.config, tensors)
    object.__setattr__(model, "mixture", broken)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj\.weight"), model.layer(1):
        pass
