"""A merged mixture's feed-forward block against published outputs of the same experts and the same gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import moerge
from tests.helpers.tiny import llama_config, llama_tensors, write_checkpoint, write_recipe

CASE = "mixtral_block_top3"


def test_a_mixture_of_these_experts_computes_what_is_published(tmp_path: Path, oracles: Path) -> None:
    arrays = load_file(oracles / "moe_forward.safetensors")
    config, names = llama_config(num_hidden_layers=1, hidden_size=16, intermediate_size=24), [f"e{i}" for i in range(4)]
    for number, name in enumerate(names):
        parts = {f"model.layers.0.mlp.{part}.weight": arrays[f"in/experts.{part}"][number] for part in PARTS}
        write_checkpoint(tmp_path / name, {**llama_tensors(config), **parts}, config, dtype="F32")
    recipe = write_recipe(tmp_path, experts=names, base=None, moe={"top_k": 3, "include_base": False})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    block = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(arrays["in/gate"]))
        y_BTH = block(torch.from_numpy(arrays["in/x"]))
    np.testing.assert_allclose(y_BTH.numpy(), arrays[f"{CASE}/y"], rtol=0, atol=1e-5)


PARTS = ("gate_proj", "up_proj", "down_proj")
