"""Qwen2-VL: its language model is a Qwen2; the rest has no roles."""

from __future__ import annotations

from moerge.architecture.families.qwen import QWEN2, derive_windows
from moerge.architecture.family import Family

QWEN2_VL = Family(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    tensors=QWEN2.tensors,
    defaults={
        **QWEN2.defaults,
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_window_layers": 80,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    derive=derive_windows,
    nested="text_config",
    aliases=((r"model\.language_model\.", "model."), (r"model\.visual\.", "visual.")),
    unmodeled=(r"visual\..*",),
)
