"""Documents as what a model takes in: tokens, and of images what the model's own processor makes of them.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError
from moerge.texts.chat import encode, render
from moerge.texts.conversations import Conversation, Document

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
    processor, text = processor_of(tokenizer, document.where), render(tokenizer, document)
    images = [picture.open() for picture in document.images]
    try:
        found = dict(processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False))
    except Exception as error:  # every processor checks in its own way
        raise InputError(f"{document.where}: the model's processor refuses this document: {_short(error)}") from None
    length = found["input_ids"].shape[1]
    marked = found["input_ids"][0] == getattr(processor, "image_token_id", -1)
    fits = 1 + max(marked.nonzero().flatten().tolist(), default=-1)
    if limit is not None and fits > limit:
        raise InputError(
            f"{document.where}: its images end behind {fits:,} tokens, of which {limit:,} are read: allow more tokens"
        )
    found.pop("attention_mask", None)  # nothing is padded
    return {name: value[:, :limit] if value.shape[:2] == (1, length) else value for name, value in found.items()}


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
        try:
            processor = _load(place)
        except Exception as error:  # a missing file, a missing library, a config of another version
            raise InputError(
                f"{where} has images, and no processor can be loaded from {place}: {_short(error)}: {_ADVICE}"
            ) from None
        if not (
            hasattr(processor, "image_processor") and (hasattr(processor, "image_token") or hasattr(processor, "image_token_id"))
        ):
            raise InputError(f"{where} has images, and {place} has no processor for them: {_ADVICE}")
        tokenizer._moerge_processor = processor
    return tokenizer._moerge_processor


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
