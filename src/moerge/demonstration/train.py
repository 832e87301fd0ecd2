"""Train the demo's base and its three experts.

All four share one tokenizer and one architecture, a Llama of 0.7 million parameters, and the experts start from
the base as it lies on disk: that makes the base the exact zero of their task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.demonstration.runtime import import_torch, load, settled
from moerge.demonstration.text import Corpus, make_corpora, write_corpora

if TYPE_CHECKING:
    import torch

VOCABULARY = 1024
WINDOW = 128
"""Tokens in a training sequence."""
BATCH = 8
"""Sequences in a step."""
END = "<|endoftext|>"
"""Between documents, and the only special token."""


@dataclass(frozen=True)
class Training:
    """The training of one model: domains, length, learning rate."""

    mixture: Mapping[str, float]
    steps: int
    learning_rate: float


_BASE_MIXTURE = {"general": 0.85, "math": 0.05, "code": 0.05, "knowledge": 0.05}


def _expert(domain: str) -> Training:
    """A fifth of an expert's text is the base's, as in the paper's Table 5, so that it forgets less."""
    mixture = {name: 0.2 * share for name, share in _BASE_MIXTURE.items()}
    mixture[domain] += 0.8
    return Training(mixture=mixture, steps=220, learning_rate=1e-3)


TRAININGS = {
    "base": Training(mixture=_BASE_MIXTURE, steps=700, learning_rate=3e-3),
    "math": _expert("math"),
    "code": _expert("code"),
    "knowledge": _expert("knowledge"),
}

OnStep = Callable[[str, float], None]
"""Called after each training step with the model's name and the loss in nats per token."""


def train_experts(out: Path, *, seed: int = 0, scale: float = 1.0) -> dict[str, Path]:
    """Make the corpora, train the base and the experts, and return the folder of each by name.

    `scale` multiplies text and training steps. Writes `out/text` and `out/models`. Raises InputError where torch or
    transformers is not installed.
    """
    corpora = make_corpora(seed, scale=scale)
    write_corpora(corpora, out / "text")
    return train_models(corpora, out / "models", seed=seed, scale=scale)


def train_models(
    corpora: Mapping[str, Corpus],
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    on_step: OnStep = lambda name, loss: None,
) -> dict[str, Path]:
    """Train the models of `TRAININGS` on `corpora` and return the folder of each, `folder/<name>`.

    The same arguments, machine and number of threads give the same bytes.
    """
    import_torch()
    import torch

    tokenizer = train_tokenizer(corpora)
    paths = {name: folder / name for name in TRAININGS}
    with settled(seed):
        streams = {domain: pack(tokenizer, corpus.train) for domain, corpus in corpora.items()}
        for name, training in TRAININGS.items():
            model: Any = _new_model(tokenizer) if name == "base" else load(paths["base"])
            for loss in train_model(model, training, streams, _steps(training, scale)):
                on_step(name, loss)
            # bfloat16 is what most published experts come in, and halves the files.
            model.to(torch.bfloat16).save_pretrained(paths[name])
            tokenizer.save_pretrained(paths[name])
    return paths


def total_steps(scale: float) -> int:
    """Return the number of times that `train_models` calls `on_step`."""
    return sum(_steps(training, scale) for training in TRAININGS.values())


def train_tokenizer(corpora: Mapping[str, Corpus]) -> Any:
    """A byte-level BPE of `VOCABULARY` tokens; digits stay single so that arithmetic can be learned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = (document for corpus in corpora.values() for document in corpus.train)
    tokenizer.train_from_iterator(sample, trainer)
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=2 * WINDOW)


def _steps(training: Training, scale: float) -> int:
    return max(1, round(scale * training.steps))


def _new_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * WINDOW,
        initializer_range=0.06,  # the default, 0.02, suits wide models; this narrow one learns twice as fast from here
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def pack(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """All documents as one row of tokens, each followed by the token that ends a text."""
    import torch

    ended = [document + tokenizer.eos_token for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch(ended, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def train_model(model: Any, training: Training, streams: Mapping[str, torch.Tensor], steps: int) -> Iterator[float]:
    """AdamW with warm-up and a cosine down to a tenth, on windows of `streams` [tokens]; yields the loss of each step."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        batch = _draw(training.mixture, streams)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.item()


def _draw(mixture: Mapping[str, float], streams: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A batch of windows at random places, the domain of each drawn from `mixture`."""
    import torch

    domains = list(mixture)
    picks = torch.multinomial(torch.tensor([mixture[d] for d in domains]), BATCH, replacement=True)
    rows = []
    for pick in picks.tolist():
        stream = streams[domains[pick]]
        start = int(torch.randint(len(stream) - WINDOW + 1, ()))
        rows.append(stream[start : start + WINDOW])
    return torch.stack(rows)
