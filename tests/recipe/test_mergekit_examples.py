"""Files as people write them for mergekit, in the manner of its examples and documentation: all are understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerge.recipe import load_recipe

GRADIENT_SLERP = """
# attention from one, MLP from the other, and back
slices:
  - sources:
      - model: ghost-lab/Owl-13B
        layer_range: [0, 40]
      - model: fernwood/Heron2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: ghost-lab/Owl-13B
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
TIES = """
models:
  - model: ghost-lab/Owl-13B
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: fernwood/Heron2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: ghost-lab/Sums-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: lakeside/Plain-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE = """
models:
  - model: northwind/Seven-7B-v0.1
    # No parameters necessary for base model
  - model: ghost-lab/Chat-7B
    parameters: {density: 0.53, weight: 0.4}
  - model: fernwood/Maths_7b.v2
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: northwind/Seven-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
random_seed: 7
tokenizer_source: union
chat_template: chatml
"""
FRANKENMERGE = """
dtype: float16
merge_method: passthrough
slices:
- sources: &first
  - layer_range: [0, 16]
    model: ghost-lab/Big-70b
- sources:
  - layer_range: [8, 24]
    model: fernwood/Bigger-70b
- sources: *first
"""
UPSCALE = """
slices:
  - sources:
    - model: northwind/Seven-7B
      layer_range: [0, 24]
  - sources:
    - model: northwind/Seven-7B
      layer_range: [8, 24]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
  - sources:
    - model: northwind/Seven-7B
      layer_range: [24, 32]
merge_method: passthrough
dtype: bfloat16
"""
LINEAR = """
models:
  - model: ./runs/orca@step-100
    parameters:
      weight: 1.0
  - model: ../other/orca/
    parameters:
      weight: 0.3
merge_method: linear
dtype: float32
out_dtype: bfloat16
"""
STOCK = """
models:
    - model: a/one
    - model: a/two
    - model: a/three
base_model: a/zero
merge_method: model_stock
dtype: bfloat16
"""
SCE = """
merge_method: sce
models: [{model: a/one}, {model: a/two}]
base_model: a/zero
parameters: {select_topk: 0.1}
tokenizer: {source: a/two}
"""
DELLA = """
merge_method: della
models:
  - {model: a/one, parameters: {weight: 0.6, density: 0.5, epsilon: 0.1}}
  - {model: a/zero+b/lora, parameters: {weight: 0.4, density: 0.4}}
base_model: a/zero
parameters: {lambda: 1.1, normalize: true}
dtype: bfloat16
tokenizer_source: base
"""
BREADCRUMBS = """
base_model: a/zero
merge_method: breadcrumbs_ties
models:
  - model: a/one
    parameters: {weight: 1.0, density: 0.9, gamma: 0.01}
  - model: a/two
    parameters:
      weight: [{filter: embed_tokens, value: 0.0}, {value: 0.5}]
      density: 0.9
parameters: {weight: 1.0}
"""
FILES = {
    GRADIENT_SLERP: ("slerp of Owl-13B, Heron2-13B, 40 layers from 1 slice", None, "Owl-13B", None, "float16"),
    TIES: ("ties of Owl-13B, Heron2-13B, Sums-13B-V1.0 on base", "lakeside/Plain-2-13B-fp16", "base", None, "float16"),
    DARE: ("dare_ties of Chat-7B, Maths_7b.v2 on base", "northwind/Seven-7B-v0.1", "base", "union", "bfloat16"),
    FRANKENMERGE: ("passthrough of Big-70b, Bigger-70b, 48 layers from 3 slices", None, "Big-70b", None, "float16"),
    UPSCALE: ("passthrough of Seven-7B, 48 layers from 3 slices", None, "Seven-7B", None, "bfloat16"),
    LINEAR: ("linear of orca, orca_2", None, "orca", None, "bfloat16"),
    STOCK: ("model_stock of one, two, three on base", "a/zero", "base", None, "bfloat16"),
    SCE: ("sce of one, two on base", "a/zero", "base", "two", None),
    DELLA: ("della of one, lora on base", "a/zero", "base", "base", "bfloat16"),
    BREADCRUMBS: ("breadcrumbs_ties of one, two on base", "a/zero", "base", None, None),
}


@pytest.mark.parametrize("text", FILES, ids=[meant[0].split()[0] for meant in FILES.values()])
def test_a_file_is_understood(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mergekit_config.yml"
    path.write_text(text)
    recipe = load_recipe(path)
    understood, base, config, tokenizer, dtype = FILES[text]
    assert recipe.notes[0] == f"a mergekit file: {understood}"
    assert (recipe.base, recipe.config, recipe.tokenizer, recipe.dtype) == (base, config, tokenizer, dtype)


MOE = """
base_model: northwind/Seven-7B-Instruct
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: ghost-lab/Chat-7B
    positive_prompts:
      - "chat"
      - "assistant"
      - "tell me"
  - source_model: fernwood/Code-7B
    positive_prompts: [code, python, "write a program"]
    negative_prompts: [poem]
  - source_model: fernwood/Verse-7B
    positive_prompts: ["a poem about the sea"]
  - source_model: ghost-lab/Maths-7B
    positive_prompts: [solve, reason, count]
"""


def test_a_moe_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "moe.yml"
    path.write_text(MOE)
    recipe = load_recipe(path)
    assert (
        recipe.notes[0] == "a mergekit-moe file: experts Chat-7B, Code-7B, Verse-7B, Maths-7B on the attention and norms of base"
    )
    assert recipe.base == "northwind/Seven-7B-Instruct" and list(recipe.experts) == ["Chat-7B", "Code-7B", "Verse-7B", "Maths-7B"]
    assert recipe.moe is not None and recipe.moe.top_k == 2
    assert recipe.moe.router.prompts["Code-7B"].negative == ("poem",)
