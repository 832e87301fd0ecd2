"""What routed models promise on a version of transformers: cached generation is that of recomputation, whoever loads them.

python generation.py FOLDER    prints a JSON object: check -> "ok" or what went wrong
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from transformers import AutoModelForCausalLM

from moerge.modeling import register
from moerge.modeling.versions_moerge import CACHE
from tests.modeling.routed_models import check_without_moerge, dense_experts, padded, prompts, routed

PROMPTS = {"one token": (1,), "nine tokens": (9,), "equal lengths": (6, 6, 6), "left-padded": (9, 5, 7)}
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": 63, "pad_token_id": 0, "max_new_tokens": 8}


class Refused(Exception):
    """Caches that cannot take tokens back, or not in this version: no text is better than a wrong one."""


def models() -> dict[str, Any]:
    from tests.modeling.mixed_models import mixed

    return {
        "dense cache, perplexity": routed(separate=["ffn", "attention"]),
        "dense cache, sliding windows": routed(dense_experts("qwen2"), separate=["ffn"], mix="output"),
        "mixed, shared embedding": mixed("llama", "gpt_neox", routing={"kind": "perplexity"}),
        "mixed, states and windows": mixed("mamba", "mistral", embedding="separate", routing={"kind": "uniform"}),
    }


def text(model: Any, ids: Any, mask: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, **{**OPTIONS, **options})[:, ids.shape[1] :]


def cached(model: Any, lengths: tuple[int, ...], **options: Any) -> None:
    ids, mask = padded(prompts(*lengths), "left")
    assert torch.equal(text(model, ids, mask, **options), text(model, ids, mask, use_cache=False, **options))


def in_chunks(model: Any) -> None:
    ids, mask = padded(prompts(9), "left")
    routing = model.route(ids, mask)
    assert torch.equal(text(model, ids, mask, prefill_chunk_size=4, routing=routing), text(model, ids, mask))


def assisted(model: Any) -> None:
    ids = torch.stack(prompts(4)).repeat(1, 3)
    mask = torch.ones_like(ids)
    try:
        found = text(model, ids, mask, prompt_lookup_num_tokens=3)
    except ValueError as error:
        raise Refused(str(error)) if re.search("crop|taken back", str(error)) else error from None
    assert torch.equal(found, text(model, ids, mask, use_cache=False))


def a_conversation(model: Any) -> None:
    ids = torch.stack(prompts(5))
    first = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **OPTIONS)
    more = torch.cat([first.sequences, torch.stack(prompts(4, seed=9))], 1)
    mask = torch.ones_like(more)
    again = text(model, more, mask, **{CACHE: first[CACHE]})
    assert torch.equal(again, text(model, more, mask, routing=model.route(ids), use_cache=False))


def saved(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids, mask = padded(prompts(6, 4), "left")
    assert torch.equal(text(loaded, ids, mask), text(model, ids, mask))


def without_moerge(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    check_without_moerge(model, folder)


def checks(work: Path) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for number, (kind, model) in enumerate(models().items()):
        for name, lengths in PROMPTS.items():
            found[f"{kind}: {name}"] = lambda model=model, lengths=lengths: cached(model, lengths)
        found |= {
            f"{kind}: beams": lambda model=model: cached(model, (9, 5), num_beams=3),
            f"{kind}: in chunks": lambda model=model: in_chunks(model),
            f"{kind}: assisted": lambda model=model: assisted(model),
            f"{kind}: a conversation": lambda model=model: a_conversation(model),
            f"{kind}: saved and loaded": lambda model=model, n=number: saved(model, work / "saved" / str(n)),
        }
        if number % 2 == 0:  # one of each kind: it starts a process
            place = work / "alone" / f"model{number}"
            found[f"{kind}: without moerge"] = lambda model=model, place=place: without_moerge(model, place)
    return found


def outcome(check: Callable[[], object]) -> str:
    """Run a check; a deprecation of transformers counts, as a warning or as a line of its log."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(heard):
            warnings.simplefilter("error", FutureWarning)
            check()
    except Refused as error:
        return f"refused: {error}"[:300]
    except Exception as error:  # a table has a row for everything that can go wrong
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    lines = [line for line in heard.getvalue().splitlines() if "deprecat" in line.lower()]
    return lines[0][:300] if lines else "ok"


def main(work: Path) -> None:
    register()
    results = {name: outcome(check) for name, check in checks(work).items()}
    json.dump({"checks": results}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
