"""Checkpoints of the model of different architectures: made by hand from experts' checkpoints, saved, loaded anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from moerge.modeling import (
    HETEROGENEOUS_AUTO_MAP,
    MoergeHeterogeneousForCausalLM,
    MoergeHeterogeneousModel,
    code_files,
    register,
)
from moerge.runtime.single_expert import load_one_expert
from tests.modeling.mixed_models import FOUR, expert, is_table, mixed, write_by_hand
from tests.modeling.routed_models import check_without_moerge, padded, prompts

pytestmark = pytest.mark.slow

GROUPS = [
    FOUR,
    ("gpt2", "gemma2", "bloom", "opt", "mpt"),
    ("mixtral", "qwen3_moe", "phi"),  # their checkpoints have a tensor for each expert of a layer, their modules one for all
    ("mamba", "falcon_h1", "lfm2"),
    ("llama4_text", "gemma3_text", "cohere", "granite"),
]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def experts(families: Sequence[str]) -> list[Any]:
    return [expert(family, seed) for seed, family in enumerate(families)]


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("embedding", ["shared", "separate"])
@pytest.mark.parametrize("families", GROUPS)
@torch.no_grad()
def test_a_checkpoint_made_from_the_experts_own_loads_and_is_saved_under_the_same_names(
    families: tuple[str, ...], embedding: str, tmp_path: Path
) -> None:
    written = write_by_hand(tmp_path, experts(families), embedding, routing={"kind": "uniform"})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is MoergeHeterogeneousForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.stack(prompts(7, 7))
    for number, one in enumerate(model.model.experts):
        dense = expert(families[number], number).state_dict()
        own = one.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in dense.items() if name in own)
        assert {name for name in dense.keys() - own.keys() if not is_table(name, expert(families[number], number))} == set()
        assert own.keys() <= dense.keys()
        if embedding == "separate":
            model.set_routing("fixed", expert=model.config.expert_names[number])
            expected = expert(families[number], number)(ids).logits.log_softmax(-1)
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    again = tmp_path / "again"
    model.save_pretrained(again)
    saved = stored(again)
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in written)


def test_tied_experts_stay_tied_and_have_no_head_of_their_own(tmp_path: Path) -> None:
    model = mixed("qwen2", "llama", "gpt2", embedding="separate", routing={"kind": "learned"})
    model.save_pretrained(tmp_path)
    heads = [name for name in stored(tmp_path) if "lm_head" in name]
    assert heads == ["model.experts.1.lm_head.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in loaded.model.experts]
    assert tied == [True, False, True]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@torch.no_grad()
def test_in_shards_and_in_another_dtype(tmp_path: Path) -> None:
    model = mixed(*FOUR, routing={"kind": "learned"}).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.stack(prompts(5))  # `to` also rounds the rotary frequencies, which loading keeps in float32
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0.2, rtol=0.05)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert {parameter.dtype for parameter in eager.parameters()} == {torch.float32}
    assert {one.config._attn_implementation for one in eager.model.experts} == {"eager"}
    assert [layer.dtype for layer in AutoModel.from_pretrained(tmp_path).experts] == [torch.bfloat16] * 4


@torch.no_grad()
def test_the_model_without_a_head(tmp_path: Path) -> None:
    model = mixed("llama", "mixtral", routing={"kind": "uniform"})
    model.save_pretrained(tmp_path)
    body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(body) is MoergeHeterogeneousModel
    assert not report["missing_keys"] and report["unexpected_keys"] == {"lm_head.weight"}
    ids = torch.stack(prompts(5, 5))
    torch.testing.assert_close(model.lm_head(body(ids).last_hidden_state), model(ids).logits)
    body.config.routing["kind"] = "perplexity"
    with pytest.raises(ValueError, match="perplexity routing needs the heads: pass a routing or use the causal LM"):
        body(ids)


@torch.no_grad()
def test_experts_may_lie_on_different_devices(tmp_path: Path) -> None:
    """Here: in memory and on disk, which moves every weight to where it is used."""
    pytest.importorskip("accelerate")
    model = mixed("llama", "gpt_neox", routing={"kind": "perplexity"})
    model.save_pretrained(tmp_path / "model")
    devices = {"model.experts.0": "cpu", "model.experts.1": "disk", "model.embed_tokens": "cpu", "lm_head": "disk"}
    devices |= {"model.projectors_in": "cpu", "model.projectors_out": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload")
    assert loaded.model.experts[1].gpt_neox.layers[0].mlp.dense_h_to_4h.weight.device.type == "meta"
    ids, mask = padded(prompts(6, 4), "left")
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **options), model.generate(ids, attention_mask=mask, **options))
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto", max_memory={"cpu": "1GB"})
    assert torch.equal(automatic(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert {"LlamaDecoderLayer", "GPTNeoXLayer", "Projector"} <= set(model._no_split_modules)


@torch.no_grad()
def test_it_loads_where_moerge_is_not_installed(tmp_path: Path) -> None:
    """Also what a family computes only when it is loaded: Falcon-H1's multipliers."""
    folder = tmp_path / "checkpoint"
    model = mixed("llama", "falcon_h1", "mixtral", routing={"kind": "uniform"})
    model.save_pretrained(folder)
    files = code_files(HETEROGENEOUS_AUTO_MAP)
    assert {path.name for path in folder.glob("*.py")} == set(files)
    assert "layers_moerge.py" not in files and "experts_moerge.py" not in code_files()
    assert json.loads((folder / "config.json").read_text())["auto_map"].items() <= HETEROGENEOUS_AUTO_MAP.items()
    check_without_moerge(model, folder)


@pytest.mark.parametrize("families", GROUPS)
@torch.no_grad()
def test_one_expert_alone_is_what_it_is_among_the_others(families: tuple[str, ...], tmp_path: Path) -> None:
    write_by_hand(tmp_path, experts(families), "shared", routing={"kind": "learned"})
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).model
    ids = torch.stack(prompts(7, 7))
    for number in range(len(families)):
        alone = load_one_expert(tmp_path, number)
        assert sum(map(torch.numel, alone.parameters())) < sum(map(torch.numel, whole.parameters()))
        mine, theirs = (model.path(n, model.make_prompt(ids, None, None, None)) for model, n in ((alone, 0), (whole, number)))
        assert torch.equal(mine, theirs)
