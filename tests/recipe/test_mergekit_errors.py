"""mergekit files that are refused: one sentence with the line, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

import moerge
from moerge.recipe.mergekit.methods import METHODS
from tests.helpers import tiny
from tests.helpers.command import refuses
from tests.recipe.mergekit_files import MOE

TIES = """\
merge_method: ties
base_model: base
models:
  - model: math
    parameters: {weight: 1, density: 0.5}
  - model: code
    parameters: {weight: 1}
parameters: {normalize: true}
"""
SLICES = """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: math, layer_range: [0, 2]}
      - {model: base, layer_range: [0, 2]}
parameters: {weight: 1}
"""
HIDDEN = MOE.replace("{mode}", "hidden")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    tiny.make_models(folder)
    return folder


HAS = ", ".join(sorted(METHODS))
BAD = [
    # the document
    (TIES, "models:", "model:", "line 3: model: unknown key in a mergekit file, did you mean 'models'?"),
    (TIES, "base_model: base\n", "name: first\n", "line 2: name: unknown key in a mergekit file"),
    (TIES, "models:", "slices: []\nmodels:", "line 3: slices: there are 'models' already: remove one of the two"),
    (
        TIES,
        "base_model: base\n",
        "base_model: base\n---\n",
        "line 4: a second document starts here: put each into a file of its own",
    ),
    ("merge_method: ties\nbase_model: base\n", "base", "base", "models is missing: list what is merged there, or in 'slices'"),
    ("base_model: base\nmodels: [{model: math}]\n", "", "", "merge_method is missing: name one, such as 'merge_method: ties'"),
    (TIES, "ties", "karchers", f"line 1: merge_method: moerge does not have 'karchers'; of mergekit's methods it has {HAS}"),
    (TIES, "ties", "nearswap", "line 3: models: nearswap takes exactly 2, not 3 (math, code, base)"),
    (TIES, "models:", "modules:", "line 3: modules should be a mapping"),
    (
        TIES,
        "base_model: base",
        "base_model: base\ndtype: float64",
        "line 3: dtype should be one of bfloat16, float16, float32, not 'float64'",
    ),
    (TIES, "base_model: base", "base_model: base\nrandom_seed: x", "line 3: random_seed should be a whole number, not 'x'"),
    # models
    (TIES, "- model: code", "- modl: code", "line 6: models[1].modl: unknown key in a mergekit file, did you mean 'model'?"),
    (TIES, "- model: code\n    ", "- ", "line 6: models[1] needs a 'model'"),
    (TIES, "model: code", "model: math", "line 6: models[1]: this model stands here twice: remove one"),
    (TIES, "model: code", "model: 5", "line 6: models[1].model should be a folder or a Hub id, not 5"),
    (TIES, "model: code", "model: a+b+c", "line 6: models[1].model should be a model or model+adapter, not 'a+b+c'"),
    (TIES, "model: code", "model: other+lora", "lora: there is no folder other: check the path"),
    (TIES, "model: code", "model: codes", "codes: there is no folder codes: did you mean 'code'?"),
    (TIES, "base_model: base\n", "", "line 1: merge_method: ties needs a base: name one with 'base_model'"),
    (TIES, "base_model: base", "base_model: base+lora", "base: there is no folder lora: check the path"),
    (TIES, "ties", "slerp", "line 3: models: slerp takes exactly 2, not 3 (math, code, base)"),
    (TIES, "ties", "passthrough", "line 3: models: passthrough takes exactly 1, not 3 (math, code, base)"),
    (SLICES, "task_arithmetic", "model_stock", "line 4: slices[0]: model_stock takes at least 3, not 2 (math, base)"),
    # parameters
    (TIES, "normalize", "normalise", "line 8: parameters.normalise: unknown parameter, did you mean 'normalize'?"),
    (TIES, "weight: 1}", "weigth: 1}", "line 7: models[1].parameters.weigth: unknown parameter, did you mean 'weight'?"),
    (
        TIES,
        "{weight: 1}",
        "{}",
        "line 6: models[1]: ties needs a 'weight', and there is none for 'model.embed_tokens.weight' in code",
    ),
    (
        TIES,
        "{weight: 1}",
        "{weight: [{filter: embed, value: 1}]}",
        "ties needs a 'weight', and there is none for 'model.layers.0.input_layernorm.weight' in code: add one",
    ),
    (TIES, "density: 0.5", "density: half", "line 5: models[0].parameters.density should be a number, not 'half'"),
    (TIES, "density: 0.5", "density: [1, x]", "line 5: models[0].parameters.density[1] should be a number, not 'x'"),
    (TIES, "density: 0.5", "density: .nan", "line 5: models[0].parameters.density should be a number, not nan"),
    (TIES, "normalize: true", "normalize: 2", "line 8: parameters.normalize should be true or false, not 2"),
    (TIES, "normalize: true", "rescale: true", "line 8: parameters.rescale is not available for ties: moerge does not restore"),
    (TIES, "{normalize: true}", "[1]", "line 8: parameters should be a mapping, not [1]"),
    (TIES, "density: 0.5", "density: [{value: 1}, 2]", "parameters.density[1] should have a 'value' like its neighbours"),
    (TIES, "density: 0.5", "density: [{filter: mlp}]", "line 5: models[0].parameters.density[0] needs a 'value'"),
    (TIES, "density: 0.5", "density: [{pattern: a, value: 1}]", "density[0].pattern: unknown key, known: filter, value"),
    (TIES, "density: 0.5", "density: {filter: 3, value: 1}", "density.filter should be a part of tensor names, not 3"),
    (SLICES.replace("task_arithmetic", "slerp"), "weight: 1", "t: 1.5", "line 7: parameters.t should be less than or equal to 1"),
    (
        SLICES.replace("task_arithmetic", "slerp"),
        "weight: 1",
        "weight: 1",
        "line 7: parameters: slerp needs a 't', and there is none",
    ),
    (TIES.replace("ties", "della"), "normalize: true", "epsilon: 0.5", "parameters.epsilon should be below 0.5"),
    # slices
    (SLICES, "layer_range: [0, 2]", "layer_range: [2, 0]", "line 5: slices[0].sources[0].layer_range should be the first layer"),
    (
        SLICES,
        "layer_range: [0, 2]",
        "layer_range: [0, 1]",
        "line 4: slices[0] takes different numbers of layers from its sources",
    ),
    (SLICES, "{model: base", "{model: code", "line 4: slices[0]: task_arithmetic needs a base: list base among the sources"),
    (SLICES, "[0, 2]", "[1, 3]", "slice 1 takes the layers 1 to 2 of math, which has 2 (counted from 0)"),
    (SLICES, "sources:", "sorces:", "line 4: slices[0].sorces: unknown key in a mergekit file, did you mean 'sources'?"),
    (SLICES, "  - sources:", "  - {}\n  - sources:", "line 4: slices[0].sources should be a list of models, not None"),
    # the tokenizer
    (TIES, "base_model: base", "base_model: base\ntokenizer_source: maths", "line 3: tokenizer_source: 'maths' is not a model"),
    (
        TIES,
        "base_model: base",
        "base_model: base\ntokenizer_source: base\ntokenizer: {}",
        "line 4: tokenizer: there is a 'tokenizer_source' already: remove one",
    ),
    (TIES, "base_model: base", "base_model: base\ntokenizer: {tokens: {a: {}}}", "line 3: tokenizer.tokens.a.source is missing"),
    (TIES, "base_model: base", "base_model: base\ntokenizer: {sauce: base}", "tokenizer.sauce: unknown key"),
    # a MoE
    (HIDDEN, "base_model: base", "", "base_model is missing: name the model whose attention, norms and embeddings are taken"),
    (HIDDEN, "gate_mode: hidden", "gate_mode: learned", "line 3: gate_mode should be one of hidden, hidden_avg, hidden_last"),
    (
        HIDDEN,
        "gate_mode: hidden",
        "gate_mod: hidden",
        "line 3: gate_mod: unknown key in a mergekit file, did you mean 'gate_mode'?",
    ),
    (
        HIDDEN,
        "experts_per_token: 1",
        "experts_per_token: 4",
        "line 5: experts_per_token should be from 1 to 3, the number of experts, not 4",
    ),
    (HIDDEN, "dtype: float32", "dtype: int8", "line 4: dtype should be one of bfloat16, float16, float32, not 'int8'"),
    (HIDDEN, "dtype: float32", "shared_experts: [{source_model: math}]", "line 4: shared_experts are not supported"),
    (HIDDEN, "dtype: float32", "architecture: deepseek", "line 4: architecture should be one of mixtral, qwen"),
    (HIDDEN, "source_model: code", "model: code", "line 11: experts[1].model: unknown key in a mergekit file"),
    (HIDDEN, "source_model: code", "noise_scale: 0.1", "line 11: experts[1] needs a 'source_model'"),
    (HIDDEN, '["w10 w11 w12"]', "[]", "line 11: experts[1]: code needs 'positive_prompts', of which 'hidden' gates are made"),
    (HIDDEN, '["w10 w11 w12"]', "w10", "line 12: experts[1].positive_prompts should be a list of texts, not 'w10'"),
    (
        HIDDEN,
        "source_model: code",
        "source_model: other+lora",
        "lora: there is no folder other: check the path",
    ),
    (HIDDEN, "source_model: code", "source_model: code\n    noise_scale: -0.1", "experts[1].noise_scale should not be negative"),
    (HIDDEN, "source_model: code", "source_model: code\n    noise_scale: lots", "experts[1].noise_scale should be a number"),
    (HIDDEN, "source_model: code", "source_model: kode", "kode: there is no folder kode: did you mean 'code'?"),
]


@pytest.mark.parametrize(("text", "old", "new", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_file_is_refused(
    text: str, old: str, new: str, message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    assert old in text
    file = tmp_path / "mergekit.yml"
    changed = text.replace(old, new) if "layer_range: [0, 2]" not in old else text.replace(old, new, 1)
    file.write_text(changed)
    line = refuses(file, tmp_path / "out", message)
    assert line.startswith("moerge: ") and (str(file) in line or "there is no folder" in line)


def test_slices_need_a_known_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.make_models(tmp_path, experts=["math"], config={"model_type": "novel"})
    sources = [{"model": "math", "layer_range": [0, 1]}]
    with pytest.raises(moerge.InputError, match="recipe: slices need a family that moerge knows, and it does not know 'novel'"):
        moerge.plan({"merge_method": "passthrough", "slices": [{"sources": sources}]})


def test_a_damaged_source_of_a_slice_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.llama_config()
    tensors = tiny.llama_tensors(config)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    tiny.write_checkpoint(tmp_path / "math", tensors, config)
    sources = [{"model": "math", "layer_range": [0, 1]}]
    with pytest.raises(moerge.InputError, match=r"math: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        moerge.plan({"merge_method": "passthrough", "slices": [{"sources": sources}]})
