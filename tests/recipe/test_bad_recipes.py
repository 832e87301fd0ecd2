"""Everything that can be wrong with a recipe: exit code 2, one line that names file, line and key, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import make_models

MODELS = "base: base\nexperts: {math: math, code: code}\n"
BAD = {
    # misspelled keys, at every level
    "expertz: {math: math}\n": ["line 1: expertz: unknown key, did you mean 'experts'?"],
    MODELS + "seed: 1\n": ["line 3: seed: unknown key, known: base, c"],
    MODELS + "1: 2\n": ["line 3: 1: unknown key"],
    MODELS + "merge:\n  methd: ties\n": ["line 4: merge.methd: unknown key for average, did you mean 'method'?"],
    MODELS + "merge:\n  method: ties\n  densty: 0.5\n": ["line 5: merge.densty: unknown key for ties, did you mean 'density'?"],
    MODELS + "merge: {density: 0.5}\n": ["line 3: merge.density: unknown key for average, known: method, overrides, seed"],
    MODELS + "merge:\n  overrides:\n    - match: ffn\n      method: ties\n      scal: 1\n": [
        "line 7: merge.overrides[0].scal: unknown key for ties, did you mean 'scale'?"
    ],
    MODELS + "moe:\n  topk: 2\n": ["line 4: moe.topk: unknown key, did you mean 'top_k'?"],
    MODELS + "moe:\n  router:\n    sed: 1\n": ["line 5: moe.router.sed: unknown key, did you mean 'seed'?"],
    "base: base\nexperts:\n  math: {modle: math}\n": ["line 3: experts.math.modle: unknown key, did you mean 'model'?"],
    "base: base\nexperts:\n  math: {model: math, wieght: 2}\n": ["line 3: experts.math.wieght", "did you mean 'weight'?"],
    "merge: {<<: {method: ties}, densty: 1}\n" + MODELS: ["line 1: merge.densty: unknown key for ties"],
    # unknown names
    MODELS + "merge: {method: tiess}\n": ["line 3: merge.method: unknown merge method 'tiess': did you mean 'ties'?"],
    MODELS + "merge: {method: quux}\n": ["unknown merge method 'quux': known: arcee_fusion, average, "],
    MODELS + "merge: {method: [ties]}\n": ["line 3: merge.method: unknown merge method"],
    MODELS + "moe: {router: {kind: randm}}\n": ["line 3: moe.router.kind: unknown router kind 'randm': did you mean 'random'?"],
    MODELS + "moe: {format: mixtrl}\n": ["line 3: moe.format: unknown MoE format 'mixtrl': did you mean 'mixtral'?"],
    MODELS + "moe: {separate: [attention]}\n": ["line 3: moe.separate[0]: token-routed models keep only 'ffn' separate"],
    MODELS + "dtype: bf16\n": ["line 3: dtype should be 'float32', 'float16', 'bfloat16' or 'float8', not 'bf16'"],
    MODELS + "tokenizer: mth\n": ["line 3: tokenizer: 'mth' is not a model of this recipe, did you mean 'math'?"],
    MODELS + "config: cod\n": ["line 3: config: 'cod' is not a model of this recipe, did you mean 'code'?"],
    "experts: {math: math, union: code}\ntokenizer: union\n": [
        "line 1: experts.union: 'tokenizer: union' means the tokens of all models; call this expert something else"
    ],
    MODELS + "config: union\n": ["line 3: config: 'union' is not a model of this recipe, known: base, code, math"],
    # duplicate keys
    MODELS + "base: code\n": ["line 3: base appears twice (first in line 1): remove one"],
    "base: base\nexperts:\n  math: math\n  math: code\n": ["line 4: experts.math appears twice (first in line 3)"],
    MODELS + "merge:\n  overrides:\n    - {match: ffn, match: norm}\n": ["line 5: merge.overrides[0].match appears twice"],
    # not YAML, or not a recipe
    "": ["should be a mapping with keys such as 'experts' and 'merge'"],
    "- a\n- b\n": ["should be a mapping"],
    "just text": ["should be a mapping"],
    "base: base\nexperts: [\n": ["line 3: not valid YAML: expected the node content, but found '<stream end>'"],
    "\tbase: x": ["line 1: not valid YAML: found character '\\t' that cannot start any token"],
    "base: !!python/object:os.system {}\n": ["line 1: not valid YAML: could not determine a constructor"],
    "? [a]\n: b\n": ["line 1: not valid YAML: found unhashable key"],
    "base: *nowhere\n": ["line 1: not valid YAML: found undefined alias 'nowhere'"],
    # wrong types
    "base: 5\nexperts: {math: math}\n": ["line 1: base should be text, not 5"],
    "base: ''\nexperts: {math: math}\n": ["line 1: base should not be empty"],
    "base: base\nexperts: [math, code]\n": ["line 2: experts should be a mapping, not ['math', 'code']"],
    "base: base\nexperts: {math: [a]}\n": ["line 2: experts.math should be a mapping, not ['a']"],
    "base: base\nexperts: {1: math}\n": ["line 2: experts: the name 1 should be text"],
    "base: base\nexperts: {'my expert': math}\n": ["experts: the name 'my expert' should be made of letters, digits"],
    "base: base\nexperts: {math: {model: math, weight: heavy}}\n": [
        "line 2: experts.math.weight should be a number, not 'heavy'"
    ],
    "base: base\nexperts: {math: {model: math, weight: 1e3}}\n": [
        "should be a number, not '1e3', which YAML takes for text: it wants a point and a sign, as in 1.0e+30"
    ],
    "base: base\nexperts: {math: {model: math, weight: 1.0e+39}}\n": ["experts.math.weight should be less than or equal to"],
    MODELS + "merge: {method: ties, scale: -1.0e+300}\n": ["line 3: merge.scale should be greater than or equal to -1"],
    "base: base\nexperts: {a: {model: math, weight: 0.1}, b: {model: code, weight: 0.2}, c: {model: math, weight: -0.3}}\n"
    "merge: {method: linear}\n": ["line 2: experts: the weights sum to zero, so they cannot be normalized"],
    "base: base\nexperts: {math: {model: math, weight: 1.0e-46}}\nmerge: {method: linear}\n": ["the weights sum to zero"],
    MODELS + "merge: {overrides: ''}\n": ["line 3: merge.overrides should be a list of mappings"],
    MODELS + "merge: {overrides: [{match: ffn, weights: 0}]}\n": [
        "line 3: merge.overrides[0].weights should be a mapping, not 0"
    ],
    MODELS + "merge: ties\n": ["line 3: merge should be a mapping, not 'ties'"],
    MODELS + "merge: {overrides: {match: ffn}}\n": ["line 3: merge.overrides should be a list of mappings"],
    MODELS + "merge: {overrides: [ffn]}\n": ["line 3: merge.overrides[0] should be a mapping, not 'ffn'"],
    MODELS + "merge: {overrides: [{mach: ffn}]}\n": ["line 3: merge.overrides[0] needs a 'match'"],
    MODELS + "merge: {overrides: [{match: 5}]}\n": ["line 3: merge.overrides[0] needs a 'match'"],
    MODELS + "merge: {seed: x}\n": ["line 3: merge.seed should be a whole number, not 'x'"],
    MODELS + "merge: {seed: true}\n": ["line 3: merge.seed should be a whole number, not True"],
    MODELS + "merge: {method: linear, normalize: 1}\n": ["line 3: merge.normalize should be true or false, not 1"],
    MODELS + "moe: true\n": ["line 3: moe should be a mapping, not True"],
    MODELS + "moe: {router: random}\n": ["line 3: moe.router should be a mapping, not 'random'"],
    MODELS + "moe: {top_k: two}\n": ["line 3: moe.top_k should be a whole number, not 'two'"],
    MODELS + "moe: {include_base: maybe}\n": ["line 3: moe.include_base should be true or false, not 'maybe'"],
    MODELS + "moe: {router: {seed: x}}\n": ["line 3: moe.router.seed should be a whole number, not 'x'"],
    # values out of range
    MODELS + "merge: {method: ties, density: 0}\n": ["line 3: merge.density should be greater than 0, not 0"],
    MODELS + "merge: {method: ties, density: 1.5}\n": ["line 3: merge.density should be less than or equal to 1, not 1.5"],
    MODELS + "merge: {method: ties, density: .nan}\n": ["line 3: merge.density should be a finite number, not nan"],
    MODELS + "merge: {method: ties, density: '0.5'}\n": ["line 3: merge.density should be a number, not '0.5'"],
    MODELS + "merge: {method: ties, density: true}\n": ["line 3: merge.density should be a number, not True"],
    MODELS + "merge: {method: dare, density: -0.1}\n": ["line 3: merge.density should be greater than 0, not -0.1"],
    MODELS + "merge: {method: task_arithmetic, scale: .inf}\n": ["line 3: merge.scale should be a finite number, not inf"],
    MODELS + "merge: {method: ties, scope: layer}\n": ["line 3: merge.scope should be 'tensor' or 'model', not 'layer'"],
    MODELS + "merge: {method: slerp, t: 1.01}\n": ["line 3: merge.t should be less than or equal to 1, not 1.01"],
    MODELS + "moe: {top_k: 0}\n": ["line 3: moe.top_k should be greater than or equal to 1, not 0"],
    MODELS + "moe: {top_k: 4}\n": ["line 3: moe.top_k is 4, but there are only 3 experts"],
    MODELS + "moe: {include_base: false, top_k: 3}\n": ["moe.top_k is 3, but there are only 2 experts"],
    MODELS + "moe: {separate: []}\n": ["line 3: moe.separate should not be empty"],
    MODELS + "moe: {router: {std: -1}}\n": ["line 3: moe.router.std should be greater than 0, not -1"],
    "base: base\nexperts: {math: {model: math, weight: .nan}}\n": ["experts.math.weight should be a finite number, not nan"],
    "base: base\nexperts: {math: {model: math, weight: .inf}}\n": ["experts.math.weight should be a finite number, not inf"],
    # parts that contradict each other
    "base: base\n": ["experts is missing"],
    "experts: {}\n": ["line 1: experts should not be empty"],
    "experts:\n": ["line 1: experts should be a mapping, not None"],
    "base: base\nexperts: {math: }\n": ["line 2: experts.math should be a mapping, not None"],
    "base: base\nexperts: {math: {weight: 1}}\n": ["line 2: experts.math.model is missing"],
    "base: base\nexperts: {base: math}\n": ["line 2: experts.base: 'base' is the name of the common ancestor"],
    "base: base\nexperts: {math: {model: math, weight: 2}, code: code}\n": [
        "line 2: experts.math has a weight, which average ignores: use 'linear', or remove it"
    ],
    "base: base\nexperts:\n  math: {model: math, weight: 1}\n  code: {model: code, weight: -1}\nmerge: {method: linear}\n": [
        "line 2: experts: the weights sum to zero, so they cannot be normalized"
    ],
    "experts: {math: math, code: code}\nmerge: {method: ties}\n": [
        "line 2: merge: ties works on task vectors (expert minus base), so the recipe needs a 'base'"
    ],
    "experts: {math: math, code: code}\nmerge: {overrides: [{match: ffn, method: dare}]}\n": [
        "dare works on task vectors (expert minus base), so the recipe needs a 'base'"
    ],
    "experts: {math: math, code: code}\nmoe: {include_base: true}\n": [
        "line 2: moe.include_base is true, so the recipe needs a 'base'"
    ],
    "experts: {math: math}\nmoe: {top_k: 1}\n": ["line 1: experts: a MoE needs at least two experts"],
    "base: base\nexperts: {math: math, code: code, more: knowledge}\nmerge: {method: slerp}\n": [
        "slerp merges exactly 2 models, not 3 (math, code, more)"
    ],
    MODELS + "merge: {overrides: [{match: attn, method: ties}]}\n": [
        "line 3: merge.overrides: 'attn' matches no tensor that is merged, known: attention.k, attention.o"
    ],
    MODELS + "merge: {overrides: [{match: ffn.dwn, method: ties}]}\n": [
        "'ffn.dwn' matches no tensor",
        "did you mean 'ffn.down'?",
    ],
    MODELS + "merge: {overrides: [{match: layers.2-9, method: ties}]}\n": ["'layers.2-9' matches no tensor that is merged"],
    MODELS + "moe: {}\nmerge:\n  overrides:\n  - match: attention\n    method: ties\n  - match: ffn\n    method: ties\n": [
        "line 8: merge.overrides: 'ffn' matches no tensor that is merged"
    ],
    # models that are not there
    "base: bass\nexperts: {math: math}\n": ["base: there is no folder", "bass: did you mean 'base'?"],
    "base: ./zzz\nexperts: {math: math}\n": ["base: there is no folder", "zzz: check the path"],
    "base: base/model.safetensors\nexperts: {math: math}\n": ["is a file: name the checkpoint's folder instead"],
    "base: ~nobody-here/x\nexperts: {math: math}\n": ["base: there is no model '~nobody-here/x'"],
    f"base: {'a' * 3000}\nexperts: {{math: math}}\n": ["base: there is no model 'aaa", "File name too long"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.mark.parametrize("text", BAD)
def test_a_bad_recipe_is_refused(models: Path, tmp_path: Path, text: str) -> None:
    recipe = models / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    message = refuses(recipe, tmp_path / "out", *BAD[text])
    in_recipe = not any(word in message for word in ("there is no", "is a file"))
    assert (str(recipe) in message) == in_recipe  # the file is named wherever the recipe itself is at fault
    planned = moerge("plan", recipe)
    assert (planned.code, planned.out, planned.err.strip()) == (2, "", message)


def test_a_missing_recipe(tmp_path: Path) -> None:
    refuses(tmp_path / "recipe.yaml", tmp_path / "out", f"there is no recipe {tmp_path / 'recipe.yaml'}: check the path")


def test_a_folder_or_binary_file_as_recipe(tmp_path: Path) -> None:
    refuses(tmp_path, tmp_path / "out", f"cannot read {tmp_path}: Is a directory")
    (tmp_path / "recipe.yaml").write_bytes(b"\x80\x81")
    refuses(tmp_path / "recipe.yaml", tmp_path / "out", "recipe.yaml is not UTF-8 text")


def test_aliases_that_explode(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    refuses(tmp_path / "recipe.yaml", tmp_path / "out", "more than 100,000 entries once its aliases are expanded")


def test_merge_keys_that_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12))]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    refuses(tmp_path / "recipe.yaml", tmp_path / "out", "more than 100,000 entries once its aliases are expanded")


def test_an_alias_that_contains_itself(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("experts: &a {x: *a}\n")
    refuses(tmp_path / "recipe.yaml", tmp_path / "out", "nested too deeply, or an alias in it contains itself")


def test_deep_nesting(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("experts: " + "[" * 5000)
    refuses(tmp_path / "recipe.yaml", tmp_path / "out", "nested too deeply")
