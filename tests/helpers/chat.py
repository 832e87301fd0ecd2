"""Chat templates as published models have them, cut down to what matters here, and a tokenizer for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Of Qwen 2.5, SmolLM2 and others."""
MARKED = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The same with its answers marked, as TRL and SmolLM3 do."""
THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- set content = m.content %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content.lstrip('\\n') + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Of Qwen 3: only what follows the last question keeps its thinking."""
ENDING = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)
"""Of Phi 3: without a question at the end it ends the text."""
STRICT = (
    "{{- bos_token }}{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- else %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- endif %}{%- endfor %}"
)
"""Of Mistral 7B: no prompt of its own for an answer, and no system message."""
UNTHINKING = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|user|>' + m.content }}{%- else %}"
    "{{- '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"
)
"""Of DeepSeek R1's distilled models: thinking is asked for, and left out of every answer."""

TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "ending": ENDING, "strict": STRICT, "unthinking": UNTHINKING}


def chat_tokenizer(template: str | None, *, folder: Path | None = None) -> Any:
    """A byte-level tokenizer of 300 tokens with the tokens of the templates; also written to `folder`."""
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=_trained(), bos_token="<s>", eos_token="</s>", additional_special_tokens=special
    )
    tokenizer.chat_template = template
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


@cache
def _trained() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the answer is four, the question was two and two\n\n" * 4], trainer)
    return tokenizer


def messages(*contents: str) -> list[dict[str, Any]]:
    """A question, an answer, a question and so on."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
