"""MergeME's section 5.2 in small: the demo's Llamas and a GPT-NeoX with another tokenizer as one model.

    python experiments/heterogeneous.py --seeds 0 1 2 --tokenizer TOKENIZER --work DIR

For each seed: train the demo's base and experts, and in place of its math expert a GPT-NeoX of another depth and width on the
same text with TOKENIZER (a folder that transformers reads: Mistral's, say). Assemble the base, the code and the knowledge expert
and this one with random projectors, with fitted ones and with separate embeddings, and measure bits per byte of held-out text of
every domain, beside each expert alone; then again after 0.5, 1 and 2 million tokens of fine-tuning. The optimiser starts anew at
each of these points. What is finished in --work is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from common import markdown, spread, train_demo, tuning_settings
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import moerge
from moerge.demonstration.progress import counting
from moerge.demonstration.runtime import import_torch, settled
from moerge.demonstration.text import DOMAINS, Corpus, make_corpora
from moerge.demonstration.train import TRAININGS, WINDOW, Training, pack, train_model
from moerge.evaluation.likelihood import document_losses
from moerge.runtime.loading import load
from moerge.tuning.run import tune

LLAMAS = ("base", "code", "knowledge")
ODD = "math-neox"
OWN = {"general": "base", "math": ODD, "code": "code", "knowledge": "knowledge"}
"""The expert of each domain."""
ODD_TRAINING = Training(TRAININGS["math"].mixture, steps=500, learning_rate=3e-3)
LEGS = (500_000, 500_000, 1_000_000)
"""Tokens between the points at which tuning is measured."""
TOKENS = (0, *accumulate(LEGS))
GIVEN, CALIBRATION = 256, 60
"""Characters at the beginning of a document that are read but not predicted; texts of each expert for the fit."""
RIDGE, BY_PERPLEXITY = {"kind": "ridge"}, {"kind": "perplexity"}
ROWS: Mapping[str, Mapping[str, Any]] = {
    "random": {"projectors": "random", "router": {"kind": "random"}},
    "fitted": {"projectors": "fitted", "router": RIDGE},
    "fitted, no text": {"projectors": "fitted", "router": BY_PERPLEXITY},
    "fitted, by perplexity": {"projectors": "fitted", "router": BY_PERPLEXITY},
    "fitted, top 1": {"projectors": "fitted", "router": RIDGE, "top_k": 1},
    "separate": {"embedding": "separate", "router": RIDGE},
    "separate, by perplexity": {"embedding": "separate", "router": BY_PERPLEXITY},
    "separate, top 1": {"embedding": "separate", "router": RIDGE, "top_k": 1},
}
TUNED = ("random", "fitted", "separate")
Bits = dict[str, float]
"""Bits per byte by domain."""


def main() -> None:
    """Run the seeds, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies text and the models' training steps")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the GPT-NeoX's tokenizer")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="the paper's 1e-5 is for a billion parameters")
    parser.add_argument("--documents", type=int, default=40, help="held-out documents of each domain, at most")
    parser.add_argument("--untuned", action="store_true", help="leave fine-tuning out")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "heterogeneous.json")
    options = parser.parse_args()
    import_torch()
    found: dict[str, dict[int, list[Bits]]] = {}
    for seed in options.seeds:
        begun = time.perf_counter()
        for name, points in run_seed(seed, options).items():
            found.setdefault(name, {})[seed] = points
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
        report(found, options)


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, list[Bits]]:
    """Every row's points: one for what is not tuned."""
    folder = options.work.absolute() / f"seed-{seed}-scale-{options.scale:g}"
    corpora = make_corpora(seed, scale=options.scale)
    train(corpora, folder, seed, options)
    heldout = {domain: corpora[domain].heldout[: options.documents] for domain in DOMAINS}
    models = {name: folder / "models" / name for name in (*LLAMAS, ODD)}
    found = {f"{name} alone": [measure(model, heldout)] for name, model in models.items()}
    for name, moe in ROWS.items():
        out = folder / "heterogeneous" / "".join(letter if letter.isalnum() else "-" for letter in name)
        if not out.exists():
            moerge.merge(recipe(folder, name, moe, seed), out)
        found[name] = [measure(out, heldout)]
        if name in TUNED and not options.untuned:
            found[name] += [measure(tuned, heldout) for tuned in legs(out, folder, seed, options)]
        print(f"seed {seed}, {name}: {', '.join(f'{mean(point):.3f}' for point in found[name])} bits per byte", flush=True)
    return found


def train(corpora: Mapping[str, Corpus], folder: Path, seed: int, options: argparse.Namespace) -> None:
    """The demo's models and the odd one, unless `folder` holds them."""
    train_demo(corpora, folder, seed, options.scale)
    if not (folder / "models" / ODD).exists():
        train_odd(corpora, folder / "models" / ODD, seed, options)


def train_odd(corpora: Mapping[str, Corpus], out: Path, seed: int, options: argparse.Namespace) -> None:
    """A GPT-NeoX with another tokenizer, deeper and narrower than the Llamas, from scratch."""
    import torch
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(options.tokenizer)
    with settled(seed):
        streams = {domain: pack(tokenizer, corpus.train) for domain, corpus in corpora.items()}
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=2 * WINDOW,
            initializer_range=0.06,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
        model: Any = GPTNeoXForCausalLM(config)
        steps = max(1, round(options.scale * ODD_TRAINING.steps))
        with counting(steps) as advance:
            for loss in train_model(model, ODD_TRAINING, streams, steps):
                advance(f"{ODD}, loss {loss:.2f}")
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)


def recipe(folder: Path, name: str, moe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """How a row is assembled; the calibration text is the experts' own training text."""
    found: dict[str, Any] = {
        "base": str(folder / "models" / "base"),
        "experts": {expert: str(folder / "models" / expert) for expert in (*LLAMAS[1:], ODD)},
        "moe": {"format": "moerge", "top_k": 2, **moe},
    }
    if "router" in moe and moe["router"]["kind"] == "random":
        found["moe"]["router"] = {"kind": "random", "seed": seed}
    if moe.get("projectors") == "random" or "no text" in name or name == "separate, by perplexity":
        return found
    return {**found, "calibration": {OWN[domain]: str(_calibration(folder, domain)) for domain in DOMAINS}}


def _calibration(folder: Path, domain: str) -> Path:
    """A few training texts of a domain."""
    path = folder / "text" / domain / "calibration.jsonl"
    if not path.exists():
        with open(folder / "text" / domain / "train.jsonl", encoding="utf-8") as lines:
            path.write_text("".join(line for line, _ in zip(lines, range(CALIBRATION), strict=False)), encoding="utf-8")
    return path


def legs(merged: Path, folder: Path, seed: int, options: argparse.Namespace) -> list[Path]:
    """The checkpoints after each leg of tuning."""
    found, tokens = [merged], 0
    for number, leg in enumerate(LEGS):
        tokens += leg
        out = merged.with_name(f"{merged.name}-tuned-{tokens}-{options.learning_rate:g}")
        if not out.exists():
            settings = tuning_settings(found[-1], folder, leg, 10 * seed + number, options.learning_rate)
            tune(settings, out, resume=True)
        found.append(out)
    return found[1:]


def measure(checkpoint: Path, heldout: Mapping[str, Sequence[str]]) -> Bits:
    """Bits per byte by domain; a routed model routes on the beginning that is not counted."""
    loaded = load(checkpoint, dtype="float32")
    found = {}
    for domain, documents in heldout.items():
        losses = document_losses(loaded, documents, window=WINDOW, given=GIVEN, batch_size=8)
        found[domain] = sum(loss.nats for loss in losses) / sum(loss.bytes for loss in losses) / math.log(2)
    return found


def mean(bits: Bits) -> float:
    """Of all domains."""
    return statistics.fmean(bits.values())


def report(found: Mapping[str, Mapping[int, Sequence[Bits]]], options: argparse.Namespace) -> None:
    """Print means and spreads over seeds, domain by domain, and write everything as JSON and the table as Markdown."""
    header, rows = ["model", "tokens tuned", "seeds", *DOMAINS, "mean"], list(_rows(found))
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "results", "tokenizer")}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    written = {"settings": settings, "tokens": TOKENS, "bits_per_byte": found}
    options.results.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    lines = ["Bits per byte of held-out text, mean ± standard deviation over seeds.", ""]
    lines += markdown(header, rows)
    options.results.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(found: Mapping[str, Mapping[int, Sequence[Bits]]]) -> Iterator[list[str]]:
    for name, by_seed in found.items():
        for point in range(max(map(len, by_seed.values()))):
            at = [points[point] for points in by_seed.values() if len(points) > point]
            cells = [spread([bits[domain] for bits in at], 3) for domain in DOMAINS]
            yield [name, f"{TOKENS[point]:,}", str(len(at)), *cells, spread([mean(bits) for bits in at], 3)]


if __name__ == "__main__":
    main()
