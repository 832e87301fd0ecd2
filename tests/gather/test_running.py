"""What is added up while a model runs, against slow and obvious computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.gather.gather import Options, gather
from moerge.gather.places import places_of
from moerge.gather.running import Sequences, TokenSequence, _drawn, fisher_sums, gram_sums, layout_of, tokenized
from moerge.statistics import Statistics
from tests.gather import gathered_texts as texts
from tests.helpers import tiny

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def sequences(folder: Path, expert: str = "math", **options: Any) -> Sequences:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenized(tokenizer, texts.documents(expert, **options), 512)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.make_models(folder, dtype="F32")
    return folder


@pytest.fixture(scope="module")
def gathered(models: Path) -> Statistics:
    """Both kinds, of one expert."""
    recipe = texts.recipe(models)
    run(recipe, models / "stats", kind="all")
    return texts.of(models / "stats")


def run(recipe: Path, out: Path, expert: str = "math", **options: Any) -> Any:
    from moerge import load_recipe

    chosen = Options(experts=(expert,), **options)
    (outcome,) = gather(load_recipe(recipe), out, chosen)
    return outcome


def test_fisher_information_is_the_square_of_each_sequences_gradient(models: Path, gathered: Statistics) -> None:
    model = load(models / "math")
    expected = {name: np.zeros(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    for ids in sequences(models / "math").ids:
        model.zero_grad()
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
        log_p = sum(logits_TV[place].log_softmax(-1)[token] for place, token in enumerate(ids[1:]))
        log_p.backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.double().numpy() ** 2
    assert expected.keys() == gathered.facts.fisher.keys() == tiny.llama_shapes(tiny.llama_config()).keys()
    for name, square in expected.items():
        found = texts.read(gathered, "fisher", name)
        np.testing.assert_allclose(found, square, rtol=2e-4, atol=1e-6 * square.max())
        total, squares = gathered.facts.fisher[name]
        assert total == pytest.approx(found.sum(dtype=np.float64), rel=1e-12)
        assert squares == pytest.approx((found.astype(np.float64) ** 2).sum(), rel=1e-12)
    assert gathered.facts.sequences == 9
    assert gathered.facts.tokens == gathered.facts.predicted + 9 == sum(map(len, sequences(models / "math").ids))


def layer_inputs(model: Any, ids: list[int]) -> dict[str, Any]:
    """The inputs of all linear layers, from the formulas of a Llama instead of hooks."""
    backbone, found = model.model, {}
    with torch.no_grad():
        state_1TH = backbone.embed_tokens(torch.tensor([ids]))
        positions = torch.arange(len(ids))[None]
        rotary = backbone.rotary_emb(state_1TH, positions)
        for number, layer in enumerate(backbone.layers):
            name = f"model.layers.{number}"
            normed = layer.input_layernorm(state_1TH)
            attended = layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            found |= {f"{name}.self_attn.{part}_proj.weight": normed for part in "qkv"}
            weight = layer.self_attn.o_proj.weight
            found[f"{name}.self_attn.o_proj.weight"] = torch.linalg.solve(
                weight.double(), attended.double().transpose(1, 2)
            ).transpose(1, 2)
            state_1TH = state_1TH + attended
            normed = layer.post_attention_layernorm(state_1TH)
            found |= {f"{name}.mlp.{part}_proj.weight": normed for part in ("gate", "up")}
            inner = torch.nn.functional.silu(normed @ layer.mlp.gate_proj.weight.T) * (normed @ layer.mlp.up_proj.weight.T)
            found[f"{name}.mlp.down_proj.weight"] = inner
            state_1TH = state_1TH + inner @ layer.mlp.down_proj.weight.T
        found["lm_head.weight"] = backbone.norm(state_1TH)
    return found


def test_gram_matrices_are_those_of_each_layers_inputs(models: Path, gathered: Statistics) -> None:
    model = load(models / "math")
    sums: dict[str, np.ndarray] = {}
    for ids in sequences(models / "math").ids:
        for name, inputs_1TI in layer_inputs(model, ids).items():
            state_TI = inputs_1TI[0].double().numpy()
            sums[name] = sums.get(name, 0) + state_TI.T @ state_TI
    assert sums.keys() == gathered.facts.grams.keys()
    for name, expected_II in sums.items():
        np.testing.assert_allclose(texts.gram(gathered, name), expected_II, rtol=1e-3, atol=1e-4 * np.abs(expected_II).max())


def test_layers_that_read_the_same_share_a_gram_matrix(gathered: Statistics) -> None:
    shared: dict[str, list[str]] = {}
    for name, gram in gathered.facts.grams.items():
        shared.setdefault(gram.stored, []).append(name.removeprefix("model.layers.").removesuffix("_proj.weight"))
    assert list(shared.values()) == [
        ["0.self_attn.q", "0.self_attn.k", "0.self_attn.v"],
        ["0.self_attn.o"],
        ["0.mlp.gate", "0.mlp.up"],
        ["0.mlp.down"],
        ["1.self_attn.q", "1.self_attn.k", "1.self_attn.v"],
        ["1.self_attn.o"],
        ["1.mlp.gate", "1.mlp.up"],
        ["1.mlp.down"],
        ["lm_head.weight"],
    ]
    assert {gram.axis for gram in gathered.facts.grams.values()} == {1}
    stored = {name for name in gathered.stored if name.startswith("gram:")}
    assert stored == set(shared)


def test_norms_and_embeddings_have_no_gram_matrix(gathered: Statistics) -> None:
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in gathered.facts.without["gram"]} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert gathered.facts.without["fisher"] == ()


@pytest.mark.parametrize(("passes", "made"), [(2, 4), (5, 10)])
def test_passes_do_not_matter(passes: int, made: int, models: Path, gathered: Statistics, tmp_path: Path) -> None:
    outcome = run(texts.recipe(models), tmp_path, kind="all", passes=passes)
    assert outcome.passes == made  # over the text, for each kind
    found = texts.of(tmp_path)
    assert found.facts == gathered.facts
    for name in gathered.stored:
        kind, _, tensor = name.partition(":")
        np.testing.assert_array_equal(texts.read(found, kind, tensor), texts.read(gathered, kind, tensor))


def test_sequences_that_run_together_give_the_same_gram_matrices(models: Path, gathered: Statistics, tmp_path: Path) -> None:
    run(texts.recipe(models), tmp_path, kind="regmean", batch_size=4)
    for name in gathered.facts.grams:
        together, alone = texts.read(texts.of(tmp_path), "gram", name), texts.read(gathered, "gram", name)
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())


def test_sampled_labels_are_drawn_from_the_model(models: Path, tmp_path: Path) -> None:
    model = load(models / "math")
    given = sequences(models / "math", count=2)
    logits_TV = model(input_ids=torch.tensor([given.ids[0]])).logits[0, :-1]
    drawn = [_drawn(logits_TV, 0, seed).tolist() for seed in range(2000)]
    frequencies = np.bincount([tokens[0] for tokens in drawn], minlength=tiny.VOCABULARY) / len(drawn)
    probabilities = logits_TV[0].softmax(-1).detach().numpy()
    assert np.abs(frequencies - probabilities).max() < 5 * np.sqrt(probabilities.max() / len(drawn))
    assert drawn[0] == _drawn(logits_TV, 0, 0).tolist() != _drawn(logits_TV, 1, 0).tolist()


def test_fisher_information_at_sampled_labels(models: Path, tmp_path: Path) -> None:
    """The same tokens whatever other texts are run, and the squared gradient at them."""
    recipe = texts.recipe(models)
    run(recipe, tmp_path / "whole", labels="sampled", seed=7, texts=2)
    for part in (1, 2):
        run(recipe, tmp_path / str(part), labels="sampled", seed=7, texts=2, part=(part, 2))
    model, name = load(models / "math"), "model.layers.1.mlp.up_proj.weight"
    given = sequences(models / "math", count=2)
    expected = []
    for ids, seed, _, _ in given.documents:
        model.zero_grad()
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        labels_T = _drawn(logits_TV, 7, seed)
        torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum").backward()
        expected.append(dict(model.named_parameters())[name].grad.numpy() ** 2)
    for place, square in zip(("1", "2"), expected, strict=True):
        np.testing.assert_allclose(texts.read(texts.of(tmp_path / place), "fisher", name), square, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(texts.read(texts.of(tmp_path / "whole"), "fisher", name), sum(expected), rtol=1e-3, atol=1e-9)


def test_tied_embeddings_have_the_information_of_both_uses_and_no_gram_matrix(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, dtype="F32", tied=True, experts=["math"])
    recipe = texts.recipe(tmp_path, experts=["math"], calibration=texts.write_texts(tmp_path, ["math"]))
    run(recipe, tmp_path / "stats", kind="all")
    found = texts.of(tmp_path / "stats")
    assert "lm_head.weight" not in found.facts.fisher and "lm_head.weight" not in found.facts.grams
    model, expected = load(tmp_path / "math"), 0
    for ids in sequences(tmp_path / "math").ids:
        model.zero_grad()
        (-model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1)).backward()
        expected += model.model.embed_tokens.weight.grad.double().numpy() ** 2
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(texts.read(found, "fisher", name), expected, rtol=1e-3, atol=1e-6 * expected.max())
    assert name in found.facts.without["gram"]


def test_gpt2_stores_inputs_first(tmp_path: Path) -> None:
    """And its files may lack the prefix that its modules have in memory."""
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    stored = {
        name.removeprefix("transformer."): tiny_tensor(name.removeprefix("transformer."), parameter)
        for name, parameter in model.named_parameters()
    }
    assert "h.0.mlp.c_fc.weight" in stored
    wanted = frozenset(stored)
    layout = layout_of(model, stored, {"fisher": wanted, "gram": wanted}, [1, 2, 3])
    assert layout.fisher == stored.keys()
    assert {name: gram.axis for name, gram in layout.grams.items()} == {
        f"h.0.{part}.weight": 0 for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    given = Sequences((TokenSequence([1, 2, 3, 4], 0, [True] * 4), TokenSequence([5, 6], 1, [True] * 2)))
    sums = gram_sums(
        model,
        layout,
        [name for name in layout.shapes if name.startswith("gram:")],
        given,
        batch_size=1,
        advance=lambda tokens: None,
    )
    first = model.transformer.h[0]
    with torch.no_grad():
        states = [
            first.ln_1(model.transformer.wte(torch.tensor(ids)) + model.transformer.wpe(torch.arange(len(ids))))
            for ids in given.ids
        ]
    expected = sum(state.T @ state for state in states)
    np.testing.assert_allclose(sums["gram:h.0.attn.c_attn.weight"].numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert layout.shapes["gram:h.0.mlp.c_proj.weight"] == (32 * 33 // 2,)


def tiny_tensor(name: str, parameter: Any) -> Any:
    from moerge.tensors.dtypes import F32
    from moerge.tensors.tensor import ArrayTensor

    array = parameter.detach().numpy()
    return ArrayTensor(name, F32, array.shape, array.reshape(-1))


def test_a_name_with_another_shape_is_another_tensor(models: Path) -> None:
    model = load(models / "math")
    stored = {name: tiny_tensor(name, parameter) for name, parameter in model.named_parameters()}
    stored["model.norm.weight"] = tiny_tensor("model.norm.weight", model.lm_head.weight)
    found = {place.whole for place in places_of(model, stored).values()}
    assert found == stored.keys() - {"model.norm.weight"}


def test_progress_counts_every_token_once_a_pass(models: Path) -> None:
    model, given, told = load(models / "math"), sequences(models / "math"), []
    stored = {name: tiny_tensor(name, parameter) for name, parameter in model.named_parameters()}
    layout = layout_of(model, stored, {"gram": frozenset(stored)}, given.ids[0])
    gram_sums(model, layout, list(layout.bytes)[:2], given, batch_size=2, advance=told.append)
    assert sum(told) == given.tokens
    assert len(told) == 5
    del told[:]
    layout = layout_of(model, stored, {"fisher": frozenset(stored)}, given.ids[0])
    settings = texts_settings()
    fisher_sums(model, layout, list(layout.bytes)[:1], given, settings, advance=told.append)
    assert told == [len(ids) for ids in given.ids]


def texts_settings() -> Any:
    from moerge.statistics.facts import Settings

    return Settings(tokens=512, dtype="float32")


def test_documents_of_one_token_are_left_out(models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "math")
    found = tokenized(tokenizer, ["w5", "w5 w6 w7", "w9 w8"], 2)
    assert found.ids == [[5, 6], [9, 8]]
    assert (found.tokens, found.predicted) == (4, 2)
