"""The embedding and the head of a causal language model, as data."""

from __future__ import annotations

from dataclasses import dataclass

from moerge.architecture.family import ExpectedTensor
from moerge.errors import InputError


@dataclass(frozen=True)
class DecoderInterface:
    """A language model's outside. `tensors` are all that it has, by their names on disk, embedding and head included.

    `rows` x `width` is the shape of the input embedding, and of the head; `head` is None where it is the embedding itself.
    The embedding module puts out `embedding_scale` times a row, and logits are `logit_scale` times what the head puts out.
    `head_measured` is False where that and the cap could not be found out, and count as none.
    What the model does to embeddings afterwards is its inside. `soft_capping` limits logits, in nats, where it is not None.
    `aliases` are further names that checkpoints may have for a tensor.
    """

    model_type: str
    rows: int
    width: int
    embedding: str
    head: str | None
    tensors: tuple[ExpectedTensor, ...]
    head_bias: str | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    soft_capping: float | None = None
    head_measured: bool = True
    prefix: str = ""

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return the spellings that checkpoints may have of a tensor's name: as it is, or without the prefix of the model
        inside.
        """
        start = f"{self.prefix}."
        return (name, name.removeprefix(start)) if self.prefix and name.startswith(start) else (name,)


def not_decoder(where: str, kind: str, what: str) -> InputError:
    """The error for a model that is something else."""
    return InputError(f"{where}: {kind!r} is {what}, and only decoder-only language models can be experts: leave it out")
