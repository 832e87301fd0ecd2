"""A loaded checkpoint as lm-evaluation-harness's `LM`: greedy, batched, remembering what it has written.

Prompts are padded on the left with a mask, so that neither a batch's other prompts nor its padding change what a model reads; a
sequence-routed model routes each prompt by itself and keeps to that. Shapes: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from moerge.errors import InputError
from moerge.evaluation.records import Records
from moerge.runtime.loading import Loaded
from moerge.texts import Conversation, end_token, render

if TYPE_CHECKING:
    import torch

_CONTEXT_TOKENS = 8
"""Tokens of the prompt that are decoded with the response: some tokenizers drop the space in front of a text's first word."""


class GreedyModel(LM):  # type: ignore[misc, unused-ignore]
    """The harness's view of a model: continue these prompts until one of these strings, or for so many tokens.

    `truncated` counts prompts that had to lose their beginning to fit into the model's context with the new tokens. Batches are
    the same whether or not some responses are in `records` already, so that a resumed run ends as an uninterrupted one.
    """

    def __init__(
        self,
        loaded: Loaded,
        records: Records,
        *,
        batch_size: int,
        context: int,
        chat: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self._loaded, self._records, self._batch_size, self._context = loaded, records, batch_size, context
        self._advance = advance
        self.truncated = 0
        self._settings = plain_settings(loaded, chat=chat)
        self._chat = chat

    @property
    def tokenizer_name(self) -> str:
        """Return the harness's name for the template."""
        return self._loaded.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template itself, as the harness notes it down."""
        return str(self._loaded.tokenizer.get_chat_template())

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write the harness's turns, examples and the question, as the model's chat template does."""
        return render(self._loaded.tokenizer, Conversation(tuple(chat_history)), ask=add_generation_prompt)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """A response for each request, in order. InputError if the new tokens alone fill the model's context."""
        prompts = [request.args[0] for request in requests]
        stops, new_tokens = _generation(requests)
        room = self._context - new_tokens
        if room < 1:
            raise InputError(
                f"{self._loaded.name} takes {self._context} tokens in all: no room for a prompt and {new_tokens} new ones, "
                "choose a smaller --max-new-tokens"
            )
        options = {"add_special_tokens": False} if self._chat else {}  # a template has written them
        ids = [self._loaded.tokenizer(prompt, verbose=False, **options)["input_ids"] for prompt in prompts]
        for tokens in ids:
            self._loaded.check_ids(tokens)
        self.truncated = sum(len(tokens) > room for tokens in ids)
        ids = [tokens[-room:] for tokens in ids]
        keys = [Records.key(prompt, stops, new_tokens) for prompt in prompts]
        for batch in _batches(ids, self._batch_size):
            if not all(keys[index] in self._records for index in batch):
                texts = self._continue([ids[index] for index in batch], stops, new_tokens)
                self._records.add({keys[index]: text for index, text in zip(batch, texts, strict=True)})
            self._advance(len(batch))
        return [str(self._records[key]) for key in keys]

    def _continue(self, ids: Sequence[list[int]], stops: Sequence[str], new_tokens: int) -> list[str]:
        import torch
        from transformers import StoppingCriteriaList

        width, device = max(map(len, ids)), self._loaded.model.device
        pad = self._settings.pad_token_id
        ids_BT = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in ids], device=device)
        mask_BT = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in ids], device=device)
        self._settings.max_new_tokens = new_tokens
        stopping = StoppingCriteriaList([_Stops(self._loaded.tokenizer, stops, width)])
        with torch.inference_mode():
            out_BT = self._loaded.model.generate(
                ids_BT, attention_mask=mask_BT, generation_config=self._settings, stopping_criteria=stopping
            )
        return [self._text(tokens, row, stops) for tokens, row in zip(ids, out_BT[:, width:].tolist(), strict=True)]

    def _text(self, prompt: list[int], new: list[int], stops: Sequence[str]) -> str:
        ends = _end_tokens(self._settings)
        new = new[: next((index for index, token in enumerate(new) if token in ends), len(new))]
        decode = self._loaded.tokenizer.decode
        before = decode(prompt[-_CONTEXT_TOKENS:], skip_special_tokens=True)
        whole = decode(prompt[-_CONTEXT_TOKENS:] + new, skip_special_tokens=True)
        text = whole[len(before) :] if whole.startswith(before) else decode(new, skip_special_tokens=True)
        cuts = [text.index(stop) for stop in stops if stop in text]
        return str(text[: min(cuts)] if cuts else text)

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not needed by any of the six benchmarks."""
        raise NotImplementedError("the benchmarks of moerge eval generate text")

    loglikelihood_rolling = loglikelihood


def _generation(requests: Sequence[Any]) -> tuple[tuple[str, ...], int]:
    first = requests[0].args[1]
    assert all(request.args[1] == first for request in requests), "a benchmark asks all its questions in one way"
    return tuple(first["until"]), int(first["max_gen_toks"])


def _batches(ids: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, the longest first: if memory is short, that shows at once."""
    order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def plain_settings(loaded: Loaded, *, chat: bool = False) -> Any:
    """Greedy decoding without what a checkpoint's own settings add to it, such as a repetition penalty.

    With `chat` the token that the chat template writes behind answers ends them too.
    """
    from transformers import GenerationConfig

    own = loaded.model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else loaded.tokenizer.eos_token_id
    if chat and (written := end_token(loaded.tokenizer)) is not None:
        end = sorted({written, *(end if isinstance(end, list) else [] if end is None else [end])})
    settings: Any = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=end, bos_token_id=own.bos_token_id)  # type: ignore[no-untyped-call]
    settings.pad_token_id = loaded.tokenizer.pad_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = next(iter(sorted(_end_tokens(settings))), 0)
    loaded.model.generation_config = settings  # else generate() fills in what these leave open from there
    return settings


def _end_tokens(settings: Any) -> frozenset[int]:
    end = settings.eos_token_id
    return frozenset(end if isinstance(end, list) else [] if end is None else [end])


class _Stops:
    """transformers' stopping criterion: a row is done once one of the strings is among what it has written."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self._tokenizer, self._stops, self._width = tokenizer, stops, width
        self._longest = max((len(stop.encode()) for stop in stops), default=0)
        self._done: list[bool] = []

    def __call__(self, ids_BT: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        import torch

        self._done = self._done or [False] * len(ids_BT)
        # a token is a byte at least, so a stop that has just been completed lies within as many tokens as it has bytes
        recent = ids_BT[:, max(self._width, ids_BT.shape[1] - self._longest - 1) :].tolist()
        texts = self._tokenizer.batch_decode(recent, skip_special_tokens=True)
        self._done = [done or any(stop in text for stop in self._stops) for done, text in zip(self._done, texts, strict=True)]
        return torch.tensor(self._done, device=ids_BT.device)
