"""Likelihood of held-out text: nats, tokens and bytes of every document.

Documents are predicted one by one, each from a start token (the tokenizer's bos, else its eos), so that nothing depends on their
order. One that is longer than the window is read in overlapping windows, each half a window further on: every token is predicted
once, those behind the first window from at least half a window before them. Bytes are those of the text as UTF-8: figures per
byte compare models whose tokenizers differ.

A sequence-routed model cannot route on what it is to predict, or the routing would know the answer. It routes on the beginning
of a document and keeps to that for the rest, as it does when it continues a prompt; that beginning is then not counted, for no
model.

Of a conversation, as the model's own chat template writes it, the answers are predicted, each with all that stands before it; a
sequence-routed model routes it by what stands before the first. Its bytes are those of the answers' messages: templates differ.

Shapes: B windows, T tokens, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError
from moerge.runtime.inputs import Inputs, answer_inputs, cut, on_device
from moerge.runtime.loading import Loaded
from moerge.texts import Conversation, Document, encode_answers

if TYPE_CHECKING:
    import torch

_LOGITS = 2**24
"""Logits that are in memory as float32 at a time."""


@dataclass(frozen=True)
class Loss:
    """A document's negative log-likelihood in nats, of so many tokens that stand for so many bytes."""

    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class _Sequence:
    """Tokens of a document, start token first. Those before `first`, and those that are no `answers`, are only read.

    `inputs` are what the model takes in for a document with images.
    """

    document: int
    tokens: list[int]
    first: int
    bytes: int
    answers: list[bool] | None = None
    inputs: Inputs | None = None

    def predicted(self, first: int, end: int) -> list[int]:
        """The places among these of the tokens that are predicted."""
        return [place for place in range(first, end) if self.answers is None or self.answers[place]]


@dataclass(frozen=True)
class _Window:
    """Tokens `begin` to `end` of a sequence; the tokens from `first` on are predicted here."""

    sequence: int
    begin: int
    end: int
    first: int


def beginning(document: str, characters: int) -> int:
    """Return the start of the predicted part of a document: the first white space behind so many characters."""
    if characters == 0:
        return 0
    place = characters
    while place < len(document) and not document[place].isspace():
        place += 1
    return place


def document_losses(
    loaded: Loaded, documents: Sequence[Document], *, window: int, given: int = 0, batch_size: int = 1
) -> list[Loss]:
    """The loss of each document; `given` characters at its beginning are read but not predicted.

    `window` is how many tokens the model reads at once. A sequence-routed model needs `given` > 0. Raises InputError where
    the tokenizer cannot tell which characters its tokens stand for (`given` > 0 only).
    """
    import torch

    sequences = [one for index, document in enumerate(documents) for one in _encode(loaded, index, document, given)]
    _check_window(sequences, documents, window)
    routings = _routings(loaded, sequences, batch_size) if loaded.by_sequence else None
    windows = [found for index, sequence in enumerate(sequences) for found in _windows(index, sequence, window)]
    windows.sort(key=lambda found: (found.begin - found.end, found.sequence, found.begin))
    nats, counts, sizes = [0.0] * len(documents), [0] * len(documents), [0] * len(documents)
    for sequence in sequences:
        sizes[sequence.document] += sequence.bytes
    with torch.inference_mode():
        for batch in _batches(sequences, windows, batch_size):
            for found, loss in zip(batch, _nats(loaded, sequences, batch, routings), strict=True):
                sequence = sequences[found.sequence]
                nats[sequence.document] += loss
                counts[sequence.document] += len(sequence.predicted(found.first, found.end))
    return [Loss(*figures) for figures in zip(nats, counts, sizes, strict=True)]


def _encode(loaded: Loaded, index: int, document: Document, given: int) -> Iterator[_Sequence]:
    """A document as sequences: one, or more where a template writes answers otherwise once others follow."""
    if isinstance(document, str):
        yield _encode_text(loaded, index, document, given)
        return
    size = sum(_size(document.messages[place]) for place in document.answers if place)
    found: Iterator[tuple[list[int], list[bool], Inputs | None]]
    if document.images:
        pictured = answer_inputs(loaded.tokenizer, document)
        found = ((inputs["input_ids"][0].tolist(), answers, inputs) for inputs, answers in pictured)
    else:
        found = ((encoded.ids, encoded.answers, None) for encoded in encode_answers(loaded.tokenizer, document))
    for ids, answers, inputs in found:
        loaded.check_ids(ids)
        yield _Sequence(index, ids, max(1, answers.index(True)), size, answers, inputs)
        size = 0


def _size(answer: Mapping[str, Any]) -> int:
    """Bytes of what an answer says, thinks and calls, however a template writes it."""
    calls = json.dumps(answer["tool_calls"], ensure_ascii=False) if "tool_calls" in answer else ""
    return len((answer["content"] + str(answer.get("reasoning_content", "")) + calls).encode())


def _encode_text(loaded: Loaded, index: int, document: str, given: int) -> _Sequence:
    tokenizer, place = loaded.tokenizer, beginning(document, given)
    if given and not tokenizer.is_fast:
        raise InputError(
            f"{loaded.name}: its tokenizer does not tell which characters a token stands for, so the beginning of a document "
            "cannot be left out: use one with a tokenizer.json"
        )
    encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=bool(given), verbose=False)
    ids = list(encoded["input_ids"])
    loaded.check_ids(ids)
    before = sum(start < place for start, _ in encoded["offset_mapping"]) if given else 0
    size = len(document[place:].encode("utf-8", "surrogatepass"))
    start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    if start is not None:
        return _Sequence(index, [start, *ids], 1 + before, size)
    if before:
        return _Sequence(index, ids, before, size)
    unpredicted = len(tokenizer.decode(ids[:1]).encode())  # nothing stands before the first token
    return _Sequence(index, ids, 1, max(0, size - unpredicted))


def _windows(index: int, sequence: _Sequence, window: int) -> Iterator[_Window]:
    """A window reads one token less than it spans: the last one is only predicted."""
    length, first, begin = len(sequence.tokens), sequence.first, 0
    while first < length:
        end = min(begin + window + 1, length)
        if first < end:
            yield _Window(index, begin, end, first)
            first = end
        begin += max(1, window // 2)


def _check_window(sequences: Sequence[_Sequence], documents: Sequence[Document], window: int) -> None:
    """InputError for a document with images that the model does not read at once."""
    for sequence in sequences:
        document, tokens = documents[sequence.document], len(sequence.tokens) - 1
        if sequence.inputs is not None and tokens > window:
            where = document.where if isinstance(document, Conversation) else "a document"
            raise InputError(
                f"{where} has {tokens:,} tokens with its images, and {window:,} are read at once: choose a larger --window"
            )


def _batches(sequences: Sequence[_Sequence], windows: Sequence[_Window], size: int) -> Iterator[Sequence[_Window]]:
    """Windows that run together: up to `size`, and those with images alone."""
    pictured = [sequences[found.sequence].inputs is not None for found in windows]
    yield from _groups([found for found, alone in zip(windows, pictured, strict=True) if not alone], size)
    yield from _groups([found for found, alone in zip(windows, pictured, strict=True) if alone], 1)


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _nats(
    loaded: Loaded, sequences: Sequence[_Sequence], batch: Sequence[_Window], routings: Sequence[Any] | None
) -> list[float]:
    """Return the negative log-likelihood of the tokens that are predicted in it."""
    import torch
    from torch.nn import functional

    device = loaded.model.device
    read = [sequences[found.sequence].tokens[found.begin : found.end - 1] for found in batch]
    options = {} if routings is None else {"routing": _joined([routings[found.sequence] for found in batch])}
    ids_BT, mask_BT = _padded(read, device, left=False)
    options |= _beside(loaded, sequences[batch[0].sequence])
    logits_BTV = loaded.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **options).logits
    step = max(1, _LOGITS // logits_BTV.shape[-1])
    totals = []
    for row, found in enumerate(batch):
        sequence = sequences[found.sequence]
        places = sequence.predicted(found.first, found.end)
        targets_N = torch.tensor([sequence.tokens[place] for place in places], dtype=torch.long, device=device)
        logits_NV = logits_BTV[row, [place - found.begin - 1 for place in places]]
        losses = [
            functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double().sum()
            for logits, targets in zip(torch.split(logits_NV, step), torch.split(targets_N, step), strict=True)
        ]
        totals.append(float(torch.stack(losses).sum()))
    return totals


def _beside(loaded: Loaded, sequence: _Sequence) -> dict[str, Any]:
    """The arguments beside tokens of a document with images, whose last token is only predicted."""
    if sequence.inputs is None:
        return {}
    inputs = on_device(cut(sequence.inputs, len(sequence.tokens) - 1), loaded.model.device, loaded.model.dtype)
    return {name: value for name, value in inputs.items() if name != "input_ids"}


def _padded(rows: Sequence[list[int]], device: Any, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of rows of different lengths; a padding token is any token, since the mask hides it."""
    import torch

    width = max(map(len, rows))
    before = [width - len(row) if left else 0 for row in rows]
    ids_BT, mask_BT = torch.zeros(2, len(rows), width, dtype=torch.long, device=device)
    for index, (row, start) in enumerate(zip(rows, before, strict=True)):
        ids_BT[index, start : start + len(row)] = torch.tensor(row, device=device)
        mask_BT[index, start : start + len(row)] = 1
    return ids_BT, mask_BT


def _routings(loaded: Loaded, sequences: Sequence[_Sequence], batch_size: int) -> list[Any]:
    """The routing of each document's beginning."""
    import torch

    found = []
    for batch in _groups(sequences, batch_size):
        rows = [sequence.tokens[: sequence.first] for sequence in batch]
        routing = loaded.model.route(*_padded(rows, loaded.model.device, left=True))
        found += [routing.take(torch.tensor([row])) for row in range(len(rows))]
    return found


def _joined(routings: Sequence[Any]) -> Any:
    import torch

    alpha_BE, scores_BE = (torch.cat([getattr(routing, key) for routing in routings]) for key in ("alpha", "scores"))
    return replace(routings[0], alpha=alpha_BE, scores=scores_BE)
