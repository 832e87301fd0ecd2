"""Parameters in memory and tensors in files: every family's belong together, also where transformers fuses or renames them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.reader import open_folder
from moerge.gather.places import places_of
from moerge.gather.running import Sequences, TokenSequence, fisher_sums, layout_of
from moerge.statistics.facts import Settings
from tests.gather import gathered_texts as texts
from tests.helpers import tiny
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import moerge

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")
hf_models = pytest.importorskip("hf_models")

pytestmark = pytest.mark.slow

TEXT = Sequences((TokenSequence([5, 9, 11, 3, 40], 0, [True] * 5), TokenSequence([7, 8, 30], 1, [True] * 3)))


def saved(name: str, folder: Path) -> tuple[Any, Any]:
    """A model of a family as it loads, and its tensors in the file."""
    hf_models.save(hf_models.random_model(hf_models.FAMILIES[name](), seed=0), folder)
    return hf_models.load(folder), open_folder(folder).tensors


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "gpt_neox", "granitemoe", "mixtral", "phi3", "qwen2_moe"])
def test_every_tensor_in_the_file_has_a_place(family: str, tmp_path: Path) -> None:
    model, tensors = saved(family, tmp_path)
    places = places_of(model, tensors)
    assert places.keys() == dict(model.named_parameters()).keys()
    assert sorted(name for place in places.values() for name in place.stored) == sorted(tensors)


def test_fused_experts_are_taken_apart(tmp_path: Path) -> None:
    """transformers holds Mixtral's w1 and w3 of all experts in one parameter; files have a matrix each."""
    model, tensors = saved("mixtral", tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    wanted = frozenset({name.format(2, "w1"), name.format(2, "w3"), name.format(0, "w2")})
    layout = layout_of(model, tensors, {"fisher": wanted}, [1])
    assert layout.shapes.keys() == {f"fisher:{tensor}" for tensor in wanted}
    sums = fisher_sums(model, layout, list(layout.bytes), TEXT, Settings(tokens=8, dtype="float32"), advance=lambda tokens: None)
    stored = {key: part for total in sums for key, part in layout.split(total, sums[total]).items()}
    experts, expected = model.model.layers[1].mlp.experts, dict.fromkeys(stored, 0)
    for ids in TEXT.ids:
        model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        (model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False).loss * (len(ids) - 1)).backward()
        gate_EI, up_EI = experts.gate_up_proj.grad.chunk(2, dim=1)
        gradients = {
            name.format(2, "w1"): gate_EI[2],
            name.format(2, "w3"): up_EI[2],
            name.format(0, "w2"): experts.down_proj.grad[0],
        }
        for tensor, gradient in gradients.items():
            expected[f"fisher:{tensor}"] = expected[f"fisher:{tensor}"] + gradient.numpy() ** 2
    for key, square in expected.items():
        assert tuple(stored[key].shape) == tensors[key.removeprefix("fisher:")].shape
        np.testing.assert_allclose(stored[key].numpy(), square, rtol=1e-3, atol=1e-6 * square.max())


def test_gpt2_is_merged_by_both_methods(tmp_path: Path) -> None:
    for seed, expert in enumerate(("math", "code")):
        hf_models.save(hf_models.random_model(hf_models.FAMILIES["gpt2"](), seed=seed), tmp_path / expert)
    calibration = texts.write_texts(tmp_path, ["math", "code"])
    recipe = texts.recipe(tmp_path, "regmean", base=None, experts=["math", "code"], calibration=calibration)
    assert moerge("stats", recipe, tmp_path / "stats").code == 0
    assert moerge("merge", recipe, tmp_path / "out").code == 0
    name = "transformer.h.1.mlp.c_fc.weight"  # [inputs, outputs]
    values = [tiny.read_values(tmp_path / expert)[name].astype(np.float64) for expert in ("math", "code")]
    grams = [texts.gram(texts.of(tmp_path / "stats", expert), name) for expert in ("math", "code")]
    grams = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
    expected_IO = np.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, values, strict=True)))
    np.testing.assert_allclose(tiny.read_values(tmp_path / "out")[name], expected_IO, atol=1e-4)


def test_an_adapter_is_run_as_what_it_makes_of_the_base(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, dtype="F32", experts=["math"])
    factors = low_rank("model.layers.0.mlp.up_proj", (24, 16), rank=2) | low_rank(
        "model.layers.1.self_attn.q_proj", (16, 16), rank=2
    )
    write_adapter(tmp_path / "lora", factors, r=2, lora_alpha=4)
    calibration = texts.write_texts(tmp_path, ["math"])
    whole = texts.recipe(tmp_path, "average", "whole.yaml", experts={"math": "lora"}, calibration=calibration)
    assert moerge("merge", whole, tmp_path / "merged").code == 0
    for name, expert in (("adapter", "lora"), ("merged", "merged")):
        recipe = texts.recipe(tmp_path, "fisher", f"of-{name}.yaml", experts={"math": expert}, calibration=calibration)
        assert moerge("stats", recipe, tmp_path / f"stats-{name}", "--kind", "all").code == 0
    adapted, dense = texts.of(tmp_path / "stats-adapter"), texts.of(tmp_path / "stats-merged")
    assert adapted.facts.model.digests == dense.facts.model.digests
    assert adapted.stored.keys() == dense.stored.keys()
    for tensor in adapted.facts.fisher:
        one, other = texts.read(adapted, "fisher", tensor), texts.read(dense, "fisher", tensor)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7 * other.max())


def test_an_expert_without_a_row_does_not_weigh_in_it(tmp_path: Path) -> None:
    """`tokenizer: union`: rows are found by their token, and where one expert has none the other's stays as it is."""
    from tests.helpers.vocabularies import row, write_model

    write_model(tmp_path / "math", ["w3", "w4", "w5", "w6"], dtype="F32", expert=0)
    write_model(tmp_path / "code", ["w6", "w5", "w4", "w7"], dtype="F32", expert=1)
    calibration = {"math": "math.txt", "code": "code.txt"}
    recipe = texts.recipe(tmp_path, base=None, experts=["math", "code"], calibration=calibration, tokenizer="union")
    (tmp_path / "math.txt").write_text("w3 w4 w5 w6 w4")
    (tmp_path / "code.txt").write_text("w7 w6 w5 w4 w6")
    assert moerge("stats", recipe, tmp_path / "stats").code == 0
    result = moerge("merge", recipe, tmp_path / "out")
    assert (result.code, "other weights" in result.err) == (0, False), result.err
    name = "lm_head.weight"
    for token, owner in (("w3", "math"), ("w7", "code")):
        np.testing.assert_array_equal(row(tmp_path / "out", name, token), row(tmp_path / owner, name, token))
    masses, rows = [], []
    for expert, index in (("math", 3), ("code", 5)):  # w4's row
        statistics = texts.of(tmp_path / "stats", expert)
        masses.append(
            np.maximum(texts.read(statistics, "fisher", name)[index + (expert == "math")], 1e-6 * statistics.fisher_mean)
        )
        rows.append(row(tmp_path / expert, name, "w4"))
    expected = (masses[0] * rows[0] + masses[1] * rows[1]) / (masses[0] + masses[1])
    np.testing.assert_allclose(row(tmp_path / "out", name, "w4"), expected, rtol=1e-4, atol=1e-6)
