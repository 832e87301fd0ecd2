"""Running one model over text and adding up what its layers see. Shapes: B sequences, T tokens, I inputs, V vocabulary.

torch is imported only when a model runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from moerge.errors import InputError, MachineError
from moerge.gather.places import Place, places_of
from moerge.methods.regmean import triangle
from moerge.runtime.inputs import Inputs, model_inputs, on_device, text_tokens
from moerge.statistics.facts import Gram, Kind, Settings
from moerge.statistics.files import stored_name
from moerge.tensors.source import Source
from moerge.tensors.streams import read_values
from moerge.tensors.tensor import Tensor
from moerge.texts import Document, text_of

if TYPE_CHECKING:
    import torch

Advance = Callable[[int], None]
"""Told the number of tokens that were run."""

_LAST_INPUTS = 4
"""Layers that read one input, such as query, key and value, run soon after each other."""


class TokenSequence(NamedTuple):
    """A document's tokens, a number that depends on its text alone, which tokens are text, and what the model takes beside."""

    ids: list[int]
    seed: int
    text: list[bool]
    beside: Inputs = MappingProxyType({})


@dataclass(frozen=True)
class Sequences:
    """Tokenised documents."""

    documents: tuple[TokenSequence, ...]

    @property
    def ids(self) -> list[list[int]]:
        """Return the tokens, one list a document."""
        return [document.ids for document in self.documents]

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        return sum(len(document.ids) for document in self.documents)

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all but the first of each document, and no images."""
        return sum(sum(document.text[1:]) for document in self.documents)

    def batches(self, size: int) -> Iterator[tuple[list[list[int]], Inputs]]:
        """Tokens of up to `size` documents that run together, or of one, and what that one has beside them."""
        waiting: list[list[int]] = []
        for document in self.documents:
            if waiting and (document.beside or len(waiting) == size):
                yield waiting, {}
                waiting = []
            if document.beside:
                yield [document.ids], document.beside
            else:
                waiting.append(document.ids)
        if waiting:
            yield waiting, {}


def tokenized(tokenizer: Any, documents: Sequence[Document], tokens: int) -> Sequences:
    """The first `tokens` tokens of each document, as the tokenizer starts a text; documents of a single token are left out."""
    found = []
    for document in documents:
        beside = model_inputs(tokenizer, document, tokens)
        ids = beside.pop("input_ids")[0].tolist()
        seed = xxhash.xxh3_64_intdigest(text_of(document).encode())
        found.append(TokenSequence(ids, seed, text_tokens(tokenizer, ids), beside))
    return Sequences(tuple(one for one in found if len(one.ids) > 1))


@dataclass(frozen=True)
class Layout:
    """The statistics that a model allows: parameters by their names in memory, and linear layers by their weights' stored names.

    `grams` says where each linear layer's Gram matrix lies: layers that share inputs share it. `shapes` are those of the sums
    in the file, `bytes` the memory of each sum while it is gathered, by kind and name: Fisher information in float32, by the
    parameter's name in memory, Gram matrices in float64, by that of the file.
    """

    places: Mapping[str, Place]
    linear: Mapping[str, Any]
    grams: Mapping[str, Gram]
    fisher: frozenset[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sums to store."""
        import torch

        found: dict[str, tuple[int, ...]] = {}
        for name, gram in self.grams.items():
            if gram.stored == stored_name("gram", name):
                found[gram.stored] = (triangle(self._inputs(name)),)
        for place in self.places.values():
            parts = place.split(torch.empty(place.parameter.shape, device="meta"))
            found |= {stored_name("fisher", name): tuple(part.shape) for name, part in parts.items() if name in self.fisher}
        return found

    @property
    def bytes(self) -> dict[str, int]:
        """The sums to gather."""
        owners = [name for name, gram in self.grams.items() if gram.stored == stored_name("gram", name)]
        grams = {stored_name("gram", name): 8 * self._inputs(name) ** 2 for name in owners}
        return grams | {stored_name("fisher", name): 4 * place.parameter.numel() for name, place in self.places.items()}

    def _inputs(self, name: str) -> int:
        return int(self.linear[name].weight.shape[self.grams[name].axis])

    def split(self, name: str, total: torch.Tensor) -> dict[str, torch.Tensor]:
        """A sum that was gathered as those that are stored, by their names in the file."""
        if name.startswith("gram:"):
            return {name: total}
        parts = self.places[name.removeprefix("fisher:")].split(total)
        return {stored_name("fisher", stored): part for stored, part in parts.items() if stored in self.fisher}


def adapt(model: Any, tensors: Mapping[str, Tensor], vocabulary: int | None) -> None:
    """Put other values into a model's parameters, by the checkpoint's names, after resizing its vocabulary.

    Raises InputError for a tensor that is not a parameter in transformers.
    """
    import torch

    if vocabulary not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(vocabulary)
    places = {place.whole: place for place in places_of(model, tensors).values()}
    absent = next((name for name in tensors if name not in places), None)
    if absent:
        raise InputError(
            f"transformers has no parameter for tensor {absent!r}: merge this adapter first, and gather of the result"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            values_N = read_values(Source("adapter", tensor))
            places[name].parameter.copy_(torch.from_numpy(values_N).reshape(tensor.shape))


def layout_of(
    model: Any,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[Kind, frozenset[str]],
    sample: list[int],
    beside: Inputs = MappingProxyType({}),
) -> Layout:
    """The sums to gather of a model for the tensors `wanted` by kind.

    Tokens `sample` run through it, with what it takes `beside`, to see who shares inputs.
    """
    places = places_of(model, tensors)
    fisher, gram = wanted.get("fisher", frozenset()), wanted.get("gram", frozenset())
    used = {name: place for name, place in places.items() if fisher & set(place.stored)}
    linear = {}
    if gram:
        by_parameter = {id(place.parameter): place.whole for place in places.values()}
        embedding = getattr(model.get_input_embeddings(), "weight", None)
        for module in model.modules():
            name = by_parameter.get(id(getattr(module, "weight", None)))
            if name in gram and _axis(module) is not None and module.weight is not embedding:
                linear[str(name)] = module
    having = frozenset(name for place in used.values() for name in place.stored)
    return Layout(used, linear, _shared_inputs(model, linear, sample, beside), fisher & having)


def _axis(module: Any) -> Any:
    """Return the axis of a linear layer's weight that its inputs are on; None for other modules."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return 1 if isinstance(module, torch.nn.Linear) else 0 if isinstance(module, Conv1D) else None


def _shared_inputs(model: Any, linear: Mapping[str, Any], sample: list[int], beside: Inputs) -> dict[str, Gram]:
    """Each layer's Gram matrix: the first one's for layers given the very same tensor, none for layers that never run."""
    import torch

    recent: deque[tuple[Any, str]] = deque(maxlen=_LAST_INPUTS)
    found: dict[str, Gram] = {}

    def look(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
        owner = next((known for inputs, known in recent if inputs is arguments[0]), None)
        if owner is None:
            recent.append((arguments[0], name))
        found.setdefault(name, Gram(stored=stored_name("gram", owner or name), axis=_axis(module)))

    with torch.no_grad(), _watched({name: (module, partial(look, name)) for name, module in linear.items()}):
        if linear:
            options = on_device(beside, model.device, model.dtype)
            model(input_ids=_batch([sample], model.device)[0], use_cache=False, **options)
    return found


@contextmanager
def _watched(looks: Mapping[str, tuple[Any, Callable[..., None]]]) -> Iterator[None]:
    with ExitStack() as handles:
        for module, look in looks.values():
            handles.callback(module.register_forward_pre_hook(look).remove)
        yield


def _batch(sequences: Sequence[list[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one tensor [B, T] of tokens, padded at the end, and where they are tokens."""
    import torch

    longest = max(map(len, sequences))
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=device)
    mask_BT = torch.tensor([[True] * len(ids) + [False] * (longest - len(ids)) for ids in sequences], device=device)
    return ids_BT, mask_BT


def gram_sums(
    model: Any, layout: Layout, names: Sequence[str], sequences: Sequences, *, batch_size: int, advance: Advance
) -> dict[str, torch.Tensor]:
    """sum of x^T x over the inputs x of some linear layers, by stored name: float64 [I, I], each text's share in float32."""
    import torch

    sums: dict[str, torch.Tensor] = {}
    tokens_N: list[torch.Tensor] = []

    def look(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
        state = arguments[0].detach()
        state_TI = state.reshape(-1, state.shape[-1])
        if len(state_TI) == tokens_N[0].numel():
            state_TI = state_TI[tokens_N[0]]
        state_TI = state_TI.float()
        share_II = state_TI.T @ state_TI
        if share_II.device.type == "mps":  # has no float64
            share_II = share_II.cpu()
        sums[name] = sums[name].add_(share_II) if name in sums else share_II.double()

    owners = {gram.stored: name for name, gram in layout.grams.items() if gram.stored == stored_name("gram", name)}
    looks = {name: (layout.linear[owners[name]], partial(look, name)) for name in names}
    with torch.no_grad(), _watched(looks):
        for batch, beside in sequences.batches(batch_size):
            ids_BT, mask_BT = _batch(batch, model.device)
            tokens_N[:] = [mask_BT.reshape(-1)]
            options = on_device(beside, model.device, model.dtype)
            options |= {} if bool(mask_BT.all()) else {"attention_mask": mask_BT.long()}
            model(input_ids=ids_BT, use_cache=False, **options)
            advance(sum(map(len, batch)))
    return sums


def fisher_sums(
    model: Any, layout: Layout, names: Sequence[str], sequences: Sequences, settings: Settings, *, advance: Advance
) -> dict[str, torch.Tensor]:
    """sum over sequences of the squared gradient of log p(sequence), by the parameters' names in memory, in float32.

    log p is the sum of the log-probabilities of all tokens but the first given those before them, images left out: the
    text's own, or with `labels: sampled` tokens drawn from the model. One sequence at a time: a square of a mean is no mean of
    squares.
    """
    import torch

    chosen = {name: layout.places[name.removeprefix("fisher:")].parameter for name in names}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in chosen.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def add(name: str, parameter: Any) -> None:
        gradient = parameter.grad.float()
        sums[name].addcmul_(gradient, gradient)
        parameter.grad = None

    with ExitStack() as handles:
        for name, parameter in chosen.items():
            parameter.requires_grad_(True)
            handles.callback(parameter.register_post_accumulate_grad_hook(partial(add, name)).remove)
        for ids, seed, text, beside in sequences.documents:
            ids_1T, _ = _batch([ids], model.device)
            options = on_device(beside, model.device, model.dtype)
            logits_TV = model(input_ids=ids_1T, use_cache=False, **options).logits[0, :-1].float()
            labels_T = ids_1T[0, 1:] if settings.labels == "text" else _drawn(logits_TV, settings.seed, seed)
            labels_T = labels_T.masked_fill(~torch.tensor(text[1:], device=labels_T.device), -100)
            loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
            if loss.requires_grad:  # not if none of these parameters takes part
                loss.backward()  # type: ignore[no-untyped-call]
            advance(len(ids))
    return sums


def _drawn(logits_TV: torch.Tensor, *seeds: int) -> torch.Tensor:
    """A token for each position from the model's distribution, the same whatever other texts are run."""
    import torch

    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(repr(seeds).encode()) % (1 << 63))
    probabilities_TV = logits_TV.detach().softmax(dim=-1).cpu()
    return torch.multinomial(probabilities_TV, 1, generator=generator)[:, 0].to(logits_TV.device)


@contextmanager
def enough_memory(expert: str) -> Iterator[None]:
    """Turns running out of a GPU's memory into a MachineError."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise MachineError(
            f"{expert}: the GPU's memory does not suffice: try more --passes, fewer --tokens, --dtype bfloat16 or --device cpu"
        ) from None


def check_finite(expert: str, name: str, total: torch.Tensor) -> None:
    """InputError if a sum overflowed or the model computes NaN."""
    import torch

    if not bool(torch.isfinite(total).all()):
        raise InputError(
            f"{expert}: the sums for {name.partition(':')[2]!r} are not finite: gather with --dtype float32, "
            "or check the model with 'moerge verify'"
        )
