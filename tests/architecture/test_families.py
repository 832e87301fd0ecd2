"""Every family's table against what transformers writes: names, shapes, roles, defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moerge.architecture import expected_tensors, family_of, known_families, moe_formats
from moerge.architecture.config import _HARMLESS, differences, normalized_config, portable_config
from moerge.architecture.registry import MOE_FORMATS
from moerge.checkpoint.header import read_header
from tests.helpers.hf_models import (
    CASES,
    FAMILIES,
    SIZES,
    auto_class,
    load,
    logits,
    random_model,
    read_config,
    save,
    torch,
    transformers,
)

NESTED = ("gemma3", "qwen2_vl")
"""Models of which the language model is a part."""


def written(config: Any, folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json, and names and shapes of the tensors that transformers writes for a config."""
    transformers.utils.logging.disable_progress_bar()
    auto_class(config).from_config(config).save_pretrained(folder)
    return read_config(folder), {name: tensor.shape for name, tensor in read_header(folder / "model.safetensors").items()}


def test_every_family_has_a_case() -> None:
    assert sorted(FAMILIES) == known_families()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES)
def test_expected_tensors_are_those_that_transformers_writes(case: str, tmp_path: Path) -> None:
    config, tensors = written(CASES[case](), tmp_path)
    family = family_of(config)
    assert family is not None and family.model_type == case.partition("-")[0]
    assert family.architecture == config["architectures"][0]
    expected = {tensor.name: tensor.shape for tensor in expected_tensors(family, normalized_config(config, family))}
    assert expected == {name: shape for name, shape in tensors.items() if not family.is_unmodeled(name)}


@pytest.mark.parametrize("case", CASES)
def test_roles_and_names_are_one_table_read_both_ways(case: str) -> None:
    config = CASES[case]().to_dict()
    family = family_of(config)
    assert family is not None
    tensors = expected_tensors(family, normalized_config(config, family))
    assert len({tensor.role for tensor in tensors}) == len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        assert family.role_of(tensor.name) == tensor.role
        assert family.name_of(tensor.role) == tensor.name
        assert not family.is_buffer(tensor.name) and not family.is_unmodeled(tensor.name) and not family.is_fused(tensor.name)
    assert (family.role_of("model.layers.0.extra"), family.name_of("layers.0.extra")) == (None, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A config that says nothing but its sizes means what transformers fills in."""
    sizes = {**SIZES, "num_hidden_layers": 7}
    if name == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 7, "n_head": 4}
    elif name in NESTED:
        sizes = {}
    tokens = {key: sizes.pop(key) for key in list(sizes) if key.endswith("token_id")}
    sizes.pop("max_position_embeddings", None)
    bare = {"model_type": name, **sizes}
    family = family_of(bare)
    assert family is not None and len(tokens) in (0, 3)
    whole = type(FAMILIES[name]())(**sizes).to_dict()
    known = {"bare": normalized_config(bare, family), "whole": normalized_config(whole, family)}
    others = ("_token_index", "_tokens_per_image", "image_token_id", "video_token_id")
    for key in [key for key in known["whole"] if key.endswith(others) or key.startswith("vision")]:
        known["whole"].pop(key)  # of the other half of the model
    assert differences(known) == {}
    if name not in NESTED:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert known["bare"].get(key) == whole.get(key), key
    assert set(family.defaults) - set(known["whole"]) <= {"rope_local_scaling"}
    assert not set(family.defaults) & (_HARMLESS - {"bos_token_id", "eos_token_id", "pad_token_id"})


def as_in_4x(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as 4.x wrote it: rope at the top level, in each family's own words."""
    language = config.get("text_config", config)
    rope = language.pop("rope_parameters", None)
    if rope is not None:
        names = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
        theta, partial = names.get(config["model_type"], ("rope_theta", "partial_rotary_factor"))
        if "sliding_attention" in rope:
            language["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        language[theta] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            language[partial] = rope.pop("partial_rotary_factor")
        if config["model_type"] == "phi3":
            rope = {"type": rope.pop("rope_type"), **{k: v for k, v in rope.items() if k.endswith("_factor")}}
        if "mrope_section" in rope:
            rope["rope_type"] = "mrope"
        language["rope_scaling"] = rope if rope.get("rope_type", rope.get("type")) != "default" else None
    language.pop("layer_types", None) if config["model_type"].startswith("qwen") else None
    if "num_local_experts" in config and config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    config["torch_dtype"] = config.pop("dtype", "float32")
    return config


@pytest.mark.parametrize("case", CASES)
def test_configs_of_both_transformers_are_the_same_and_read_back_alike(case: str, tmp_path: Path) -> None:
    config = CASES[case]()
    config.save_pretrained(tmp_path)
    new = read_config(tmp_path)
    old = as_in_4x(json.loads(json.dumps(new)))
    family = family_of(new)
    assert differences({"old": normalized_config(old, family), "new": normalized_config(new, family)}) == {}
    for name, given in {"old": old, "new": new}.items():
        (tmp_path / name).mkdir()
        text = json.dumps(portable_config(given, family=family, dtype="float32"))
        (tmp_path / name / "config.json").write_text(text)
        read = transformers.AutoConfig.from_pretrained(tmp_path / name)
        assert same(read.to_dict()) == same(config.to_dict())
        again = portable_config(json.loads(text), family=family, dtype="float32")
        assert again == json.loads(text)


def same(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config a forward pass depends on, for comparing: `to_dict` repeats what it found in the file."""
    added = {"rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq"}
    added |= {"dtype", "torch_dtype", "transformers_version", "num_experts", "head_dim", "hidden_size", "text_config"}
    added |= {"architectures", "num_local_experts", "_name_or_path", "n_ctx"}
    kept = {key: value for key, value in config.items() if key not in added}
    if "type" in (kept.get("rope_parameters") or ()):
        kept["rope_parameters"] = {key: value for key, value in kept["rope_parameters"].items() if key != "type"}
    nested = config.get("text_config")
    return {**kept, **({"text_config": same(nested)} if nested else {})}


def test_what_4x_reads_is_there() -> None:
    """The keys that a config.json of transformers 5 lacks, and without which 4.x assumes something else."""

    def read(case: str) -> dict[str, Any]:
        config = CASES[case]().to_dict()
        return portable_config(config, family=family_of(config), dtype="bfloat16")

    yarn = read("qwen3-yarn")
    assert (yarn["rope_theta"], yarn["rope_scaling"]["rope_type"], yarn["torch_dtype"]) == (7000.0, "yarn", "bfloat16")
    assert yarn["rope_scaling"]["original_max_position_embeddings"] == 16
    neox = read("gpt_neox-rotary")
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (500.0, 1.0)
    assert neox["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    phi = read("phi3-longrope")
    assert set(phi["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert phi["rope_scaling"]["type"] == phi["rope_parameters"]["rope_type"] == "longrope"
    assert read("olmo2-linear")["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert read("olmo2-yarn")["rope_scaling"]["original_max_position_embeddings"] == 16  # 4.x takes no yarn there
    assert read("qwen3_moe")["num_experts"] == read("qwen2_moe")["num_experts"] == 3
    gemma = read("gemma3")["text_config"]
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["rope_scaling"]) == (1e6, 1e4, None)
    assert gemma["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


def test_yarn_keeps_its_factor_in_4x() -> None:
    """transformers 5 adds the trained length where there was none, from which 4.x computes another factor."""
    config = {**SIZES, "model_type": "qwen3", "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6}
    saved = transformers.Qwen3Config(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}).to_dict()
    assert saved["rope_parameters"]["original_max_position_embeddings"] == 64
    family = family_of(config)
    assert (
        differences({"old": normalized_config(config, family), "new": normalized_config({**saved, "head_dim": 128}, family)})
        == {}
    )
    assert portable_config(saved, family=family, dtype="float32")["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


SPELLINGS = [
    ("gpt2", "h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight", "layers.1.attention.qkv"),
    ("gpt2", "wte.weight", "transformer.wte.weight", "embedding"),
    ("gpt_neox", "lm_head.weight", "embed_out.weight", "head"),
    (
        "gemma3",
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "language_model.model.layers.1.self_attn.q_norm.weight",
        "layers.1.attention.q_norm",
    ),
    ("gemma3", "lm_head.weight", "language_model.lm_head.weight", "head"),
    ("gemma3", "model.vision_tower.embeddings.w", "vision_tower.embeddings.w", None),
]


@pytest.mark.parametrize(("model_type", "name", "spelled", "role"), SPELLINGS)
def test_other_spellings_of_a_name(model_type: str, name: str, spelled: str, role: str | None) -> None:
    family = family_of({"model_type": model_type})
    assert family is not None
    assert (family.canonical_name(name), family.canonical_name(spelled)) == (spelled, spelled)
    assert family.role_of(name) == family.role_of(spelled) == role


BUFFERS = [
    ("gpt2", "transformer.h.3.attn.bias"),
    ("gpt2", "transformer.h.3.attn.masked_bias"),
    ("gpt_neox", "gpt_neox.layers.3.attention.bias"),
    ("gpt_neox", "gpt_neox.layers.3.attention.masked_bias"),
    ("gpt_neox", "gpt_neox.layers.3.attention.rotary_emb.inv_freq"),
    ("llama", "model.layers.3.self_attn.rotary_emb.inv_freq"),
]


@pytest.mark.parametrize(("model_type", "name"), BUFFERS)
def test_buffers_of_old_checkpoints(model_type: str, name: str) -> None:
    family = family_of({"model_type": model_type})
    assert family is not None and family.is_buffer(name) and family.role_of(name) is None


def test_a_random_model_is_the_one_that_is_read_back(tmp_path: Path) -> None:
    """The helpers above: what is written loads, and weights are not those of initialisation."""
    model = random_model(FAMILIES["qwen2"](), 1)
    torch.testing.assert_close(logits(load(save(model, tmp_path))), logits(model))
    assert model.model.norm.weight.std() > 0.05


def test_the_page_about_families_names_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \|(.*)\|$", page, flags=re.MULTILINE)
    by_family: dict[str, str] = {}
    for names, row in rows:
        for name in re.findall(r"`(\w+)`", names):
            by_family[name] = by_family.get(name, "") + row
    for name in known_families():
        family = family_of({"model_type": name})
        assert family is not None and name in by_family
        for rule in family.tensors:
            role = rule.role.removeprefix("layers.{layer}.").removesuffix(".bias").replace("{expert}", "0")
            last = f"`.{role.rpartition('.')[2]}`"
            assert f"`{role}`" in page or f"`layers.N.{role}`" in page or last in page, (name, role)
    for name in moe_formats():
        chosen = MOE_FORMATS.get(name)
        assert f"| `{name}` | " in page
        assert all(f"`{name}`" in by_family[source] for source in chosen.sources)
