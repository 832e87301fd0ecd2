"""Documents as what a model takes in: tokens, and of images what the model's own processor makes of them.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError
from moerge.runtime.loading import Loaded, load_processor
from moerge.texts.chat import encode, encode_answers, written_text
from moerge.texts.conversations import Conversation, Document
from moerge.texts.images import Picture

if TYPE_CHECKING:
    import torch

Inputs = Mapping[str, "torch.Tensor"]
"""Arguments of a model's forward pass by name; `input_ids` [1, T] among them."""
_ADVICE = "copy the model's preprocessor_config.json and its like into the folder, or leave out texts with images"


def model_inputs(tokenizer: Any, document: Document, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Up to `limit` tokens of a document, as `encode` makes them; with images also what the processor beside the tokenizer makes.

    Raises InputError where there is no processor, where it refuses the document, and where images do not fit into the limit.
    """
    import torch

    if not isinstance(document, Conversation) or not document.images:
        return {"input_ids": torch.tensor([encode(tokenizer, document, limit)], dtype=torch.long)}
    found = _processed(tokenizer, document, written_text(tokenizer, document), document.images)
    ids = found["input_ids"][0].tolist()
    written = text_tokens(tokenizer, ids)
    if limit is not None and not all(written[limit:]):
        end = len(ids) - written[::-1].index(False)
        raise InputError(
            f"{document.where}: its images end behind {end:,} tokens, of which {limit:,} are read: allow more tokens"
        )
    return cut(found, limit)


def loaded_inputs(loaded: Loaded, document: Document, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Arguments of a loaded model for up to `limit` tokens of a document; InputError as `Loaded.encode` and `model_inputs`."""
    if not isinstance(document, Conversation) or not document.images:
        return {"input_ids": loaded.encode(document, limit)}
    inputs = on_device(model_inputs(loaded.tokenizer, document, limit), loaded.model.device, loaded.model.dtype)
    loaded.check_ids(inputs["input_ids"][0].tolist())
    return inputs


def cut(inputs: Inputs, length: int | None) -> dict[str, torch.Tensor]:
    """The inputs of the first `length` tokens; what is not one value for each token stays as it is."""
    tokens = inputs["input_ids"].shape[1]
    return {name: value[:, :length] if value.shape[:2] == (1, tokens) else value for name, value in inputs.items()}


def answer_inputs(tokenizer: Any, conversation: Conversation) -> Iterator[tuple[dict[str, torch.Tensor], list[bool]]]:
    """Inputs for a conversation with images, and which tokens the assistant writes, see `encode_answers`.

    Raises InputError as `model_inputs`, and where the processor writes other text than the template.
    """
    processor_of(tokenizer, conversation.where)
    for encoded in encode_answers(tokenizer, conversation, images=True):
        written = text_tokens(tokenizer, encoded.ids)
        found = _processed(tokenizer, conversation, encoded.text, conversation.images[: written.count(False)])
        answers, ids, start = [False] * found["input_ids"].shape[1], found["input_ids"][0].tolist(), 0
        for first, end in _pieces(written):
            piece = encoded.ids[first:end]
            places = range(start, len(ids)) if end < len(written) else [len(ids) - len(piece)]
            place = next((place for place in places if ids[place : place + len(piece)] == piece), None)
            if place is None:
                raise InputError(f"{conversation.where}: the model's processor writes other text than its chat template")
            start = place + len(piece)
            answers[place:start] = encoded.answers[first:end]
        yield found, answers


def _pieces(written: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The runs of text between images: their first token, and the one behind the last."""
    start = 0
    for place, is_text in enumerate([*written, False]):
        if not is_text:
            if place > start:
                yield start, place
            start = place + 1


def _processed(tokenizer: Any, conversation: Conversation, text: str, images: Sequence[Picture]) -> dict[str, torch.Tensor]:
    """The processor's outputs for a text with places for these images."""
    processor = processor_of(tokenizer, conversation.where)
    pictures = {"images": [[picture.open() for picture in images]]} if images else {}
    try:
        found = dict(processor(text=[text], return_tensors="pt", add_special_tokens=False, **pictures))
    except Exception as error:  # every processor checks in its own way
        raise InputError(f"{conversation.where}: the model's processor refuses this document: {_short(error)}") from None
    found.pop("attention_mask", None)  # nothing is padded
    return found


def text_tokens(tokenizer: Any, ids: Sequence[int]) -> list[bool]:
    """Tell tokens of text from those that stand for images, which no model predicts."""
    processor = getattr(tokenizer, "_moerge_processor", None)
    if processor is None:
        return [True] * len(ids)
    token = getattr(processor, "image_token_id", None)
    token = tokenizer.convert_tokens_to_ids(str(processor.image_token)) if token is None else token
    return [one != token for one in ids]


def on_device(inputs: Inputs, device: Any, dtype: Any) -> dict[str, torch.Tensor]:
    """The inputs where a model is, and what images are made of in the element type that it computes in."""
    return {name: value.to(device, dtype) if value.is_floating_point() else value.to(device) for name, value in inputs.items()}


def processor_of(tokenizer: Any, where: str) -> Any:
    """The processor in the folder that a tokenizer was loaded from, loaded once. Raises InputError where there is none."""
    if not hasattr(tokenizer, "_moerge_processor"):
        place = tokenizer.name_or_path
        processor = load_processor(place, advice=_ADVICE, where=f"{where} has images")
        said = any(hasattr(processor, name) for name in ("image_token", "image_token_id"))
        if not (said and hasattr(processor, "image_processor")):
            raise InputError(f"{where} has images, and {place} has no processor for them: {_ADVICE}")
        tokenizer._moerge_processor = processor
    return tokenizer._moerge_processor


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
