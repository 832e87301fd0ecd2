"""Assembling experts that stay whole models: what is copied, what is averaged, and what the plan says about it."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint import header
from moerge.checkpoint.staging import staging_folder
from moerge.merging.pipeline import merge, plan
from moerge.tensors.streams import WINDOW
from moerge.tokenizer import token_ids
from tests.helpers.adapters import low_rank, merged, write_adapter
from tests.helpers.command import moerge
from tests.helpers.hf_models import FAMILIES, SIZES, transformers
from tests.helpers.tiny import read_tensors, read_values, write_checkpoint, write_json
from tests.helpers.whole_models import MIXED, atomic_write, built, make_mixed, make_model, write_bpe

pytestmark = pytest.mark.slow

RANDOM = {"projectors": "random"}


def body(folder: Path, name: str, *outside: str) -> dict[str, np.ndarray]:
    """A model's tensors but for its embedding and head, under the names that they have as expert 0."""
    return {f"model.experts.0.{key}": value for key, value in read_tensors(folder / name).items() if key not in outside}


def test_experts_are_copied_byte_for_byte(mixed: Path, tmp_path: Path) -> None:
    made = read_tensors(built(mixed, tmp_path / "out", moe=RANDOM))
    outsides = {
        "llama": ("model.embed_tokens.weight", "lm_head.weight"),
        "olmo2": ("model.embed_tokens.weight", "lm_head.weight"),
        "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
        "qwen2": ("model.embed_tokens.weight",),
    }
    found = set()
    for number, (name, outside) in enumerate(outsides.items()):
        for key, value in body(mixed, name, *outside).items():
            key = key.replace("experts.0", f"experts.{number}")
            assert made[key].dtype == value.dtype and np.array_equal(made[key], value), key
            found.add(key)
    others = {key for key in made if key not in found}
    projectors = {key for key in others if key.startswith("model.projectors_")}
    assert others - projectors == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(projectors) == 4 * 2 * 2 * 2  # experts, in and out, up and down, weight and bias


def rows_by_text(folder: Path, tensor: str, texts: list[str]) -> np.ndarray:
    ids = token_ids(folder)
    assert ids is not None
    return read_values(folder)[tensor][[ids[text] for text in texts]]


@pytest.mark.parametrize(("merging", "weights"), [(None, (0.5, 0.5)), ({"method": "linear"}, (0.75, 0.25))])
def test_embedding_and_head_are_averages_of_padded_rows(
    merging: Any, weights: tuple[float, float], mixed: Path, tmp_path: Path
) -> None:
    experts: Any = {"llama": {"model": "llama", "weight": 3.0} if merging else "llama", "gpt_neox": "gpt_neox"}
    sections = {"merge": merging} if merging else {}
    made = read_values(built(mixed, tmp_path / "out", experts, moe=RANDOM, **sections))
    texts = list(token_ids(mixed / "llama") or {})
    assert set(texts) <= set(token_ids(mixed / "gpt_neox") or {})
    names = {"model.embed_tokens.weight": "gpt_neox.embed_in.weight", "lm_head.weight": "embed_out.weight"}
    for name, theirs in names.items():
        llama = np.pad(rows_by_text(mixed / "llama", name, texts), ((0, 0), (0, 16)))
        expected = weights[0] * llama + weights[1] * rows_by_text(mixed / "gpt_neox", theirs, texts)
        made_rows = made[name][[(token_ids(tmp_path / "out") or {})[text] for text in texts]]
        np.testing.assert_allclose(made_rows, expected, rtol=1e-6, atol=1e-7)


def test_separate_experts_keep_their_rows_in_the_order_of_the_tokenizer(mixed: Path, tmp_path: Path) -> None:
    out = built(mixed, tmp_path / "out", moe={"embedding": "separate"}, tokenizer="olmo2")
    made, ids = read_values(out), token_ids(out) or {}
    assert ids == token_ids(mixed / "olmo2")
    shared = [text for text in ids if text in (token_ids(mixed / "gpt_neox") or {})]
    assert len(shared) > 250
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        own = rows_by_text(mixed / "gpt_neox", name, shared)
        assert made[f"model.experts.2.{name}"].shape == (280, 48)
        assert np.array_equal(made[f"model.experts.2.{name}"][[ids[text] for text in shared]], own)
    for key, value in read_tensors(mixed / "olmo2").items():
        assert np.array_equal(read_tensors(out)[f"model.experts.1.{key}"], value), key
    assert "model.experts.3.lm_head.weight" not in made and "model.embed_tokens.weight" not in made


def test_a_token_that_an_expert_lacks_is_the_mean_of_its_pieces(mixed: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    out = built(mixed, tmp_path / "out", ["llama", "olmo2"], moe={"embedding": "separate"})
    ids, own = token_ids(out) or {}, token_ids(mixed / "olmo2") or {}
    lacking = [text for text in ids if text not in own]
    assert lacking
    tokenizer = Tokenizer.from_file(str(mixed / "olmo2" / "tokenizer.json"))
    made = read_values(out)["model.experts.1.model.embed_tokens.weight"]
    table = read_values(mixed / "olmo2")["model.embed_tokens.weight"]
    for text in lacking:
        pieces = tokenizer.encode(text.replace("Ġ", " "), add_special_tokens=False).ids
        assert len(pieces) > 1
        np.testing.assert_allclose(made[ids[text]], table[pieces].mean(0), rtol=1e-6, atol=1e-7)


def without_start(folder: Path) -> None:
    """Leave a model's tokenizer with the end of text as its only special token."""
    for text in ("<s>", "<pad>"):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace(json.dumps(text), json.dumps(f"{text[:-1]}_none>")))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "bos_token_id": None, "pad_token_id": None, "eos_token_id": 2})


@pytest.mark.parametrize(("kind", "tied"), [("gpt_neox", False), ("qwen2", True)])
def test_a_head_gives_each_of_its_rows_away_once(kind: str, tied: bool, tmp_path: Path) -> None:
    make_mixed(tmp_path, "llama", kind)
    without_start(tmp_path / kind)
    out = built(tmp_path, tmp_path / "out", ["llama", kind], moe={"embedding": "separate"})
    names = {"gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"), "qwen2": ("model.embed_tokens.weight",) * 2}[kind]
    embedding, head = (read_values(out)[f"model.experts.1.{name}"] for name in names)
    ids, table = token_ids(out) or {}, read_values(tmp_path / kind)[names[1]]
    start, end = ids["<s>"], ids["</s>"]
    assert np.array_equal(embedding[start], embedding[end]) and np.array_equal(head[end], table[2])
    warned = [text for text in moerge("plan", tmp_path / "recipe.yaml", "--json").json["warnings"] if "second time" in text]
    if tied:
        assert np.array_equal(head[start], table[2]) and len(warned) == 1 and "1 tokens of the result" in warned[0]
    else:
        np.testing.assert_allclose(head[start], table.mean(0), rtol=1e-5, atol=1e-6)
        assert not warned


def test_the_plan_says_what_it_will_be(mixed: Path) -> None:
    result = moerge("plan", atomic_write(mixed, moe={"router": {"kind": "perplexity"}, "top_k": 3}), "--json").json
    assert result["model_type"] == "moerge_heterogeneous"
    assert result["experts"] == list(MIXED)
    shares = result["vocabulary"]["models"]
    assert shares["llama"] == {"exact": 1.0, "composed": 0.0, "left": 0.0}
    assert 0.5 < shares["olmo2"]["exact"] < 1 and shares["olmo2"]["composed"] == pytest.approx(1 - shares["olmo2"]["exact"])
    assert result["operations"]["copy"] == 92 and result["operations"]["average"] == 2
    widths = "llama (llama, width 32), olmo2 (olmo2, width 24), gpt_neox (gpt_neox, width 48), qwen2 (qwen2, width 40)"
    assert f"experts stay whole models: {widths}" in result["notes"]
    notes = [note for note in result["notes"] if note.startswith("tokens: ")]
    assert len(notes) == 3 and notes[0].startswith("tokens: olmo2 has 93.0% of the result's, composes 7.0% of its own pieces")
    assert "tokenizer and generation config from llama" in result["notes"]


def test_the_config_says_how_the_experts_are_put_together(mixed: Path) -> None:
    recipe = atomic_write(mixed, moe={"router": {"kind": "perplexity"}, "top_k": 3, "prefix_tokens": 9}, tokenizer="qwen2")
    config = plan(recipe).config
    assert config["vocab_size"] == 310 and config["hidden_size"] == 48
    assert config["embedding"] == "shared" and config["head_bias"] is False
    assert config["projectors"]["linear"] is True
    assert config["routing"] == {"kind": "perplexity", "top_k": 3, "temperature": 1.0, "on": "prefix", "prefix_tokens": 9}
    assert [own["vocab_size"] for own in config["expert_configs"]] == [300, 280, 330, 310]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    separate = plan(atomic_write(mixed, moe={"embedding": "separate", "router": {"kind": "random"}, "top_k": 1})).config
    assert separate["projectors"] is None and separate["routing"]["kind"] == "learned"
    assert plan(atomic_write(mixed, moe=RANDOM)).config["projectors"]["linear"] is False


@pytest.mark.parametrize(("embedding", "width"), [("shared", 48), ("separate", 32 + 24 + 48 + 40)])
def test_a_drawn_gate_reads_mean_embeddings(embedding: str, width: int, mixed: Path) -> None:
    planned = plan(atomic_write(mixed, moe={"embedding": embedding, "router": {"kind": "random", "seed": 4}}))
    *_, gate = planned.outputs
    assert (gate.name, gate.shape, gate.action) == ("router.weight", (4, width), "draw")
    assert "the learned router is untrained: the MoE mixes its experts blindly until it is fine-tuned" in planned.warnings


def test_models_of_one_type_and_different_shapes_stay_whole(tmp_path: Path) -> None:
    make_model(tmp_path / "narrow", FAMILIES["llama"](), vocabulary=280)
    make_model(tmp_path / "wide", FAMILIES["llama"](hidden_size=48), vocabulary=280)
    recipe = atomic_write(tmp_path, ["narrow", "wide"])
    assert plan(recipe).config["model_type"] == "moerge_heterogeneous"
    alike = atomic_write(tmp_path, {"one": "narrow", "two": "narrow"}, name="alike.yaml")
    assert plan(alike).config["model_type"] == "moerge"
    asked = atomic_write(tmp_path, {"one": "narrow", "two": "narrow"}, name="asked.yaml", moe={"embedding": "separate"})
    assert plan(asked).config["model_type"] == "moerge_heterogeneous"


def test_the_base_is_an_expert_unless_it_is_left_out(mixed: Path) -> None:
    with_base = plan(atomic_write(mixed, ["olmo2"], base="llama"))
    assert with_base.experts == ("base", "olmo2") and with_base.config["vocab_size"] == 300
    without = plan(atomic_write(mixed, ["olmo2", "gpt_neox"], base="llama", moe={"include_base": False}))
    assert without.experts == ("olmo2", "gpt_neox") and without.config["vocab_size"] == 300
    assert without.vocabulary["source"] == "base"


def test_an_adapter_is_the_model_that_it_amounts_to(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(mixed / "llama")
    (tmp_path / "olmo2").symlink_to(mixed / "olmo2")
    module = "model.layers.0.mlp.up_proj"
    factors = low_rank(module, (48, 32), rank=4)
    write_adapter(tmp_path / "tuned", factors, r=4, lora_alpha=8)
    out = built(tmp_path, tmp_path / "out", ["tuned", "olmo2"], base="base", moe=RANDOM)
    base, made = read_values(mixed / "llama"), read_values(out)
    a, b = (factors[f"{module}.lora_{factor}.weight"] for factor in "AB")
    np.testing.assert_allclose(
        made[f"model.experts.1.{module}.weight"], merged(base[f"{module}.weight"], a, b, 2.0), rtol=1e-5, atol=1e-6
    )
    assert np.array_equal(made["model.experts.1.model.norm.weight"], base["model.norm.weight"])


def test_other_element_types_are_converted(mixed: Path, tmp_path: Path) -> None:
    result = moerge("merge", atomic_write(mixed, moe=RANDOM, dtype="bfloat16"), tmp_path / "out")
    assert result.code == 0, result.err
    assert moerge("inspect", tmp_path / "out", "--json").json["dtypes"].keys() == {"BF16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and {own["dtype"] for own in config["expert_configs"]} == {"bfloat16"}


def test_tensors_that_no_model_uses_are_left_out_with_a_warning(mixed: Path, tmp_path: Path) -> None:
    for name in ("llama", "olmo2"):
        (tmp_path / name).mkdir()
        for path in (mixed / name).iterdir():
            shutil.copy(path, tmp_path / name / path.name)
    (tmp_path / "olmo2" / "model.safetensors").unlink()
    (tmp_path / "olmo2" / "config.json").unlink()
    config = json.loads((mixed / "olmo2" / "config.json").read_text())
    extra = {"strange.weight": np.ones(3, np.float32), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    write_checkpoint(tmp_path / "olmo2", {**read_values(mixed / "olmo2"), **extra}, config, dtype="F32", tokenizer=False)
    planned = plan(atomic_write(tmp_path, ["llama", "olmo2"], moe=RANDOM))
    assert "olmo2: 1 tensors that its model does not use are left out: strange.weight" in planned.warnings
    assert not any("strange" in output.name or "inv_freq" in output.name for output in planned.outputs)


def test_names_without_the_prefix_of_the_model_inside_are_understood(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").symlink_to(mixed / "llama")
    make_model(tmp_path / "bloom", transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4), vocabulary=280)
    config = json.loads((tmp_path / "bloom" / "config.json").read_text())
    values = {name.removeprefix("transformer."): value for name, value in read_values(tmp_path / "bloom").items()}
    assert "h.0.input_layernorm.weight" in values
    write_checkpoint(tmp_path / "bloom", values, config, dtype="F32", tokenizer=False)
    made = read_values(built(tmp_path, tmp_path / "out", ["llama", "bloom"], moe=RANDOM))
    for name, value in values.items():
        if name != "word_embeddings.weight":
            assert np.array_equal(made[f"model.experts.1.transformer.{name}"], value), name


def test_soft_capping_is_lost_with_a_shared_head_only(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").symlink_to(mixed / "llama")
    make_model(tmp_path / "gemma2", FAMILIES["gemma2"](), vocabulary=280)
    shared = plan(atomic_write(tmp_path, ["llama", "gemma2"], moe=RANDOM)).warnings
    assert any(text.startswith("gemma2: its logits are capped at 30, and the shared head's are not") for text in shared)
    assert plan(atomic_write(tmp_path, ["llama", "gemma2"], moe={"embedding": "separate"})).warnings == ()


def test_a_head_that_cannot_be_looked_at_is_warned_about(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no states like these")

    monkeypatch.setattr(transformers.StableLmForCausalLM, "forward", fails)
    (tmp_path / "llama").symlink_to(mixed / "llama")
    make_model(tmp_path / "odd", transformers.StableLmConfig(**SIZES), vocabulary=280)
    warning = "odd: what models of type 'stablelm' do to the head's outputs could not be found out"
    shared, own = ({"router": {"kind": "random"}, **more} for more in ({"projectors": "random"}, {"embedding": "separate"}))
    assert any(text.startswith(warning) for text in plan(atomic_write(tmp_path, ["llama", "odd"], moe=shared)).warnings)
    assert not any(text.startswith(warning) for text in plan(atomic_write(tmp_path, ["llama", "odd"], moe=own)).warnings)


def test_merge_settings_are_of_no_use_where_nothing_is_merged(mixed: Path) -> None:
    recipe = atomic_write(mixed, moe={"embedding": "separate"}, merge={"method": "average"})
    assert plan(recipe).warnings == ("'merge' is not used: with 'embedding: separate' nothing is merged",)


@pytest.mark.parametrize("moe", [{}, {"embedding": "separate"}], ids=["shared", "separate"])
def test_the_same_bytes_whatever_the_threads_and_shards(moe: Any, mixed: Path, tmp_path: Path) -> None:
    recipe = atomic_write(mixed, moe={**moe, "router": {"kind": "random"}})
    merge(recipe, tmp_path / "one", threads=1)
    merge(recipe, tmp_path / "four", threads=4)
    merge(recipe, tmp_path / "shards", threads=3, max_shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "four").iterdir()}
    for name, value in read_tensors(tmp_path / "one").items():
        assert np.array_equal(read_tensors(tmp_path / "shards")[name], value), name


def test_another_seed_draws_other_projectors_and_the_same_experts(mixed: Path, tmp_path: Path) -> None:
    recipe = atomic_write(mixed, ["llama", "olmo2"], moe=RANDOM)
    for seed in (1, 2):
        assert moerge("merge", recipe, tmp_path / str(seed), "--seed", seed).code == 0
    one, two = (read_tensors(tmp_path / seed) for seed in "12")
    differing = {name for name in one if not np.array_equal(one[name], two[name])}
    assert differing and all(name.startswith("model.projectors_") for name in differing)


def test_an_interrupted_merge_goes_on_to_the_same_bytes(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = atomic_write(mixed), tmp_path / "out"
    merge(recipe, tmp_path / "whole", threads=1)
    real, calls = os.pwrite, []

    def failing(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, threads=1)
    monkeypatch.undo()
    assert staging_folder(out).exists() and not out.exists()
    assert moerge("merge", recipe, out).code == 2
    assert moerge("merge", recipe, out, "--resume").code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_another_tokenizer_makes_an_interrupted_merge_start_over(mixed: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("llama", "olmo2"):
        shutil.copytree(mixed / name, tmp_path / name)
    recipe = atomic_write(tmp_path, ["llama", "olmo2"], moe={"embedding": "separate"})
    before = plan(recipe).fingerprint
    assert plan(recipe).fingerprint == before
    stored = (tmp_path / "olmo2" / "model.safetensors").stat()
    tokens = json.loads((tmp_path / "olmo2" / "tokenizer.json").read_text())
    a, b = list(tokens["model"]["vocab"])[100:102]
    tokens["model"]["vocab"] |= {a: tokens["model"]["vocab"][b], b: tokens["model"]["vocab"][a]}
    (tmp_path / "olmo2" / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    assert (tmp_path / "olmo2" / "model.safetensors").stat() == stored
    assert plan(recipe).fingerprint != before


def test_no_tensor_is_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of 14 MB are assembled with less memory than one of their larger tensors, and read a window at a time."""
    large = {"hidden_size": 256, "intermediate_size": 3072, "num_hidden_layers": 1}
    make_model(tmp_path / "large", FAMILIES["llama"](**large), vocabulary=2000)
    make_model(tmp_path / "other", FAMILIES["olmo2"](**{**large, "hidden_size": 192}), vocabulary=300)
    nbytes = sum(path.stat().st_size for path in tmp_path.glob("*/model.safetensors"))
    recipe = atomic_write(tmp_path, ["large", "other"], moe=RANDOM)
    merge(recipe, tmp_path / "warm", threads=1)  # so that kernels are compiled
    read, elements = [], header.StoredTensor.open

    def watched(tensor: Any) -> Any:
        opened = elements(tensor)

        class Watched:
            def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
                read.append(out_N.size)
                return np.array(opened.read(start, out_N))

        return Watched()

    monkeypatch.setattr(header.StoredTensor, "open", watched)
    planned = plan(recipe)
    tracemalloc.start()
    merge(planned, tmp_path / "out", threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.size for model in planned.models for tensor in model.tensors.values())
    assert largest > 2 * WINDOW and max(read) <= WINDOW
    assert 4 * largest * 3 < nbytes and peak < nbytes / 2, (peak, nbytes)


def test_a_tokenizer_is_that_of_the_model_that_is_named(mixed: Path, tmp_path: Path) -> None:
    out = built(mixed, tmp_path / "out", moe={"embedding": "separate"}, tokenizer="gpt_neox")
    assert (out / "tokenizer.json").read_bytes() == (mixed / "gpt_neox" / "tokenizer.json").read_bytes()
    write_bpe(tmp_path / "again", 330)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
