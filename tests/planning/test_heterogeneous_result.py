"""What a checkpoint whose experts are whole models says about itself, and who can run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.command import moerge
from tests.helpers.tiny import read_values, write_safetensors
from tests.helpers.whole_models import MIXED, atomic_write, built

pytestmark = pytest.mark.slow

RANDOM = {"projectors": "random"}


def test_the_card_and_the_manifest_say_how_it_was_made(mixed: Path, tmp_path: Path) -> None:
    out = built(mixed, tmp_path / "out", moe={**RANDOM, "router": {"kind": "perplexity"}})
    card = (out / "README.md").read_text()
    assert "The experts are whole models (llama, olmo2, gpt_neox, qwen2), copied: projectors (random) lead" in card
    assert "tokens: olmo2 has 93.0% of the result's" in card
    assert "architecture `MoergeHeterogeneousForCausalLM`" in card and "trust_remote_code=True" in card
    manifest = json.loads((out / "moerge.json").read_text())
    assert manifest["vocabulary"]["models"]["olmo2"]["left"] == 0
    assert manifest["experts"] == list(MIXED)
    assert set(json.loads((out / "config.json").read_text())["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_the_plan_says_whose_chat_template_is_not_used(mixed: Path, tmp_path: Path) -> None:
    models = shutil.copytree(mixed, tmp_path / "models")
    (models / "olmo2" / "chat_template.jinja").write_text("{{ messages }}")
    said = (
        "no chat template: llama has none, and olmo2 may have other tokens ('tokenizer: olmo2' takes both, 'chat_template: FILE'"
    )
    notes = moerge("plan", atomic_write(models, moe=RANDOM), "--json").json["notes"]
    assert sum(said in note for note in notes) == 1
    named = moerge("plan", atomic_write(models, moe=RANDOM, tokenizer="olmo2"), "--json").json["notes"]
    assert not any("no chat template" in note for note in named)


def test_inspect_shows_every_expert(mixed: Path, tmp_path: Path) -> None:
    out = built(mixed, tmp_path / "out", moe=RANDOM)
    found = moerge("inspect", out, "--json").json
    assert found["family"] == "moerge_heterogeneous" and found["vocab_size"] == 300
    assert [(one["name"], one["model_type"], one["layers"], one["hidden_size"]) for one in found["expert_models"]] == [
        ("llama", "llama", 2, 32),
        ("olmo2", "olmo2", 3, 24),
        ("gpt_neox", "gpt_neox", 1, 48),
        ("qwen2", "qwen2", 2, 40),
    ]
    roles = {role["role"]: role["tensors"] for role in found["roles"]}
    assert roles["olmo2.layers.*.ffn.up"] == 3 and roles["gpt_neox.layers.*.attention.qkv"] == 1
    assert not any(role.startswith("(no role)") for role in roles)
    shown = moerge("inspect", out).out
    assert "expert olmo2" in shown and "3 layers, width 24" in shown


@pytest.mark.parametrize(
    "name", ["model.experts.2.gpt_neox.final_layer_norm.bias", "model.projectors_in.1.up.bias", "lm_head.weight"]
)
def test_verify_misses_what_is_missing(name: str, mixed: Path, tmp_path: Path) -> None:
    out = built(mixed, tmp_path / "out", moe=RANDOM)
    tensors = {key: value for key, value in read_values(out).items() if key != name}
    write_safetensors(out / "model.safetensors", tensors, dtype="F32")
    (out / "moerge.json").unlink()
    result = moerge("verify", out)
    assert result.code == 2 and result.err == f"moerge: {out}: tensor {name!r} is missing\n"


def test_other_programs_cannot_run_it(mixed: Path) -> None:
    result = moerge("plan", atomic_write(mixed, moe=RANDOM), "--for", "llama.cpp")
    assert result.code == 2
    assert (
        "llama.cpp does not run moerge's own architecture, only transformers 5.5 and newer do: experts of different" in result.err
    )
    assert moerge("plan", atomic_write(mixed, moe=RANDOM), "--for", "transformers").code == 0
