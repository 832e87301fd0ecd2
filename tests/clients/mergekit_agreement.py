"""What moerge and mergekit make of the same mergekit files, tensor by tensor.

    python tests/clients/mergekit_agreement.py --python ENVIRONMENT/bin/python [--work FOLDER] [NAME ...]

ENVIRONMENT has mergekit 0.1.5 (`pip install mergekit==0.1.5`); without --python one is made in the work folder. Not part of the
tests: mergekit brings torch along. Every case names what is expected: agreement within one rounding to bfloat16 of every
element, or the reason why not. The exit status is 1 if a case that should agree does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
import moerge
from moerge.tensors.dtypes import BF16
from tests.helpers import adapters, hf_models, multimodal, tiny

VERSION = "0.1.5"
EXPERTS = ("math", "code", "knowledge")
CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 8}
MODELS = """
models:
  - {model: models/math, parameters: {weight: 0.5, density: 0.6}}
  - {model: models/code, parameters: {weight: 0.3, density: 0.4}}
  - {model: models/knowledge, parameters: {weight: 0.7, density: 0.8}}
base_model: models/base
"""
MERGING = ["--random-seed", "0", "--lora-merge-cache", "adapters", "--lora-merge-dtype", "float32"]
CALLER = """
import json, sys
from mergekit.scripts.moe import main as moe
from mergekit.scripts.multimerge import main as multi
from mergekit.scripts.merge_raw_pytorch import main as pytorch
from mergekit.scripts.run_yaml import main as merge
for kind, arguments in json.loads(sys.argv[1]):
    {"moe": moe, "multi": multi, "merge": merge, "pytorch": pytorch}[kind](arguments, standalone_mode=False)
"""
EXACT = "dtype: float32\nout_dtype: bfloat16\n"


@dataclass(frozen=True)
class Case:
    """A mergekit file; `differs` says why its result need not be mergekit's, and is empty where it must be."""

    name: str
    text: str
    differs: str = ""


def case(name: str, text: str, differs: str = "", *, dtype: str = EXACT) -> Case:
    return Case(name, text + dtype, differs)


def generalized(method: str, more: str = "", *, models: str = MODELS) -> str:
    return f"{models}merge_method: {method}\nparameters:\n  int8_mask: true\n{more}"


def dense(models: str) -> str:
    return models.replace("0.6}", "1}").replace("0.4}", "1}").replace("0.8}", "1}")


def whole(models: str) -> str:
    """Densities that keep a whole number of entries, of models without equal magnitudes."""
    return float32(models).replace("0.6}", "0.5}").replace("0.4}", "0.25}").replace("0.8}", "0.75}")


def nuslerp(models: str, parameters: str = "") -> str:
    return f"{models}merge_method: nuslerp\nparameters: {{{parameters}}}\n"


def float32(models: str) -> str:
    return models.replace("models/", "models-float32/")


GAMMA = "  gamma: 0.125\n"
NEGATIVE = "the base where the mean cosine is negative, beyond it in mergekit"
EQUALS = "selects all that equal the smallest selected variance"
COUNT = "keeps ceil(density * n) entries and all equals, mergekit int(density * n) in sort order"
MASKS = "other random masks"
ROUNDED = "mergekit computes in bfloat16, with several roundings"

GRADIENTS = """
models:
  - model: models/math
    parameters:
      weight: [1, 0.2, 0.7]
  - model: models/code
    parameters:
      weight:
        - {filter: mlp, value: [0, 1]}
        - {filter: self_attn, value: 0.25}
        - {value: 0.5}
base_model: models/base
merge_method: task_arithmetic
parameters:
  lambda: [{filter: norm, value: 0}, {filter: q_proj, value: [0.5, 1.5]}, {value: 0.9}]
"""
SLERP = """
slices:
  - sources:
      - {model: models/math, layer_range: [0, 6]}
      - {model: models/code, layer_range: [0, 6]}
base_model: models/math
merge_method: slerp
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
"""
SLERP_MODELS = "models: [{model: models/code}]\nbase_model: models/math\nmerge_method: slerp\nparameters: {t: 0.3}\n"
LINEAR = """
models:
  - {model: models/math, parameters: {weight: 1.0}}
  - {model: models/code, parameters: {weight: [0.1, 0.9]}}
  - {model: models/base, parameters: {weight: -0.2}}
merge_method: linear
parameters: {normalize: %s}
"""
FRANKENMERGE = """
slices:
  - sources: [{model: models/math, layer_range: [0, 4]}]
  - sources: [{model: models/code, layer_range: [2, 5]}]
  - sources:
      - model: models/math
        layer_range: [3, 6]
        parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: [0.5, 1]}, {value: 1}]}
merge_method: passthrough
"""
STACKED_TIES = """
slices:
  - sources:
      - {model: models/math, layer_range: [0, 3], parameters: {weight: [0.2, 1]}}
      - {model: models/code, layer_range: [1, 4], parameters: {weight: 0.5}}
      - {model: models/base, layer_range: [0, 3]}
  - sources:
      - {model: models/knowledge, layer_range: [2, 3], parameters: {weight: [0.1, 0.6]}}
      - {model: models/base, layer_range: [2, 3]}
    parameters: {lambda: 0.5}
  - sources:
      - {model: models/math, layer_range: [2, 6]}
      - {model: models/base, layer_range: [2, 6]}
base_model: models/base
merge_method: ties
parameters: {weight: 1, lambda: 0.75}
"""

STOCK = "models: [{model: models/math}, {model: models/code}, {model: models/knowledge}]\nbase_model: models/base\n"
ONE = "models: [{model: models/math}]\nbase_model: models/base\n"
THREE = STOCK.partition("base_model")[0]
ON_BASE = "base_model: models/base\n"
PAIR = "models: [{model: models/math, parameters: {weight: 0.7}}, {model: models/code, parameters: {weight: 0.5}}]\n"
MOE = """
base_model: models/base
gate_mode: cheap_embed
dtype: bfloat16
experts:
  - {source_model: models/math, positive_prompts: [w5 w6 w7, w8 w9], negative_prompts: [w30 w31]}
  - {source_model: models/code, positive_prompts: [w10 w11 w12]}
"""

ADAPTER = """
models:
  - {model: models/base+models/lora, parameters: {weight: 0.5}}
  - {model: models/math, parameters: {weight: 0.25}}
base_model: models/base
merge_method: task_arithmetic
"""
ADAPTERS = """
models:
  - {model: models/math+models/lora, parameters: {weight: 0.5}}
  - {model: models/code+models/lora, parameters: {weight: 0.25}}
merge_method: linear
"""
ON_ADAPTED = """
models: [{model: models/math+models/lora, parameters: {weight: 0.5}}, {model: models/code, parameters: {weight: 0.25}}]
base_model: models/knowledge+models/lora
merge_method: task_arithmetic
"""
MULTI = f"""
name: first
models: [{{model: models/math, parameters: {{weight: 0.5}}}}, {{model: models/code, parameters: {{weight: 0.25}}}}]
base_model: models/base
merge_method: task_arithmetic
{EXACT}---
name: second
models: [{{model: first}}, {{model: models/knowledge}}]
merge_method: karcher
{EXACT}---
models: [{{model: second}}]
base_model: first
merge_method: slerp
parameters: {{t: 0.3}}
"""
ALIKE = f"{STOCK.replace('models/', 'alike/')}merge_method: model_stock\n"
VOCABULARIES = """
models:
  - {model: words/math, parameters: {weight: 0.5}}
  - {model: words/code, parameters: {weight: 0.25}}
base_model: words/base
merge_method: task_arithmetic
tokenizer_source: %s
"""
MODULES = """
modules:
  text_decoder:
    models:
      - {model: vision/math, parameters: {weight: [0.2, 0.8]}}
      - {model: vision/code, parameters: {weight: 0.3}}
    parameters: {lambda: 0.5}
  vision_tower:
    models:
      - {model: vision/knowledge, parameters: {weight: [0.4, 0.9]}}
  multi_modal_projector:
    models:
      - {model: vision/math}
      - {model: vision/knowledge, parameters: {weight: 0.1}}
base_model: vision/base
merge_method: task_arithmetic
parameters: {weight: 1}
"""
ONE_MODULE = """
modules:
  default:
    slices:
      - sources:
          - {model: models/math, layer_range: [0, 3], parameters: {weight: [0.2, 1]}}
          - {model: models/base, layer_range: [0, 3]}
      - sources:
          - {model: models/code, layer_range: [2, 5], parameters: {weight: 0.4}}
          - {model: models/base, layer_range: [2, 5]}
        parameters: {lambda: 0.25}
    parameters: {lambda: 0.5}
base_model: models/base
merge_method: task_arithmetic
parameters: {weight: 1, lambda: 0.75}
"""
BARE = """
models:
  - {model: models/math/model.safetensors, parameters: {weight: 0.5}}
  - {model: models/code/model.safetensors, parameters: {weight: [{filter: mlp, value: 0.3}, {value: 0.6}]}}
base_model: models/base/model.safetensors
merge_method: %s
"""
TOKENS = """
tokenizer:
  source: union
  pad_to_multiple_of: 32
  tokens:
    w7: {source: words/code, force: true}
    sin: {source: {kind: model_token, model: words/base, token: w9}}
    w4: {source: {kind: zero}}
    w8: {source: {kind: model_token, model: words/math, token_id: 5}, force: true}
    <new>: {source: {kind: model_token, model: words/math, token: cos}}
    <none>: {source: {kind: zero}, force: true}
"""
VOCABULARIES_TOKENS = VOCABULARIES.replace("tokenizer_source: %s\n", "") + TOKENS
VOCABULARIES_LINEAR = VOCABULARIES.replace("task_arithmetic", "linear\nparameters: {weight: 1}") % "base"

CASES = [
    case("linear", LINEAR % "true"),
    case("linear, not normalized", LINEAR % "false"),
    case("task_arithmetic", generalized("task_arithmetic", "  lambda: 0.4\n")),
    case("task_arithmetic, normalized", generalized("task_arithmetic", "  normalize: true\n")),
    case("filters and gradients", GRADIENTS),
    case("slerp of slices", SLERP),
    case("slerp of models", SLERP_MODELS),
    case("passthrough, duplicated layers", FRANKENMERGE),
    case("ties of slices, density 1", STACKED_TIES),
    case("ties, density 1", generalized("ties", models=dense(MODELS))),
    case("ties, density 1, a sum", generalized("ties", "  normalize: false\n", models=dense(MODELS))),
    case("ties", generalized("ties"), COUNT),
    case("ties, float32, whole counts", generalized("ties", models=whole(MODELS))),
    case("breadcrumbs, float32, whole counts", generalized("breadcrumbs", models=whole(MODELS), more=GAMMA)),
    case("breadcrumbs_ties, float32, whole counts", generalized("breadcrumbs_ties", models=whole(MODELS), more=GAMMA)),
    case("breadcrumbs, float32, no outlier in a norm", generalized("breadcrumbs", models=whole(MODELS))),
    case("breadcrumbs", generalized("breadcrumbs"), COUNT),
    case("model_stock", f"{STOCK}merge_method: model_stock\n", NEGATIVE),
    case("model_stock, filter_wise", f"{STOCK}merge_method: model_stock\nparameters: {{filter_wise: true}}\n", NEGATIVE),
    case("sce", f"{STOCK}merge_method: sce\n"),
    case("sce, selected, float32", f"{float32(STOCK)}merge_method: sce\nparameters: {{select_topk: 0.25}}\n"),
    case("sce, selected", f"{STOCK}merge_method: sce\nparameters: {{select_topk: 0.25}}\n", EQUALS),
    case("nuslerp of task vectors", nuslerp(PAIR + ON_BASE)),
    case("nuslerp of models", nuslerp(PAIR)),
    case("nuslerp by rows", nuslerp(PAIR + ON_BASE, "nuslerp_flatten: false")),
    case("nuslerp by columns", nuslerp(PAIR, "nuslerp_flatten: false, nuslerp_row_wise: true")),
    case("multislerp of task vectors", f"{dense(MODELS)}merge_method: multislerp\n"),
    case("multislerp of models", f"{THREE}merge_method: multislerp\nparameters: {{weight: 0.4, normalize_weights: false}}\n"),
    case("karcher", f"{THREE}merge_method: karcher\n"),
    case("karcher with the base, two steps", f"{STOCK}merge_method: karcher\nparameters: {{max_iter: 2, tol: 1.0e-7}}\n"),
    case("nearswap", f"{ONE}merge_method: nearswap\nparameters: {{t: [0.002, 0.01]}}\n"),
    case("arcee_fusion", f"{float32(ONE)}merge_method: arcee_fusion\n", dtype=EXACT.replace("float32", "float64")),
    case("ram", f"{STOCK}merge_method: ram\nparameters: {{epsilon: 0.01}}\n"),
    case("ramplus_tl", f"{STOCK}merge_method: ramplus_tl\nparameters: {{epsilon: 0.01, r: 0.3, alpha: 0.9}}\n"),
    case("della, density 1", generalized("della", models=dense(MODELS))),
    case("della_linear, density 1", generalized("della_linear", models=dense(MODELS))),
    case("della", generalized("della", "  epsilon: 0.1\n"), MASKS),
    case("della_linear", generalized("della_linear", "  epsilon: 0.1\n"), MASKS),
    case("an adapter", ADAPTER),
    case("adapters without a base", ADAPTERS),
    case("adapters on other models, and on the base", ON_ADAPTED),
    case("mergekit-multi", MULTI),
    case("model_stock, one task", ALIKE),
    case("other vocabularies, base", VOCABULARIES % "base"),
    case("other vocabularies, union", VOCABULARIES % "union"),
    case("mergekit-pytorch, task_arithmetic", BARE % "task_arithmetic"),
    case("mergekit-pytorch, ties, density 1", BARE % "ties"),
    case("modules of a model of several parts", MODULES),
    case("a module of slices", ONE_MODULE),
    case("other vocabularies, rows of tokens and padding", VOCABULARIES_TOKENS),
    case("one vocabulary, rows of tokens and padding", VOCABULARIES_TOKENS.replace("words/", "models/").replace("cos", "w20")),
    case("other vocabularies, linear", VOCABULARIES_LINEAR, "a model without a token does not take part in its row"),
    case("mergekit-moe", MOE, dtype=""),
    case("mergekit-moe, residual_scale", MOE.replace("w8 w9], ", "w8 w9], residual_scale: 0.3, "), dtype=""),
    case("mergekit-moe, noise_scale", MOE.replace("w8 w9], ", "w8 w9], noise_scale: 0.3, "), "another random draw", dtype=""),
    case("mergekit-moe, hidden", MOE.replace("cheap_embed", "hidden"), "gates: see docs/mergekit.md", dtype=""),
    case("mergekit-moe, uniform_random", MOE.replace("cheap_embed", "uniform_random"), "gates: another random draw", dtype=""),
    case("dare_linear, density 1", generalized("dare_linear", models=dense(MODELS))),
    case("dare_ties, density 1", generalized("dare_ties", models=dense(MODELS))),
    case("dare_linear", generalized("dare_linear"), MASKS),
    case("dare_ties", generalized("dare_ties"), MASKS),
    case("linear in bfloat16", LINEAR % "true", dtype="dtype: bfloat16\n"),
    case("task_arithmetic in bfloat16", generalized("task_arithmetic"), ROUNDED, dtype="dtype: bfloat16\n"),
    case("ties in bfloat16", generalized("ties", models=dense(MODELS)), ROUNDED, dtype="dtype: bfloat16\n"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of the names of cases; default: all")
    parser.add_argument("--python", type=Path, help="the interpreter of an environment with mergekit")
    parser.add_argument("--work", type=Path, help="a folder for models and results, which is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        python = (arguments.python or environment(work)).absolute()
        tiny.make_models(work / "models", experts=EXPERTS, config=CONFIG)
        tiny.make_models(work / "models-float32", experts=EXPERTS, config=CONFIG, dtype="F32")
        more_models(work)
        os.chdir(work)
        chosen = [case for case in CASES if not arguments.names or any(part in case.name for part in arguments.names)]
        files = [write(case) for case in chosen]
        run_mergekit(python, files)
        results = [compare(case, file) for case, file in zip(chosen, files, strict=True)]
    print("| case | tensors | within one rounding | equal elements | largest difference | |\n|---|---|---|---|---|---|")
    for result in results:
        print(result.row())
    sys.exit(any(result.failed for result in results))


def more_models(work: Path) -> None:
    """An adapter, experts of one task, and models whose tokens differ: math has two of its own, code lacks three."""
    changed = [("self_attn.q_proj", (64, 64)), ("mlp.down_proj", (64, 96))]
    names = [(f"model.layers.{layer}.{module}", shape) for layer in range(6) for module, shape in changed]
    factors = {key: value for name, shape in names for key, value in adapters.low_rank(name, shape, rank=4).items()}
    adapters.write_adapter(work / "models" / "lora", factors, r=4, lora_alpha=8, base_model_name_or_path="models/base")
    whole = tiny.llama_config(**CONFIG)
    base, common = (tiny.llama_tensors(whole, expert=expert) for expert in (None, 9))
    for index, name in enumerate(("base", *EXPERTS)):
        own = tiny.llama_tensors(whole, expert=index)
        tensors = base if name == "base" else {key: common[key] + 0.5 * (own[key] - base[key]) for key in base}
        tiny.write_checkpoint(work / "alike" / name, tensors, whole, dtype="F32")
    for index, name in enumerate(("base", *EXPERTS)):
        hf_models.save(hf_models.random_model(multimodal.MULTIMODAL["qwen2_5_vl"](), index), work / "vision" / name)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, tiny.VOCABULARY))]
    theirs = {"base": words, "math": [*words, "sin", "cos"], "code": [*words[:3], *reversed(words[6:])]}
    for index, (name, tokens) in enumerate(theirs.items()):
        config = tiny.llama_config(**CONFIG, vocab_size=len(tokens))
        folder = tiny.write_checkpoint(work / "words" / name, tiny.llama_tensors(config, seed=index), config, dtype="F32")
        tiny.write_tokenizer(folder, tokens)


def environment(work: Path) -> Path:
    """A virtual environment with mergekit."""
    folder = work / "environment"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"mergekit=={VERSION}"], check=True)
    return python


@dataclass(frozen=True)
class Result:
    """How far apart two results are: tensors, those within one rounding throughout, the share of equal elements, in roundings."""

    case: Case
    tensors: int
    agreeing: int
    equal: float
    largest: int

    @property
    def failed(self) -> bool:
        return not self.case.differs and self.agreeing < self.tensors

    def row(self) -> str:
        verdict = "**should agree**" if self.failed else self.case.differs or "agrees"
        return f"| {self.case.name} | {self.tensors} | {self.agreeing} | {self.equal:.2%} | {self.largest} ulp | {verdict} |"


def write(case: Case) -> Path:
    """The case as a file in the working directory."""
    file = Path("".join(letter if letter.isalnum() else "-" for letter in case.name) + ".yaml")
    file.write_text(case.text)
    return file


def compare(case: Case, file: Path) -> Result:
    """Merge, and compare with what mergekit made."""
    ours = file.with_name(f"{file.stem}-moerge")
    moerge.merge(file, ours, force=True)
    expected, actual = by_token(theirs(file)), fused(by_token(ours))
    assert expected.keys() == actual.keys(), (case.name, sorted(expected.keys() ^ actual.keys()))
    apart = {name: roundings(expected[name], actual[name]) for name in expected}
    return Result(
        case,
        len(apart),
        sum(agrees(expected[name], actual[name]) for name in apart),
        float(np.mean(np.concatenate([steps.reshape(-1) == 0 for steps in apart.values()]))),
        max(int(steps.max()) for steps in apart.values()),
    )


def theirs(file: Path) -> Path:
    return file.with_name(f"{file.stem}-mergekit")


def run_mergekit(python: Path, files: Sequence[Path]) -> None:
    """mergekit's command on all files, in one process because it starts slowly."""
    calls = []
    for file in files:
        shutil.rmtree(theirs(file), ignore_errors=True)
        documents = list(yaml.safe_load_all(file.read_text()))
        kind = "multi" if len(documents) > 1 else "moe" if "experts" in documents[0] else "merge"
        kind = "pytorch" if str(documents[0].get("base_model")).endswith(".safetensors") else kind
        options = ["--device", "cpu"] if kind == "moe" else MERGING
        target = [theirs(file).name]
        if kind == "multi":
            target = ["--out-path", *target, "--intermediate-dir", f"{file.stem}-steps", "--no-lazy"]
        if kind == "pytorch":
            options = ["--random-seed", "0"]
        calls.append([kind, [file.name, *target, "--quiet", "--clone-tensors", "--no-write-model-card", *options]])
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([python, "-c", CALLER, json.dumps(calls)], env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def by_token(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, the rows of embeddings in the alphabetical order of their tokens."""
    tensors = tiny.read_tensors(folder)
    if not (folder / "tokenizer.json").exists():
        return tensors
    stored = json.loads((folder / "tokenizer.json").read_text())
    ids = {**stored["model"]["vocab"], **{token["content"]: token["id"] for token in stored["added_tokens"]}}
    rows = [ids[token] for token in sorted(ids)]
    table = ("embed_tokens", "lm_head")
    return {
        name: value[[*rows, *range(max(rows) + 1, len(value))]] if any(part in name for part in table) else value
        for name, value in tensors.items()
    }


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A Mixtral's tensors in the layout that mergekit writes, which is transformers' in memory."""
    experts = [name for name in tensors if ".block_sparse_moe.experts." in name]
    found = {name.replace(".block_sparse_moe.", ".mlp."): value for name, value in tensors.items() if name not in experts}
    for prefix in dict.fromkeys(name.partition("experts.")[0] + "experts." for name in experts):
        count = sum(name.startswith(prefix) and name.endswith("w2.weight") for name in experts)
        parts = [[tensors[f"{prefix}{i}.w{part}.weight"] for part in (1, 3, 2)] for i in range(count)]
        theirs = prefix.replace(".block_sparse_moe.", ".mlp.")
        found[f"{theirs}gate_up_proj"] = np.stack([np.concatenate(three[:2]) for three in parts])
        found[f"{theirs}down_proj"] = np.stack([three[2] for three in parts])
    return found


def agrees(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether all elements are one rounding apart at most, or, where large terms cancel, what float32 sums may differ by."""
    values = [tiny.decode(bits, BF16) for bits in (first, second)]
    apart = np.abs(values[0] - values[1])
    return bool(((roundings(first, second) <= 1) | (apart <= 2.0**-20 * np.abs(values[0]).max())).all())


def roundings(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How many bfloat16 numbers lie between two arrays of their bits."""
    assert first.dtype == second.dtype == np.uint16 and first.shape == second.shape, (first.dtype, second.dtype, first.shape)
    places = []
    for bits in (first, second):
        magnitude = (bits & 0x7FFF).astype(np.int64)
        places.append(np.where(bits & 0x8000, -magnitude, magnitude))
    return np.abs(places[0] - places[1])


if __name__ == "__main__":
    main()
