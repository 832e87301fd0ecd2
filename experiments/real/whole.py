"""Step 5: table 4 in small: a GPT-NeoX with another tokenizer in the math expert's place, before and after tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moerge
from moerge.tuning.run import tune

from .curves import BALANCED, CURVES, settings
from .measuring import measure
from .rows import AVERAGE, native, recipe
from .settings import DOMAINS, OWN, Budget, Work
from .training import GENERAL

ODD = "math-neox"
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Whole:
    """A mixture: what its `moe` section says beyond the format, and what is left out of it."""

    moe: Mapping[str, Any]
    odd: bool = True
    without: str | None = None


RIDGE, RANDOM = {"kind": "ridge"}, {"kind": "random"}
ROWS = {
    "with GPT-NeoX, separate embeddings, ridge": Whole({"embedding": "separate", "router": RIDGE}),
    "with GPT-NeoX, fitted projectors, ridge": Whole({"projectors": "fitted", "router": RIDGE}),
    "with GPT-NeoX, random projectors": Whole({"projectors": "random", "router": RANDOM}),
    "three experts": Whole(native(AVERAGE, "random").moe or {}, odd=False),
    "three experts, no math text": Whole(native(AVERAGE, "random").moe or {}, odd=False, without="math"),
}
"""The paper's own is random projectors; the last two are its baselines."""


def train_odd(work: Work, budget: Budget, seed: int, tokenizer: Path) -> Path:
    """A GPT-NeoX from nothing, on what the math expert was trained on."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    drawn, out = work.made(seed, "odd", "drawn"), work.expert(seed, ODD)
    if out.exists():
        return out
    kept: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    width = budget.odd_width
    config = GPTNeoXConfig(
        vocab_size=-(-len(kept) // 8) * 8,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=budget.odd_layers,
        num_attention_heads=width // 32,
        max_position_embeddings=2_048,
        bos_token_id=kept.bos_token_id,
        eos_token_id=kept.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model: Any = GPTNeoXForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(drawn)
    kept.save_pretrained(drawn)
    shares = {"math": 1 - GENERAL, "general": GENERAL}
    steps = max(1, round(budget.odd_tokens / (budget.batch * budget.length)))
    asked = {
        "model": str(drawn),
        "data": {name: {"path": str(work.text(name, f"train-{seed}")), "weight": share} for name, share in shares.items()},
        "steps": steps,
        "batch": budget.batch,
        "length": budget.length,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup": steps // 20,
        "dtype": budget.training_dtype,
        "device": budget.device,
        "seed": seed,
    }
    tune(asked, out, resume=True)
    return out


def run(work: Work, budget: Budget, seed: int, save: Callable[[dict[str, Any]], None], tokenizer: Path) -> None:
    """Every mixture, then every mixture tuned on the same sequences."""
    odd = train_odd(work, budget, seed, tokenizer)
    found: dict[str, Any] = {"documents": {ODD: measure(work, budget, seed, ODD, odd)}}
    for name, row in ROWS.items():
        out = work.made(seed, "whole", name)
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            moerge.merge(assembled(work, seed, row, odd), out)
        found["documents"][name] = measure(work, budget, seed, name, out)
        save(found)
    for name, row in ROWS.items():
        tuned = work.made(seed, "tuned", f"{name} {budget.curve_tokens}")
        if not tuned.exists():
            tuned.parent.mkdir(parents=True, exist_ok=True)
            tune(tuning(work, budget, seed, row, work.made(seed, "whole", name)), tuned, resume=True)
        found["documents"][f"{name}, tuned"] = measure(work, budget, seed, f"{name}, tuned", tuned)
        save(found)


def assembled(work: Work, seed: int, row: Whole, odd: Path) -> dict[str, Any]:
    """The recipe of a mixture of base, code and knowledge expert, and perhaps the odd one."""
    found = recipe(work, seed, native(AVERAGE, "random"))
    del found["experts"]["math"]
    if not row.odd:
        return found
    found["experts"][ODD] = str(odd)
    router = {**row.moe["router"], **({"seed": seed} if row.moe["router"]["kind"] == "random" else {})}
    found["moe"] = {"format": "moerge", "top_k": 2, **row.moe, "router": router}
    if router["kind"] == "ridge":
        owners = {**OWN, "math": ODD}
        found["calibration"] = {owners[domain]: str(work.text(domain, "calibration")) for domain in DOMAINS}
    return found


def tuning(work: Work, budget: Budget, seed: int, row: Whole, model: Path) -> dict[str, Any]:
    """As the curves are tuned, on all domains or without one."""
    found = settings(work, budget, seed, CURVES["separate attention, PPL"], LEARNING_RATE)
    for key in ("heldout", "heldout_sequences", "evaluate_every"):
        del found[key]
    found["data"] = {domain: source for domain, source in found["data"].items() if domain != row.without}
    return {**found, "model": str(model), **({} if row.odd else {"losses": BALANCED})}
