"""What a decoder-only model is from outside: moerge's tables against transformers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from moerge.architecture.decoder import DecoderInterface
from moerge.architecture.decoder_interface import decoder_interface
from moerge.architecture.decoder_transformers import decoder_from_transformers
from moerge.architecture.family import ExpectedTensor
from moerge.errors import InputError
from tests.helpers.hf_models import FAMILIES, torch, transformers

pytestmark = pytest.mark.slow

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
    "opt": lambda: transformers.OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=32),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.125, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "falcon_h1": lambda: transformers.FalconH1Config(**SMALL, num_key_value_heads=4, lm_head_multiplier=0.25),
    "mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
    "stablelm": lambda: transformers.StableLmConfig(**SMALL),
    "xglm": lambda: transformers.XGLMConfig(vocab_size=64, d_model=16, ffn_dim=32, num_layers=1, attention_heads=4),
}
"""Families that moerge has no table of."""


def outside(whole: DecoderInterface) -> tuple[Any, ...]:
    scales = (round(whole.embedding_scale, 5), round(whole.logit_scale, 5), whole.soft_capping and round(whole.soft_capping, 3))
    return (whole.rows, whole.width, whole.embedding, whole.head, whole.head_bias, *scales)


def shapes(tensors: tuple[ExpectedTensor, ...]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("qwen2_vl", "gemma3")])
def test_a_table_says_what_transformers_says(family: str, tied: bool) -> None:
    config = FAMILIES[family](tie_word_embeddings=tied).to_dict()
    known, asked = decoder_interface(config, family), decoder_from_transformers(config, family)
    assert outside(known) == outside(asked)
    assert shapes(known.tensors) == shapes(asked.tensors)
    assert (known.head is None) == tied


@pytest.mark.parametrize(
    ("family", "expected"),
    {
        "bloom": (64, 32, "transformer.word_embeddings.weight", None, None, 1.0, 1.0, None),
        "opt": (64, 16, "model.decoder.embed_tokens.weight", None, None, 1.0, 1.0, None),
        "gptj": (64, 32, "transformer.wte.weight", "lm_head.weight", "lm_head.bias", 1.0, 1.0, None),
        "cohere": (64, 32, "model.embed_tokens.weight", None, None, 1.0, 0.125, None),
        "falcon_h1": (64, 32, "model.embed_tokens.weight", "lm_head.weight", None, 1.0, 0.25, None),
        "mamba": (64, 32, "backbone.embeddings.weight", None, None, 1.0, 1.0, None),
        "stablelm": (64, 32, "model.embed_tokens.weight", "lm_head.weight", None, 1.0, 1.0, None),
        "xglm": (64, 16, "model.embed_tokens.weight", None, None, 4.0, 1.0, None),
    }.items(),
)
def test_other_families_are_asked_about(family: str, expected: tuple[Any, ...]) -> None:
    config = OTHERS[family]()
    whole = decoder_interface(config.to_dict(), family)
    assert outside(whole) == expected and whole.head_measured
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = {name for name in model.state_dict() if whole.head or name != "lm_head.weight"}
    assert set(shapes(whole.tensors)) == names


def test_names_may_lack_the_prefix_of_the_model_inside() -> None:
    whole = decoder_interface(OTHERS["bloom"]().to_dict(), "bloom")
    assert whole.aliases("transformer.ln_f.weight") == ("transformer.ln_f.weight", "ln_f.weight")
    assert whole.aliases("lm_head.weight") == ("lm_head.weight",)


REFUSED = {
    "t5": (lambda: transformers.T5Config(vocab_size=64).to_dict(), "'t5' is an encoder-decoder"),
    "bart": (lambda: transformers.BartConfig(vocab_size=64).to_dict(), "'bart' is an encoder-decoder"),
    "bert": (lambda: transformers.BertConfig(**SMALL).to_dict(), "'bert' is an encoder, and only decoder-only"),
    "masked": (
        lambda: {**transformers.BertConfig(**SMALL).to_dict(), "architectures": ["BertForMaskedLM"]},
        "'bert' is an encoder (BertForMaskedLM), and only decoder-only language models can be experts: leave it out",
    ),
    "misspelt": (
        lambda: {**transformers.BertConfig(**SMALL).to_dict(), "architectures": "BertForMaskedLM"},
        "'bert' is an encoder (BertForMaskedLM)",
    ),
    "numbered": (lambda: {**transformers.T5Config(vocab_size=64).to_dict(), "architectures": 5}, "'t5' is an encoder-decoder"),
    "decoder": (
        lambda: transformers.BertConfig(**SMALL, is_decoder=True).to_dict(),
        "layers of their own between body and head, such as 'cls.predictions.transform.dense.weight'",
    ),
    "vision": (lambda: transformers.ViTConfig().to_dict(), "'vit' is no language model of transformers"),
    "several": (lambda: FAMILIES["gemma3"]().to_dict(), "'gemma3' is a language model with others beside it"),
    "nameless": (lambda: {"hidden_size": 8}, "config.json has no 'model_type'"),
    "remote": (
        lambda: {"model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "modeling.My"}},
        "models of type 'my_own' run by code of their own ('auto_map' in config.json), which moerge does not run",
    ),
    "unknown": (lambda: {"model_type": "my_own"}, "knows models of type 'my_own': check config.json, or upgrade transformers"),
    "garbled": (
        lambda: {**FAMILIES["llama"]().to_dict(), "hidden_size": "wide"},
        "hidden_size should be a positive whole number",
    ),
    "impossible": (lambda: {**OTHERS["bloom"]().to_dict(), "n_head": 5}, "transformers cannot make a bloom model of it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_decoder_only_model_is_refused_in_one_sentence(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        decoder_interface(make(), "expert")
    text = str(caught.value)
    assert text.startswith("expert: ") and message in text and "\n" not in text


def test_without_transformers_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OTHERS["bloom"]().to_dict()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"moerge does not know models of type 'bloom', .* pip install 'moerge\[models\]'"):
        decoder_interface(config, "expert")
    assert decoder_interface({"model_type": "llama", **FAMILIES["llama"]().to_dict()}, "expert").width == 32
