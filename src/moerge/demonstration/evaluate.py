"""Held-out perplexity of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.demonstration.runtime import load, settled
from moerge.demonstration.text import Corpus
from moerge.demonstration.train import WINDOW, pack

if TYPE_CHECKING:
    import torch

BATCH = 16
"""Windows in a forward pass."""


def perplexities(checkpoint: Path, corpora: Mapping[str, Corpus]) -> dict[str, float]:
    """exp(nats per token) on the held-out text of each domain, computed in float32.

    Every token but the very first is predicted once, from at most `WINDOW` tokens before it.
    """
    import torch

    from moerge.runtime.loading import load_tokenizer

    with settled(), torch.inference_mode():
        model = load(checkpoint).eval()
        tokenizer = load_tokenizer(checkpoint)
        return {domain: _perplexity(model, pack(tokenizer, corpus.heldout)) for domain, corpus in corpora.items()}


def _perplexity(model: Any, tokens: torch.Tensor) -> float:
    import torch.nn.functional as F

    nats = 0.0
    for inputs_BT, targets_BT in _batches(tokens):
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        nats += F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum").item()
    return math.exp(nats / (len(tokens) - 1))


def _batches(tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) that cover all tokens: whole windows, then what is left as a shorter one."""
    inputs, targets = tokens[:-1], tokens[1:]
    whole = len(inputs) // WINDOW * WINDOW
    for start in range(0, whole, BATCH * WINDOW):
        stop = min(start + BATCH * WINDOW, whole)
        yield inputs[start:stop].view(-1, WINDOW), targets[start:stop].view(-1, WINDOW)
    if whole < len(inputs):
        yield inputs[whole:].view(1, -1), targets[whole:].view(1, -1)
