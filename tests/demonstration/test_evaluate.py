"""Perplexity against the obvious formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moerge.demonstration.evaluate import perplexities
from moerge.demonstration.runtime import load
from moerge.demonstration.text import Corpus
from moerge.demonstration.train import END, WINDOW

pytestmark = pytest.mark.slow


def test_is_the_exponential_of_the_mean_loss_of_every_token(trained: dict[str, Path], corpora: dict[str, Corpus]) -> None:
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = load(trained["math"]), AutoTokenizer.from_pretrained(trained["math"])
    tokens = tokenizer("".join(document + END for document in corpora["math"].heldout))["input_ids"]
    nats = []
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, WINDOW):
            window = tokens[start : start + WINDOW + 1]
            log_probabilities = model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
            nats += [-log_probabilities[i, token].item() for i, token in enumerate(window[1:])]
    assert len(nats) == len(tokens) - 1
    found = perplexities(trained["math"], {"math": corpora["math"]})
    assert found["math"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
