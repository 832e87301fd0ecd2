"""What `--for CLIENT` says before a merge: every limit in the table is met by one model and missed by a near one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moerge as package
from moerge import InputError
from moerge.architecture import family_of
from moerge.architecture.config import portable_config
from moerge.clients import Finding, Result, check_folder, check_result, clients
from moerge.clients.limits import LIMITS, RUNS, VERSIONS, Limit
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import edit_config, make_models, write_json, write_recipe

BYTE_LEVEL = json.dumps({"model": {"type": "BPE"}}).encode()
FALLBACK = json.dumps({"model": {"type": "BPE", "byte_fallback": True}}).encode()
UNIGRAM = json.dumps({"model": {"type": "Unigram"}}).encode()
SENTENCEPIECE = {"tokenizer.model": b""}
DENSE = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128, "vocab_size": 99, "num_hidden_layers": 2}
MOE = {**DENSE, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


GELU = (
    "computes GELU approximately in this architecture, so probabilities differ by up to about 3e-4: "
    "choose another client where that matters"
)


def result(model_type: str, *, files: dict[str, bytes] | None = None, joined: bool = False, **config: Any) -> Result:
    sizes = MOE if model_type in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe") else DENSE
    return Result.of({**sizes, "model_type": model_type, **config}, SENTENCEPIECE if files is None else files, joined=joined)


CASES: list[tuple[str, str, Result, Result]] = [
    (
        "llama.cpp",
        "scales a Gemma's attention by the width of its heads, whatever `query_pre_attn_scalar` says: choose another client",
        result("gemma2", head_dim=16, query_pre_attn_scalar=256),
        result("gemma2", head_dim=32, query_pre_attn_scalar=16, num_hidden_layers=46),
    ),
    (
        "llama.cpp",
        "expects GPT-2's feed-forward layers to be four times as wide as the model: choose another client",
        result("gpt2", n_inner=128),
        result("gpt2", n_inner=256),
    ),
    ("llama.cpp", GELU, result("gpt_neox"), result("phi3")),
    (
        "llama.cpp",
        "reads a Gemma's tokenizer from a tokenizer.model only: name a model that has one with `tokenizer`",
        result("gemma", files={"tokenizer.json": FALLBACK}),
        result("gemma3_text", files={"tokenizer.json": FALLBACK}, head_dim=16, query_pre_attn_scalar=16, sliding_window=128),
    ),
    (
        "llama.cpp",
        "reads a Phi-3's tokenizer from a tokenizer.model, or from GPT-2's files where `tokenizer_class` says so: "
        "name a model that has them with `tokenizer`",
        result("phi3", files={"tokenizer.json": FALLBACK, "tokenizer_config.json": b"{}"}),
        result("phi3", files={"tokenizer.json": FALLBACK, "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'}),
    ),
    (
        "llama.cpp",
        "always renormalises the chosen experts' probabilities in Qwen3-MoE, and this model does not: "
        "set moe.top_k to the number of experts",
        result("qwen3_moe", norm_topk_prob=False),
        result("qwen3_moe", norm_topk_prob=True),
    ),
    (
        "llama.cpp",
        "never renormalises the chosen experts' probabilities in Qwen2-MoE and OLMoE, and this model does: "
        "set moe.top_k to the number of experts",
        result("qwen2_moe", norm_topk_prob=True),
        result("qwen2_moe", norm_topk_prob=True, num_experts_per_tok=4),
    ),
    (
        "llama.cpp",
        "reads no Qwen2-MoE or OLMoE whose embedding and head are tied: leave out `moe` for a dense model",
        result("olmoe", tie_word_embeddings=True),
        result("qwen3_moe", tie_word_embeddings=True, norm_topk_prob=True),
    ),
    (
        "llama.cpp",
        "expects heads that together are as wide as the model in this architecture: choose another client",
        result("granite", head_dim=32),
        result("llama", head_dim=32),
    ),
    (
        "llama.cpp",
        "ignores the sliding window, so that texts longer than it come out differently: "
        "keep texts shorter than `sliding_window`, or choose another client",
        result("mixtral", sliding_window=16),
        result("mixtral", sliding_window=128),
    ),
    (
        "llama.cpp",
        "ignores dynamic rope scaling: keep texts shorter than `max_position_embeddings`, or choose another client",
        result("llama", rope_scaling={"type": "dynamic", "factor": 2.0}),
        result("llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ),
    (
        "llama.cpp",
        "computes SiLU in this architecture, whatever `hidden_act` says: choose another client",
        result("llama", hidden_act="gelu"),
        result("gemma", hidden_act="gelu"),
    ),
    (
        "llama.cpp",
        "keeps the tokenizer in the model file, and this model has none: name a model that has one with `tokenizer`",
        result("llama", files={}),
        result("llama"),
    ),
    (
        "llama.cpp",
        "has byte-pair and SentencePiece tokenizers only: "
        "name a model with a tokenizer.model or a BPE tokenizer.json with `tokenizer`",
        result("llama", files={"tokenizer.json": UNIGRAM}),
        result("llama", files={"tokenizer.json": UNIGRAM, **SENTENCEPIECE}),
    ),
    (
        "llama.cpp",
        "recognises byte-level BPE tokenizers by a hash, and may refuse one whose vocabulary was joined: "
        "use `tokenizer: base`, or give the converter the pre-tokenizer's name",
        result("llama", files={"tokenizer.json": BYTE_LEVEL}, joined=True),
        result("llama", files={"tokenizer.json": FALLBACK}, joined=True),
    ),
    (
        "llama.cpp",
        "recognises byte-level BPE tokenizers by a hash: its converter refuses one that you trained yourself: "
        "give the converter the pre-tokenizer's name",
        result("llama", files={"vocab.json": b"{}", "merges.txt": b""}),
        result("llama", files={"tokenizer.json": FALLBACK}),
    ),
    (
        "openvino",
        "exports a Gemma with transformers 5.0 or older only: install that for the export",
        result("gemma2"),
        result("phi3"),
    ),
    (
        "vllm",
        "needs --skip-tokenizer-init for a model without a tokenizer: name a model that has one with `tokenizer`",
        result("llama", files={"tokenizer.json": b"no JSON"}),
        result("llama", files={"tokenizer.json": UNIGRAM}),
    ),
    ("transformers-4", "needs version 4.51 or newer for Qwen3: choose another client", result("qwen3"), result("qwen2")),
    *(
        (
            client,
            f'leaves out Gemma 2\'s soft cap of attention scores by default{versions}: load it with attn_implementation="eager"',
            result("gemma2"),
            result("gemma3_text"),
        )
        for client, versions in (("transformers-4", ""), ("transformers", " in version 5.5, and not in 5.23"))
    ),
    (
        "transformers-4",
        "expects heads that together are as wide as the model in GraniteMoe: choose another client",
        result("granitemoe", head_dim=32),
        result("granitemoe"),
    ),
    (
        "transformers-4",
        "accepts linear and dynamic rope scaling only in OLMo 2: choose another client",
        result("olmo2", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        result("olmo2", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ),
    (
        "transformers-4",
        "knows no `layer_types` in Qwen2-MoE, and has a sliding window in other layers: choose another client",
        result("qwen2_moe", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        result("qwen2_moe", sliding_window=8),
    ),
    (
        "transformers-4",
        "needs a late version for yarn: 4.57 computes it as version 5 does, 4.50 did not: "
        "choose another client for older versions",
        result("llama", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        result("llama", rope_scaling={"rope_type": "llama3", "factor": 2.0}),
    ),
    ("transformers-4", "needs version 4.57 or newer for FlexOlmo: choose another client", result("flex_olmo"), result("olmo2")),
    (
        "transformers",
        "needs version 5.5 or newer, and trust_remote_code=True where moerge is not installed: "
        "choose a native moe.format for older versions",
        result("moerge"),
        result("llama"),
    ),
]


def without_gelu(findings: list[Finding], said: str) -> list[Finding]:
    """Findings but for the one that every model with GELU has, unless it is what is tested."""
    return [finding for finding in findings if said == GELU or not finding.sentence.endswith(GELU)]


def sentence(limit: Limit) -> str:
    return f"{limit.client} {limit.what}: {limit.instead}"


@pytest.mark.parametrize(
    ("client", "said", "meets", "misses"), CASES, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_every_limit(client: str, said: str, meets: Result, misses: Result) -> None:
    effect = next(limit.effect for limit in LIMITS if sentence(limit) == f"{client} {said}")
    assert without_gelu(check_result(meets, client), said) == [Finding(client, effect, f"{client} {said}")]
    assert without_gelu(check_result(misses, client), said) == []


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    rows = [f"| {limit.effect} | {limit.what} | {limit.instead}" for limit in LIMITS]
    assert [row for row in rows if row not in page] == []
    assert [name for client, types in RUNS.items() for name in (client, *types) if f"`{name}`" not in page] == []


def test_the_table_is_all_tested() -> None:
    assert {sentence(limit) for limit in LIMITS} == {f"{client} {said}" for client, said, *_ in CASES}
    assert set(RUNS) == set(VERSIONS) == {limit.client for limit in LIMITS} == set(clients())


@pytest.mark.parametrize(
    ("client", "model_type", "said"),
    [
        (
            "llama.cpp",
            "flex_olmo",
            "llama.cpp does not run flex_olmo models: use transformers or transformers-4 or vllm instead, "
            "or leave out `moe` for a dense model",
        ),
        (
            "openvino",
            "olmoe",
            "openvino does not run olmoe models: use llama.cpp or transformers or transformers-4 or vllm instead",
        ),
        (
            "vllm",
            "moerge",
            "vllm does not run moerge's own architecture, only transformers 5.5 and newer do: "
            "choose a native moe.format for token-routed experts, or leave out `moe` for a dense model",
        ),
    ],
)
def test_formats_that_a_client_does_not_run(client: str, model_type: str, said: str) -> None:
    found = check_result(result(model_type, num_local_experts=4 if model_type == "flex_olmo" else 0), client)
    assert found == [Finding(client, "cannot", said)]


def test_gpt2_has_the_key_that_the_converter_reads() -> None:
    written = portable_config(
        {"model_type": "gpt2", "n_embd": 8, "n_positions": 64}, family=family_of({"model_type": "gpt2"}), dtype="float32"
    )
    assert (written["n_ctx"], written["n_positions"]) == (64, 64)


def test_windows_that_reach_everywhere_or_are_switched_off() -> None:
    window = {"sliding_window": 16, "model_type": "qwen2", **DENSE}
    full = ["full_attention"] * 2
    limited = [
        Result.of({**window, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, SENTENCEPIECE),
        Result.of({**window, "model_type": "mistral"}, SENTENCEPIECE),
    ]
    unlimited = [
        Result.of({**window, "use_sliding_window": False}, SENTENCEPIECE),
        Result.of({**window, "use_sliding_window": True, "layer_types": full}, SENTENCEPIECE),
        Result.of({**window, "model_type": "mistral", "sliding_window": None}, SENTENCEPIECE),
    ]
    assert [len(check_result(one, "llama.cpp")) for one in (*limited, *unlimited)] == [1, 1, 0, 0, 0]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    models = make_models(tmp_path, experts=("math", "code"), config={"sliding_window": 8, "model_type": "mistral"})
    for folder in models.values():
        edit_config(folder, architectures=["MistralForCausalLM"], attention_bias=None, mlp_bias=None)
        write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}})
    return write_recipe(tmp_path, experts=("math", "code"), moe={"top_k": 2})


WARNING = (
    "llama.cpp ignores the sliding window, so that texts longer than it come out differently: "
    "keep texts shorter than `sliding_window`, or choose another client"
)


def test_a_plan_for_several_clients(recipe: Path) -> None:
    plain = moerge("plan", recipe, "--json").json
    planned = moerge("plan", recipe, "--for", "llama.cpp", "--for", "vllm", "--for", "llama.cpp", "--json").json
    assert planned["warnings"] == [*plain["warnings"], WARNING]
    assert {**planned, "warnings": plain["warnings"]} == plain
    shown = moerge("plan", recipe, "--for", "llama.cpp")
    assert shown.code == 0 and f"warning: {WARNING}\n" in shown.err


def test_the_merge_warns_and_writes_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    package.merge(recipe, tmp_path / "plain", threads=1)
    result = moerge("merge", recipe, tmp_path / "out", "--for", "llama.cpp", "--quiet")
    assert result.code == 0 and f"warning: {WARNING}\n" in result.err
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert check_folder(tmp_path / "out", "llama.cpp") == "differs"
    assert check_folder(tmp_path / "out", "vllm") == "runs"
    with pytest.raises(InputError, match=r"config\.json is missing"):
        check_folder(tmp_path, "vllm")


def test_what_cannot_run_is_refused_before_the_merge(recipe: Path, tmp_path: Path) -> None:
    routed = write_recipe(tmp_path, "routed.yaml", experts=("math", "code"), moe={"format": "moerge"})
    said = "openvino does not run moerge's own architecture, only transformers 5.5 and newer do: choose a native moe.format"
    refuses(routed, tmp_path / "out", said, options=("--for", "transformers", "--for", "openvino"))
    planned = moerge("plan", routed, "--for", "openvino")
    assert (planned.code, planned.out, planned.err.count("\n")) == (2, "", 1)
    assert planned.err.startswith(f"moerge: {said}")
    noted = moerge("plan", routed, "--for", "transformers")
    assert noted.code == 0
    assert "transformers needs version 5.5 or newer, and trust_remote_code=True" in " ".join(noted.out.split())


def test_unknown_clients_and_unknown_models(recipe: Path, tmp_path: Path) -> None:
    refuses(recipe, tmp_path / "out", "unknown client 'llama.ccp': did you mean 'llama.cpp'?", options=("--for", "llama.ccp"))
    assert check_result(result("mamba"), "vllm") == [
        Finding("vllm", "unknown", "whether vllm runs mamba models is not known to moerge: try it")
    ]
