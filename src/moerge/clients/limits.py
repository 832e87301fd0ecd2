"""The known limits of inference engines, as data: the page docs/clients.md is this file in prose.

`RUNS` says which model types a client runs at all, `LIMITS` what goes wrong with those that it runs. "measured": with the scripts
in tests/clients against transformers, see benchmarks/results/clients.md; "source": read in the client's source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moerge.clients.result import Result

LLAMA_CPP, OPENVINO, TRANSFORMERS, TRANSFORMERS_4, VLLM = "llama.cpp", "openvino", "transformers", "transformers-4", "vllm"

VERSIONS = {
    LLAMA_CPP: "llama-cpp-python 0.3.36",
    OPENVINO: "OpenVINO 2026.4 with optimum-intel 2.2",
    TRANSFORMERS: "transformers 5.5.4 and 5.23",
    TRANSFORMERS_4: "transformers 4.57.6",
    VLLM: "vLLM 0.32",
}
"""The versions that all of this was tried with or read in."""

_DENSE = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
_MOE = ("granitemoe", "mixtral", "qwen2_moe", "qwen3_moe")

OWN_FORMATS = ("moerge", "moerge_heterogeneous", "moerge_token")

UNTRIED = frozenset({"ernie4_5_moe", "granitemoehybrid", "hunyuan_v1_moe", "lfm2_moe", "qwen3_5_moe_text"})
"""Types that moerge writes and that were run in transformers 5 only: of other clients nothing is known."""

RUNS: dict[str, frozenset[str]] = {
    LLAMA_CPP: frozenset({*_DENSE, *_MOE, "olmoe"}),
    OPENVINO: frozenset({*_DENSE, *_MOE}),
    TRANSFORMERS: frozenset({*_DENSE, *_MOE, "olmoe", "flex_olmo", *OWN_FORMATS, *UNTRIED}),
    TRANSFORMERS_4: frozenset({*_DENSE, *_MOE, "olmoe", "flex_olmo"}),
    VLLM: frozenset({*_DENSE, *_MOE, "olmoe", "flex_olmo"}),
}
"""Model types by client, of those that moerge writes or has a family for."""

_SILU_IN_LLAMA_CPP = (
    "granite",
    "granitemoe",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
_NO_WINDOW_IN_LLAMA_CPP = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Limit:
    """`client`, given a model of one of these `types` for which `applies`, `what`s; `instead` is what to change in the recipe.

    `effect`: "cannot" run it, "differs" from transformers, or a "note" that all is well under a condition. No types: all.
    """

    client: str
    types: tuple[str, ...]
    applies: Callable[[Result], bool]
    effect: Literal["cannot", "differs", "note"]
    what: str
    instead: str
    source: str


LIMITS = (
    Limit(
        LLAMA_CPP,
        ("qwen3_moe",),
        lambda result: result.top_k_below_all and not result.config.get("norm_topk_prob"),
        "differs",
        "always renormalises the chosen experts' probabilities in Qwen3-MoE, and this model does not",
        "set moe.top_k to the number of experts",
        "measured; src/models/qwen3moe.cpp",
    ),
    Limit(
        LLAMA_CPP,
        ("qwen2_moe", "olmoe"),
        lambda result: result.top_k_below_all and bool(result.config.get("norm_topk_prob")),
        "differs",
        "never renormalises the chosen experts' probabilities in Qwen2-MoE and OLMoE, and this model does",
        "set moe.top_k to the number of experts",
        "measured; src/models/qwen2moe.cpp, olmoe.cpp",
    ),
    Limit(
        LLAMA_CPP,
        ("qwen2_moe", "olmoe"),
        lambda result: bool(result.config.get("tie_word_embeddings")),
        "cannot",
        "reads no Qwen2-MoE or OLMoE whose embedding and head are tied",
        "leave out `moe` for a dense model",
        "measured; src/models/qwen2moe.cpp, olmoe.cpp",
    ),
    Limit(
        LLAMA_CPP,
        ("granite", "granitemoe", "olmoe", "qwen2", "qwen2_moe"),
        lambda result: result.odd_heads,
        "cannot",
        "expects heads that together are as wide as the model in this architecture",
        "choose another client",
        "source: src/models/qwen2.cpp, qwen2moe.cpp, olmoe.cpp, conversion/granite.py",
    ),
    Limit(
        LLAMA_CPP,
        _NO_WINDOW_IN_LLAMA_CPP,
        lambda result: result.window is not None,
        "differs",
        "ignores the sliding window, so that texts longer than it come out differently",
        "keep texts shorter than `sliding_window`, or choose another client",
        "measured for mixtral; src/models/llama.cpp, phi3.cpp, qwen2.cpp",
    ),
    Limit(
        LLAMA_CPP,
        (),
        lambda result: result.rope_type == "dynamic",
        "differs",
        "ignores dynamic rope scaling",
        "keep texts shorter than `max_position_embeddings`, or choose another client",
        "source: conversion/base.py",
    ),
    Limit(
        LLAMA_CPP,
        _SILU_IN_LLAMA_CPP,
        lambda result: result.config.get("hidden_act", "silu") not in ("silu", "swish"),
        "differs",
        "computes SiLU in this architecture, whatever `hidden_act` says",
        "choose another client",
        "source: src/models/llama.cpp and others",
    ),
    Limit(
        LLAMA_CPP,
        ("gemma2", "gemma3_text"),
        lambda result: result.odd_attention_scale,
        "differs",
        "scales a Gemma's attention by the width of its heads, whatever `query_pre_attn_scalar` says",
        "choose another client",
        "measured; src/models/gemma2.cpp, gemma3.cpp",
    ),
    Limit(
        LLAMA_CPP,
        ("gpt2",),
        lambda result: result.config.get("intermediate_size") != 4 * (result.config.get("hidden_size") or 0),
        "cannot",
        "expects GPT-2's feed-forward layers to be four times as wide as the model",
        "choose another client",
        "source: conversion/gpt2.py",
    ),
    Limit(
        LLAMA_CPP,
        ("gemma", "gemma2", "gemma3_text", "gpt_neox"),
        lambda result: True,
        "note",
        "computes GELU approximately in this architecture, so probabilities differ by up to about 3e-4",
        "choose another client where that matters",
        "measured",
    ),
    Limit(
        LLAMA_CPP,
        ("gemma", "gemma2"),
        lambda result: result.tokenizer not in ("", "sentencepiece"),
        "cannot",
        "reads a Gemma's tokenizer from a tokenizer.model only",
        "name a model that has one with `tokenizer`",
        "measured; conversion/gemma.py",
    ),
    Limit(
        LLAMA_CPP,
        ("phi3",),
        lambda result: result.tokenizer not in ("", "sentencepiece") and result.tokenizer_class != "GPT2Tokenizer",
        "cannot",
        "reads a Phi-3's tokenizer from a tokenizer.model, or from GPT-2's files where `tokenizer_class` says so",
        "name a model that has them with `tokenizer`",
        "measured; conversion/phi.py",
    ),
    Limit(
        LLAMA_CPP,
        (),
        lambda result: not result.tokenizer,
        "cannot",
        "keeps the tokenizer in the model file, and this model has none",
        "name a model that has one with `tokenizer`",
        "measured; conversion/base.py",
    ),
    Limit(
        LLAMA_CPP,
        (),
        lambda result: result.tokenizer not in ("", "sentencepiece", "bpe", "byte-level bpe"),
        "cannot",
        "has byte-pair and SentencePiece tokenizers only",
        "name a model with a tokenizer.model or a BPE tokenizer.json with `tokenizer`",
        "source: conversion/base.py",
    ),
    Limit(
        LLAMA_CPP,
        (),
        lambda result: result.tokenizer == "byte-level bpe" and result.joined,
        "differs",
        "recognises byte-level BPE tokenizers by a hash, and may refuse one whose vocabulary was joined",
        "use `tokenizer: base`, or give the converter the pre-tokenizer's name",
        "measured with a tokenizer trained anew; conversion/base.py",
    ),
    Limit(
        LLAMA_CPP,
        (),
        lambda result: result.tokenizer == "byte-level bpe" and not result.joined,
        "note",
        "recognises byte-level BPE tokenizers by a hash: its converter refuses one that you trained yourself",
        "give the converter the pre-tokenizer's name",
        "measured; conversion/base.py",
    ),
    Limit(
        OPENVINO,
        ("gemma", "gemma2", "gemma3_text"),
        lambda result: True,
        "note",
        "exports a Gemma with transformers 5.0 or older only",
        "install that for the export",
        "measured with 5.5.4, which it refuses",
    ),
    Limit(
        VLLM,
        (),
        lambda result: not result.tokenizer,
        "note",
        "needs --skip-tokenizer-init for a model without a tokenizer",
        "name a model that has one with `tokenizer`",
        "source: vllm/config/model.py",
    ),
    Limit(
        TRANSFORMERS_4,
        ("qwen3", "qwen3_moe"),
        lambda result: True,
        "note",
        "needs version 4.51 or newer for Qwen3",
        "choose another client",
        "source: transformers' release notes",
    ),
    *(
        Limit(
            client,
            ("gemma2",),
            lambda result: True,
            "note",
            f"leaves out Gemma 2's soft cap of attention scores by default{versions}",
            'load it with attn_implementation="eager"',
            "measured with 4.57.6, 5.5.4 and 5.23",
        )
        for client, versions in ((TRANSFORMERS_4, ""), (TRANSFORMERS, " in version 5.5, and not in 5.23"))
    ),
    Limit(
        TRANSFORMERS_4,
        ("granitemoe",),
        lambda result: result.odd_heads,
        "cannot",
        "expects heads that together are as wide as the model in GraniteMoe",
        "choose another client",
        "measured with 4.50.3 and 4.57.6",
    ),
    Limit(
        TRANSFORMERS_4,
        ("olmo2",),
        lambda result: result.rope_type not in ("default", "linear", "dynamic"),
        "cannot",
        "accepts linear and dynamic rope scaling only in OLMo 2",
        "choose another client",
        "measured with 4.50.3 and 4.57.6",
    ),
    Limit(
        TRANSFORMERS_4,
        ("qwen2_moe",),
        lambda result: result.window is not None,
        "differs",
        "knows no `layer_types` in Qwen2-MoE, and has a sliding window in other layers",
        "choose another client",
        "measured with 4.50.3 and 4.57.6",
    ),
    Limit(
        TRANSFORMERS_4,
        (),
        lambda result: result.rope_type == "yarn" and result.model_type != "olmo2",
        "note",
        "needs a late version for yarn: 4.57 computes it as version 5 does, 4.50 did not",
        "choose another client for older versions",
        "measured with 4.50.3 and 4.57.6",
    ),
    Limit(
        TRANSFORMERS_4,
        ("flex_olmo",),
        lambda result: True,
        "note",
        "needs version 4.57 or newer for FlexOlmo",
        "choose another client",
        "measured with 4.57.6",
    ),
    Limit(
        TRANSFORMERS,
        OWN_FORMATS,
        lambda result: True,
        "note",
        "needs version 5.5 or newer, and trust_remote_code=True where moerge is not installed",
        "choose a native moe.format for older versions",
        "measured",
    ),
)
