"""Losses of documents against the obvious sums over a model's log-probabilities."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.evaluation.likelihood import Loss, beginning, document_losses
from moerge.runtime.loading import Loaded, context_length, load

torch = pytest.importorskip("torch", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

DOCUMENTS = [
    "w3 w4 w5 w6",
    "w7",
    " ".join(f"w{3 + (7 * index) % 61}" for index in range(23)),
    " ".join(f"w{3 + (5 * index) % 61}" for index in range(40)),
]
START = 1
"""The tokenizer's bos."""


@pytest.fixture(scope="module")
def dense(checkpoints: Path) -> Loaded:
    return load(checkpoints / "math")


@pytest.fixture(scope="module")
def routed(checkpoints: Path) -> Loaded:
    return load(checkpoints / "routed")


def ids(document: str) -> list[int]:
    return [int(word[1:]) for word in document.split()]


def nll(model: Any, read: list[int], target: int, **options: Any) -> float:
    """Of one token after what is read."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([read]), use_cache=False, **options).logits[0, -1]
    return -float(logits.double().log_softmax(-1)[target])


def read_before(tokens: list[int], place: int, window: int) -> list[int]:
    """What is read to predict the token at `place`: from the beginning of the first window that spans it."""
    begin = 0
    while begin + window < place:
        begin += window // 2
    return tokens[begin:place]


@pytest.mark.parametrize("window", [8, 9, 128])
def test_every_token_is_predicted_once(dense: Loaded, window: int) -> None:
    found = document_losses(dense, DOCUMENTS, window=window, batch_size=3)
    for loss, document in zip(found, DOCUMENTS, strict=True):
        tokens = [START, *ids(document)]
        expected = [nll(dense.model, read_before(tokens, place, window), tokens[place]) for place in range(1, len(tokens))]
        assert (loss.tokens, loss.bytes) == (len(expected), len(document))
        assert loss.nats == pytest.approx(sum(expected), rel=1e-5)


def test_every_token_but_the_first_window_s_has_half_a_window_before_it() -> None:
    tokens = list(range(60))
    for window in (2, 7, 16):
        lengths = [len(read_before(tokens, place, window)) for place in range(1, 60)]
        assert max(lengths) <= window
        assert min(lengths[window:]) >= window - window // 2


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("name", ["math", "native"])
def test_a_batch_changes_nothing(checkpoints: Path, name: str, batch_size: int) -> None:
    dense = load(checkpoints / name)
    alone = [document_losses(dense, [document], window=8)[0] for document in DOCUMENTS]
    together = document_losses(dense, DOCUMENTS, window=8, batch_size=batch_size)
    assert [(loss.tokens, loss.bytes) for loss in together] == [(loss.tokens, loss.bytes) for loss in alone]
    assert [loss.nats for loss in together] == pytest.approx([loss.nats for loss in alone], rel=1e-5)


def test_what_is_given_is_read_but_not_predicted(dense: Loaded) -> None:
    document = DOCUMENTS[2]
    given = len("w3 w10 w17 w")  # inside the fourth word, which is then given too
    place = beginning(document, given)
    assert document[:place] == "w3 w10 w17 w24"
    tokens = [START, *ids(document)]
    expected = [nll(dense.model, read_before(tokens, place, 8), tokens[place]) for place in range(5, len(tokens))]
    (loss,) = document_losses(dense, [document], window=8, given=given)
    assert (loss.tokens, loss.bytes) == (19, len(document) - place)
    assert loss.nats == pytest.approx(sum(expected), rel=1e-5)


def test_a_sequence_routed_model_routes_on_what_is_given(routed: Loaded) -> None:
    given = len("w3 w1")
    for document in DOCUMENTS[2:]:
        tokens = [START, *ids(document)]
        routing = routed.model.route(torch.tensor([tokens[:3]]))
        (loss,) = document_losses(routed, [document], window=8, given=given)
        expected = [
            nll(routed.model, read_before(tokens, place, 8), tokens[place], routing=routing) for place in range(3, len(tokens))
        ]
        assert loss.nats == pytest.approx(sum(expected), rel=1e-5)
    together = document_losses(routed, DOCUMENTS[2:], window=8, given=given, batch_size=5)
    assert together[1].nats == pytest.approx(loss.nats, rel=1e-5)


def test_without_a_start_token_the_first_token_and_its_bytes_do_not_count(dense: Loaded) -> None:
    whole, dense = document_losses(dense, DOCUMENTS, window=16), replace(dense, tokenizer=deepcopy(dense.tokenizer))
    dense.tokenizer.bos_token = None
    from_eos = document_losses(dense, DOCUMENTS, window=16)
    assert [loss.tokens for loss in from_eos] == [loss.tokens for loss in whole]
    assert from_eos[1].nats == pytest.approx(nll(dense.model, [2], 7), rel=1e-5)
    dense.tokenizer.eos_token = None
    tokens = ids(DOCUMENTS[0])
    expected = [nll(dense.model, tokens[:place], tokens[place]) for place in range(1, 4)]
    loss = document_losses(dense, DOCUMENTS[:2], window=16)
    assert (loss[0].tokens, loss[0].bytes) == (3, len(" w4 w5 w6"))
    assert loss[0].nats == pytest.approx(sum(expected), rel=1e-5)
    assert loss[1] == Loss(0.0, 0, 0)


def test_bytes_are_those_of_utf8(dense: Loaded) -> None:
    assert document_losses(dense, ["w3 ä w4"], window=16)[0].bytes == 8


def test_a_slow_tokenizer_cannot_leave_out_a_beginning(dense: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(dense.tokenizer), "is_fast", False)
    with pytest.raises(
        InputError, match=r"does not tell which characters a token stands for, .*: use one with a tokenizer\.json$"
    ):
        document_losses(dense, DOCUMENTS, window=16, given=3)


def test_context_length(dense: Loaded, routed: Loaded) -> None:
    assert context_length(dense) == context_length(routed) == 128
