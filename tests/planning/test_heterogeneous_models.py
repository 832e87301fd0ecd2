"""Running what was assembled of whole models, against the experts alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moerge.modeling import register
from tests.helpers.command import moerge
from tests.helpers.hf_models import FAMILIES, load, logits, torch, transformers
from tests.helpers.tiny import read_tensors
from tests.helpers.whole_models import MIXED, atomic_write, ids_of, make_model

pytestmark = pytest.mark.slow

register()
ALONE = {
    "llama": {},
    "gpt_neox": {},
    "olmo2": {},
    "qwen2": {},
    "gpt2": {},
    "llama-tied": {"tie_word_embeddings": True},
    "gpt_neox-tied": {"tie_word_embeddings": True},
    "granite": {},
    "gemma3_text": {},
    "phi3": {},
    "mixtral": {},
}
"""Experts alone: families, with what is scaled, tied, fused and itself a mixture."""
FIXED = {"kind": "fixed", "expert": "one"}


@pytest.fixture(scope="module")
def out(mixed: Path) -> Path:
    """The four of them, fitted, routed by perplexity."""
    recipe = atomic_write(mixed, moe={"router": {"kind": "perplexity"}}, name="out.yaml")
    result = moerge("merge", recipe, mixed / "out")
    assert result.code == 0, result.err
    return mixed / "out"


def merged(folder: Path, experts: Any, moe: Any, **sections: Any) -> Any:
    result = moerge("merge", atomic_write(folder, experts, moe=moe, **sections), folder / "out", "--force")
    assert result.code == 0, result.err
    return load(folder / "out")


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("embedding", ["shared", "separate"])
def test_one_expert_alone_has_its_own_logits(case: str, embedding: str, tmp_path: Path) -> None:
    family = case.partition("-")[0]
    make_model(tmp_path / "one", FAMILIES[family](**ALONE[case]), vocabulary=290, seed=5)
    model = merged(tmp_path, {"one": "one"}, {"embedding": embedding, "router": FIXED})
    ids = ids_of(tmp_path / "one")
    expected = logits(load(tmp_path / "one"), ids)
    if embedding == "separate":  # what is mixed are probabilities
        expected = expected.log_softmax(-1)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_one_expert_alone_in_bfloat16_has_its_own_logits_to_the_last_bit(family: str, tmp_path: Path) -> None:
    """Also where rows and logits are multiplied by something, which is rounded as the expert's own modules round it."""
    make_model(tmp_path / "one", FAMILIES[family](), vocabulary=290, seed=5, dtype=torch.bfloat16)
    merged(tmp_path, ["one"], {"projectors": "fitted", "router": FIXED})
    ids = ids_of(tmp_path / "one")
    out, own = (logits(load(tmp_path / name, dtype=torch.bfloat16), ids) for name in ("out", "one"))
    assert torch.equal(out, own)


@pytest.mark.parametrize("embedding", ["shared", "separate"])
def test_the_same_model_twice_is_that_model_however_it_is_routed(embedding: str, tmp_path: Path) -> None:
    make_model(tmp_path / "one", FAMILIES["olmo2"](), vocabulary=290, seed=5)
    model = merged(tmp_path, {"one": "one", "two": "one"}, {"embedding": embedding, "router": {"kind": "random"}, "top_k": 1})
    ids = ids_of(tmp_path / "one")
    expected = logits(load(tmp_path / "one"), ids).log_softmax(-1)
    for kind, options in (("fixed", {"expert": "one"}), ("fixed", {"expert": "two"}), ("uniform", {}), ("learned", {"top_k": 2})):
        model.set_routing(kind, **options)
        torch.testing.assert_close(logits(model, ids).log_softmax(-1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("expert", MIXED)
def test_a_separate_expert_with_its_own_tokenizer_has_its_own_logits(expert: str, mixed: Path, tmp_path: Path) -> None:
    for name in MIXED:
        (tmp_path / name).symlink_to(mixed / name)
    model = merged(
        tmp_path, list(MIXED), {"embedding": "separate", "router": {"kind": "fixed", "expert": expert}}, tokenizer=expert
    )
    ids = ids_of(mixed / expert)
    expected = logits(load(mixed / expert), ids).log_softmax(-1)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)


def test_it_loads_and_generates_with_and_without_moerge(out: Path) -> None:
    ids = ids_of(out)
    model = load(out)
    assert type(model).__name__ == "MoergeHeterogeneousForCausalLM"
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    code = (
        "import sys; sys.modules['moerge'] = None; import torch; from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({str(out)!r}, trust_remote_code=True, dtype=torch.float32).eval(); "
        f"print(m.generate(torch.tensor({ids.tolist()}), max_new_tokens=4, do_sample=False).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == written.tolist()


def test_saving_it_again_gives_the_names_that_verify_expects(out: Path, tmp_path: Path) -> None:
    load(out).save_pretrained(tmp_path / "saved")
    result = moerge("verify", tmp_path / "saved", "--json")
    assert result.json["problems"] == [] and result.json["tensors"] == moerge("verify", out, "--json").json["tensors"]


@pytest.mark.parametrize("embedding", ["shared", "separate"])
def test_experts_that_transformers_renames_are_saved_as_they_were(embedding: str, mixed: Path, tmp_path: Path) -> None:
    """GPT-NeoX's head and Mixtral's experts have other names in memory, and Mixtral's lie in fewer tensors."""
    (tmp_path / "gpt_neox").symlink_to(mixed / "gpt_neox")
    make_model(tmp_path / "mixtral", FAMILIES["mixtral"](), vocabulary=290, seed=5)
    merged(tmp_path, ["mixtral", "gpt_neox"], {"embedding": embedding}).save_pretrained(tmp_path / "saved")
    before, after = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "saved")
    assert "model.experts.0.model.layers.1.block_sparse_moe.experts.2.w3.weight" in before
    assert ("model.experts.1.embed_out.weight" in before) == (embedding == "separate")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("kind", ["bloom", "opt", "gptj"])
def test_families_that_moerge_has_no_table_of_work_too(kind: str, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").symlink_to(mixed / "llama")
    config = {
        "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
        ),
        "gptj": lambda: transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    }[kind]()
    config.bos_token_id, config.eos_token_id = 1, 2
    make_model(tmp_path / "one", config, vocabulary=290, seed=5)
    experts = ["one", "llama"]
    model = merged(tmp_path, experts, {"embedding": "separate", "router": FIXED})
    ids = ids_of(tmp_path / "one")
    torch.testing.assert_close(logits(model, ids), logits(load(tmp_path / "one"), ids).log_softmax(-1), rtol=0, atol=1e-4)
    alone = merged(tmp_path, ["one"], {"projectors": "fitted", "router": FIXED})
    torch.testing.assert_close(logits(alone, ids), logits(load(tmp_path / "one"), ids), rtol=0, atol=1e-4)
    assert moerge("verify", tmp_path / "out").code == 0
