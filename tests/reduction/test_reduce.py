"""`moerge reduce` end to end: what stays is byte for byte, and scores are those of transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.reduction.fitter import ReductionFitter
from moerge.reduction.run import ReduceResult
from moerge.reduction.scores import SCORES, table_of
from moerge.reduction.states import States
from moerge.reduction.sums import load_sums
from tests.helpers.command import moerge as command
from tests.helpers.hf_models import TOKENS, load, logits, read_config, torch
from tests.helpers.tiny import read_tensors, read_values
from tests.reduction.mixtures import EXPERTS, NATIVE, documents, make, recipe

pytestmark = pytest.mark.slow


def expert_bytes(folder: Path, layer: int, expert: int) -> list[bytes]:
    """The stored bytes of an expert's matrices, gate, up and down."""
    tensors = read_tensors(folder)
    own = [name for name in tensors if f"layers.{layer}." in name and f"experts.{expert}." in name]
    if own:
        order = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": 2, "down_proj": 2}
        return [tensors[name].tobytes() for name in sorted(own, key=lambda name: order[name.split(".")[-2]])]
    module = f"model.layers.{layer}.block_sparse_moe"
    gate, up = np.split(tensors[f"{module}.input_linear.weight"][expert], 2)
    return [gate.tobytes(), up.tobytes(), tensors[f"{module}.output_linear.weight"][expert].tobytes()]


def router(tensors: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """A layer's router."""
    return next(
        array
        for name, array in tensors.items()
        if f"layers.{layer}." in name and name.endswith(("mlp.gate.weight", "moe.gate.weight", "router.layer.weight"))
    )


def reduced(folder: Path, out: str = "out", **settings: Any) -> ReduceResult:
    """The mixture `model` in a folder, reduced."""
    return moerge.reduce(recipe(folder, **settings), folder / out)


@pytest.mark.parametrize("family", NATIVE)
def test_experts_that_stay_are_the_same_bytes_with_their_rows(family: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    result = reduced(tmp_path)
    before, after = read_tensors(tmp_path / "model"), read_tensors(tmp_path / "out")
    assert moerge.verify(tmp_path / "out").problems == ()
    for choice in result.choice.layers:
        assert len(choice.kept) == 4
        for slot, expert in enumerate(choice.kept):
            assert expert_bytes(tmp_path / "out", choice.layer, slot) == expert_bytes(tmp_path / "model", choice.layer, expert)
        np.testing.assert_array_equal(router(after, choice.layer), router(before, choice.layer)[list(choice.kept)])
    shared = [
        name
        for name in before
        if "experts." not in name and "block_sparse_moe" not in name and not name.endswith("mlp.gate.weight")
    ]
    assert len(shared) > 10
    assert all(before[name].tobytes() == after[name].tobytes() for name in shared)
    config = read_config(tmp_path / "out")
    assert config.get("num_experts", config.get("num_local_experts")) == 4
    assert load(tmp_path / "out").config.num_experts_per_tok == 2


@pytest.mark.parametrize("family", NATIVE)
def test_tokens_whose_experts_stay_are_computed_as_before(family: str, tmp_path: Path) -> None:
    """With one layer, what a token gets changes only if one of its experts is gone; or by the softmax over all experts."""
    make(tmp_path / "model", family, num_hidden_layers=1)
    result = reduced(tmp_path)
    whole, smaller = load(tmp_path / "model"), load(tmp_path / "out")
    chosen: list[Any] = []
    module = next(
        m
        for n, m in whole.named_modules()
        if n.endswith((".gate", ".router")) and hasattr(m, "weight") and len(m.weight) == EXPERTS
    )
    handle = module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    before = logits(whole)
    handle.remove()
    stay = torch.isin(chosen[0], torch.tensor(result.choice.layers[0].kept)).all(dim=-1).reshape(TOKENS.shape)
    difference = (logits(smaller) - before).abs().amax(dim=-1)
    assert 0 < int(stay.sum()) < stay.numel()
    if family in ("mixtral", "granitemoe"):  # which normalize gates over the experts that are chosen
        assert float(difference[stay].max()) < 1e-5 < float(difference[~stay].min())
    else:
        assert float(difference[stay].mean()) < float(difference[~stay].mean())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "granitemoe"])
def test_scores_are_those_of_hooks_on_transformers_own_model(family: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    reduced(tmp_path, merge="average")
    whole = load(tmp_path / "model")
    tables = np.zeros((2, EXPERTS, 3, 3))
    blocks = [module for module in whole.modules() if hasattr(module, "experts") and hasattr(module.experts, "act_fn")]

    def look(layer: int, module: Any, inputs: Any) -> None:
        state_TD, chosen_TK, gates_TK = inputs
        norms_TK = np.zeros(chosen_TK.shape)
        for token in range(len(state_TD)):
            for place in range(2):
                expert = int(chosen_TK[token, place])
                gate_F, up_F = (module.gate_up_proj[expert] @ state_TD[token]).chunk(2)
                norms_TK[token, place] = float((module.down_proj[expert] @ (module.act_fn(gate_F) * up_F)).norm())
        tables[layer] += table_of(chosen_TK.numpy(), gates_TK.numpy(), norms_TK, EXPERTS)

    for layer, block in enumerate(blocks):
        block.experts.register_forward_pre_hook(lambda module, inputs, layer=layer: look(layer, module, inputs))
    for document in documents(0):
        with torch.no_grad():
            whole(input_ids=torch.tensor([[int(word[1:]) for word in document.split()]]))
    sums = load_sums(tmp_path / "out.statistics" / "math.safetensors", 2, EXPERTS, 32)
    np.testing.assert_allclose(sums["table_LEAB"], tables, rtol=1e-4, atol=1e-5)
    assert sums["tokens_L"].tolist() == [5 * 24] * 2
    np.testing.assert_allclose(sums["mass_LE"].sum(axis=1), 5 * 24, rtol=1e-6)


def test_all_experts_are_the_same_bytes_again(tmp_path: Path) -> None:
    make(tmp_path / "model")
    reduced(tmp_path, experts=EXPERTS, merge="average", router="fit")
    before, after = read_tensors(tmp_path / "model"), read_tensors(tmp_path / "out")
    assert {name: array.tobytes() for name, array in before.items()} == {name: array.tobytes() for name, array in after.items()}


def test_a_planted_dead_expert_goes(tmp_path: Path) -> None:
    make(tmp_path / "model")
    whole = load(tmp_path / "model")
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.mlp.experts.down_proj[2] = 0
    whole.save_pretrained(tmp_path / "model")
    for score in ("reap", "man", "msan", "ean", "easy_ep", "mone"):
        result = reduced(tmp_path, f"out-{score}", experts=5, score=score, statistics="kept", protect="none")
        assert all(2 not in choice.kept for choice in result.choice.layers)


def test_another_ranking_of_stored_statistics_runs_no_text(tmp_path: Path) -> None:
    make(tmp_path / "model")
    first = reduced(tmp_path, "first", merge="average")
    assert first.gathered == ("math", "code")
    again = reduced(tmp_path, "again", score="frequency", statistics="first.statistics")
    assert again.gathered == ()
    path = recipe(tmp_path, text=False, score={"mean": False, "gate": 0, "norm": 0}, statistics="first.statistics")
    without = moerge.reduce(path, tmp_path / "without")
    assert [c.kept for c in without.choice.layers] == [c.kept for c in again.choice.layers]
    assert read_tensors(tmp_path / "again").keys() == read_tensors(tmp_path / "without").keys()


def test_statistics_of_a_domain_are_gathered_alone(tmp_path: Path) -> None:
    make(tmp_path / "model")
    reduced(tmp_path, "first", statistics="kept")
    (tmp_path / "kept" / "code.safetensors").unlink()
    assert reduced(tmp_path, "second", statistics="kept").gathered == ("code",)


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    make(tmp_path / "model")
    path = recipe(tmp_path, merge="fitted", router="fit")
    for threads in (1, 3):
        moerge.reduce(path, tmp_path / f"out{threads}", threads=threads)
    one, three = (tmp_path / f"out{threads}" for threads in (1, 3))
    assert (one / "model.safetensors").read_bytes() == (three / "model.safetensors").read_bytes()
    for domain in ("math", "code"):
        files = [Path(f"{out}.statistics") / f"{domain}.safetensors" for out in (one, three)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_states_in_a_file_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model")
    reduced(tmp_path, "memory", merge="fitted", router="fit")
    monkeypatch.setitem(States.__init__.__kwdefaults__, "limit", 0)
    reduced(tmp_path, "file", merge="fitted", router="fit")
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == (tmp_path / "file" / "model.safetensors").read_bytes()


def test_the_command_prints_resumes_and_records(tmp_path: Path) -> None:
    make(tmp_path / "model")
    path = recipe(tmp_path, merge="average", groups="hierarchical")
    done = command("reduce", path, tmp_path / "out", "--json")
    assert done.code == 0, done.err
    facts = done.json
    assert [len(layer["kept"]) for layer in facts["layers"]] == [4, 4]
    manifest = json.loads((tmp_path / "out" / "moerge.json").read_text())
    assert manifest["reduction"]["layers"] == facts["layers"]
    assert manifest["calibration"].keys() == {"math", "code"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "reduced from 6 to 4 experts" in card
    again = command("reduce", path, tmp_path / "out", "--resume")
    assert again.code == 0
    assert "nothing was done" in again.out
    assert command("reduce", path, tmp_path / "out").code == 2
    shown = command("reduce", path, tmp_path / "out", "--force")
    assert shown.code == 0
    assert "kept" in shown.out
    assert command("inspect", tmp_path / "out", "--json").json["checkpoint"]


def test_an_interrupted_reduction_goes_on_without_a_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model")
    path = recipe(tmp_path, merge="fitted", router="fit")

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(ReductionFitter, "fit", interrupted)
        assert command("reduce", path, tmp_path / "out").code != 0
    assert not (tmp_path / "out").exists()
    refused = command("reduce", path, tmp_path / "out")
    assert refused.code == 2
    assert "--resume" in refused.err
    done = command("reduce", path, tmp_path / "out", "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["gathered"] == []
    assert command("reduce", path, tmp_path / "whole").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_bfloat16_mixtures_are_run_as_they_are_stored(tmp_path: Path) -> None:
    make(tmp_path / "model")
    whole = load(tmp_path / "model").to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "half")
    for file in (tmp_path / "model").glob("*token*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    result = moerge.reduce(recipe(tmp_path, "half", merge="fitted", router="fit"), tmp_path / "out")
    assert {str(array.dtype) for array in read_tensors(tmp_path / "out").values()} == {"uint16"}
    folded = [choice for choice in result.choice.layers if any(len(choice.members(e)) > 1 for e in choice.kept)]
    assert folded
    assert all(np.isfinite(array).all() for array in read_values(tmp_path / "out").values())


@pytest.mark.parametrize("name", SCORES)
def test_every_score_keeps_the_best(name: str, tmp_path: Path) -> None:
    make(tmp_path / "model", num_hidden_layers=1)
    best = reduced(tmp_path, "best", score=name, protect="none")
    worst = reduced(tmp_path, "worst", score=name, protect="none", inverse=True)
    scores_E = best.choice.layers[0].scores_E
    assert set(best.choice.layers[0].kept) == set(np.argsort(-scores_E, kind="stable")[:4].tolist())
    assert set(worst.choice.layers[0].kept) == set(np.argsort(scores_E, kind="stable")[:4].tolist())
