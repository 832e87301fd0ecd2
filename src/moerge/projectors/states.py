"""The states that Proj-out is given, on text. torch is imported only when the model runs.

Shapes: S states, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.operations.fitter import FitContext
from moerge.runtime.loading import load_tokenizer
from moerge.runtime.tokens import encode_checked
from moerge.texts import Document

STATES, TOKENS = 4096, 256
"""States that are wanted, and tokens of each text that are run."""


def expert_states(context: FitContext, expert: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """States float32 [S, D] on the expert's own text (else on that of all others), and the number of the text each is from [S].

    The merged model runs as far as it is complete, with this expert alone in memory: the shared embedding, its Proj-in, it.
    """
    import torch

    from moerge.runtime.single_expert import load_one_expert

    model: Any = load_one_expert(context.folder, context.experts.index(expert))
    tokenizer: Any = load_tokenizer(context.folder)
    limit = min(TOKENS, model.config.max_position_embeddings or TOKENS)
    seen: list[np.ndarray] = []
    model.projectors_out[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0][0].float().numpy()), prepend=True
    )
    texts, count = [], 0
    with torch.no_grad():
        for index, text in enumerate(_documents(context, expert)):
            ids = encode_checked(tokenizer, text, limit, rows, expert)
            if count >= STATES or not ids.size:
                continue
            model.path(0, model.make_prompt(torch.from_numpy(ids)[None], None, None, None))
            texts.append(np.full(len(seen[-1]), index))
            count += len(seen[-1])
    if not seen:
        raise InputError("calibration: no text has a token: name files with some text")
    return np.concatenate(seen)[:STATES], np.concatenate(texts)[:STATES]


def _documents(context: FitContext, expert: str) -> Iterator[Document]:
    own = context.texts.get(expert)
    if own is not None and own.documents:
        yield from own.documents
        return
    every: Sequence[Sequence[Document]] = [texts.documents for texts in context.texts.values()]
    yield from (text for text in chain.from_iterable(zip_longest(*every)) if text is not None)
