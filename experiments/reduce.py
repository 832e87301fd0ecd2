"""Mixtures of 8 experts with 6, 5 and 4: which score, prune or fold, the router as it was or fitted, whose text decides.

    python experiments/reduce.py --seeds 0 1 2 --work DIR --results experiments/results/reduce.json

For each seed: train the demo's base and, from it, two experts of each domain on other batches, build a Mixtral of them and
the base with a ridge router (`built`); with `--mixtures tuned` also one of 8 copies of the base that is tuned as a whole. Every
row reduces the same mixture by text of the training part. Measured on held-out text: perplexity by domain, exact answers to
arithmetic, and the share of continuations that end in a loop. Statistics are gathered once for each choice of text. What lies in
DIR is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import BATCH, markdown, spread

import moerge
from moerge.demonstration.evaluate import perplexities
from moerge.demonstration.runtime import import_torch, load, settled
from moerge.demonstration.text import DOMAINS, Corpus, make_corpora, write_corpora
from moerge.demonstration.train import TRAININGS, WINDOW, Training, _new_model, _steps, pack, train_model, train_tokenizer
from moerge.runtime.loading import load_tokenizer

EXPERTS = {f"{domain}{copy}": domain for copy in (1, 2) for domain in ("math", "code", "knowledge")} | {"general": "general"}
"""Seven experts and the base: every domain twice, so that some experts are related."""
SIZES = (6, 5, 4)
TEXTS = {"all": DOMAINS, "math only": ("math",)}
PROMPTS, ANSWER_TOKENS, LOOP_TOKENS, LOOP_TIMES = 24, 48, 4, 4
HELDOUT_CHARACTERS = 12_000
"""Of each domain, at most, so that a row takes seconds."""
AVERAGE = {"merge": "average"}
SCORES = ("reap", "man", "msan", "ean", "easy_ep", "gate", "frequency", "mone", "random")


@dataclass(frozen=True)
class Row:
    """One way to reduce: settings of `reduce`, and whose text decides."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    texts: str = "all"


ROWS = {
    **{score: Row({"score": score}) for score in SCORES},
    "reap, worst first": Row({"inverse": True}),
    "reap, union of domains": Row({"domains": "union"}),
    "reap, fitted router": Row({"router": "fit"}),
    "average, ream": Row(AVERAGE),
    "average, hierarchical": Row({**AVERAGE, "groups": "hierarchical"}),
    "average, k-means": Row({**AVERAGE, "groups": "kmeans"}),
    "aligned, hierarchical": Row({"merge": {"method": "average", "align": True}, "groups": "hierarchical"}),
    "subspace 64, hierarchical": Row({"merge": {"method": "subspace", "rank": 64}, "groups": "hierarchical"}),
    "fitted, hierarchical": Row({"merge": "fitted", "groups": "hierarchical"}),
    "average, hierarchical, fitted router": Row({**AVERAGE, "groups": "hierarchical", "router": "fit"}),
    "fitted, hierarchical, fitted router": Row({"merge": "fitted", "groups": "hierarchical", "router": "fit"}),
    "reap, math text only": Row(texts="math only"),
}


def main() -> None:
    """Run the seeds and write JSON and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mixtures", nargs="+", choices=["built", "tuned"], default=["built"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--scale", type=float, default=0.5, help="multiplies text and the experts' training steps")
    parser.add_argument("--steps", type=int, default=400, help="steps that the tuned mixture is tuned")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "reduce.json")
    options = parser.parse_args()
    import_torch()
    rows: list[dict[str, Any]] = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    done = {(row["mixture"], row["seed"]) for row in rows}
    for seed in options.seeds:
        folder = options.work.absolute() / f"seed-{seed}-scale-{options.scale:g}"
        corpora = make_corpora(seed, scale=options.scale)
        train(corpora, folder, seed, options.scale)
        corpora = {domain: Corpus(corpus.train, list(first(corpus.heldout))) for domain, corpus in corpora.items()}
        for mixture in (name for name in options.mixtures if (name, seed) not in done):
            make(mixture, folder, seed, options.steps)
            for row in measured(mixture, folder, corpora, seed, options.sizes):
                rows.append({"mixture": mixture, "seed": seed, **row})
                write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """JSON and tables of what is measured so far."""
    settings = {"scale": options.scale, "steps": options.steps, "moerge": version("moerge")}
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    options.results.with_suffix(".md").write_text(tables(rows), encoding="utf-8")


def first(documents: list[str]) -> Iterator[str]:
    """The first of them, the last one cut, as many as are measured on."""
    left = HELDOUT_CHARACTERS
    for document in documents:
        if left > 0:
            yield document[:left]
        left -= len(document)


def train(corpora: dict[str, Corpus], folder: Path, seed: int, scale: float) -> None:
    """The base and its experts, unless they are there."""
    if (folder / "trained").exists():
        return
    write_corpora(corpora, folder / "text")
    tokenizer = train_tokenizer(corpora)
    streams = {domain: pack(tokenizer, corpus.train) for domain, corpus in corpora.items()}
    base = folder / "models" / "base"
    for number, (name, domain) in enumerate({"base": "", **EXPERTS}.items()):
        training = TRAININGS.get(domain or "base", Training({"general": 1.0}, TRAININGS["math"].steps, 1e-3))
        with settled(100 * seed + number):
            model: Any = load(base) if domain else _new_model(tokenizer)
            losses = list(train_model(model, training, streams, _steps(training, scale)))
            print(f"seed {seed}: {name}, loss {losses[-1]:.2f}", flush=True)
            model.save_pretrained(folder / "models" / name)
            tokenizer.save_pretrained(folder / "models" / name)
    (folder / "trained").touch()


def make(mixture: str, folder: Path, seed: int, steps: int) -> None:
    """The mixture in `folder/mixture`, unless it is there."""
    target = folder / mixture
    if target.exists():
        return
    base, text = str(folder / "models" / "base"), folder / "text"
    if mixture == "built":
        experts = {name: str(folder / "models" / name) for name in EXPERTS}
        calibration = {name: str(text / domain / "train.jsonl") for name, domain in {"base": "general", **EXPERTS}.items()}
        router = {"kind": "ridge", "texts": 30, "tokens": WINDOW}
        recipe = {"base": base, "experts": experts, "merge": {"method": "average"}, "calibration": calibration}
        moerge.merge({**recipe, "moe": {"top_k": 2, "router": router}}, target)
        return
    copies = {f"copy{number}": base for number in range(8)}
    start = folder / "copies"
    moerge.merge({"experts": copies, "moe": {"top_k": 2, "router": {"kind": "random", "seed": seed}}}, start, force=True)
    data = {domain: {"path": str(text / domain / "train.jsonl"), "weight": 1.0} for domain in DOMAINS}
    settings = {"model": str(start), "data": data, "steps": steps, "batch": BATCH, "length": WINDOW, "seed": seed}
    moerge.tune({**settings, "learning_rate": 1e-3, "losses": {"load_balance": 0.01}, "save_dtype": "float32"}, target)


def measured(
    mixture: str, folder: Path, corpora: Mapping[str, Corpus], seed: int, sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The figures of the mixture and of everything that is made of it."""
    whole = folder / mixture
    yield {"row": "all 8", "experts": 8, **figures(whole, corpora)}
    for size in sizes:
        for name, row in ROWS.items():
            out = folder / f"{mixture}-reduced"
            shutil.rmtree(out, ignore_errors=True)
            calibration = {domain: str(folder / "text" / domain / "train.jsonl") for domain in TEXTS[row.texts]}
            gathered = folder / f"{mixture}-statistics" / row.texts.replace(" ", "-")
            settings = {"experts": size, "texts": 40, "tokens": WINDOW, "seed": seed, "protect": "none", **row.settings}
            settings |= {"statistics": str(gathered), "similarity_tokens": 2048}
            moerge.reduce({"model": str(whole), "reduce": settings, "calibration": calibration}, out, force=True)
            found = {"row": name, "experts": size, **figures(out, corpora)}
            print(f"seed {seed}, {mixture}, {size} experts, {name}: {found['perplexity']:.3f}", flush=True)
            yield found


def figures(checkpoint: Path, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """Held-out perplexities, exact answers, loops."""
    by_domain = perplexities(checkpoint, corpora)
    mean = math.exp(statistics.fmean(map(math.log, by_domain.values())))
    exact, loops = generation(checkpoint, corpora)
    return {"perplexity": mean, "by_domain": by_domain, "exact": exact, "loops": loops}


def generation(checkpoint: Path, corpora: Mapping[str, Corpus]) -> tuple[float, float]:
    """Shares of held-out problems whose answer is right, and of greedy continuations in which some tokens come back often."""
    import torch

    problems = [problem.partition("\n") for text in corpora["math"].heldout for problem in text.split("\n\n")][:PROMPTS]
    prompts = [f"{question}\n" for question, _, _ in problems]
    starts = [
        " ".join(text.split()[:20]) for domain in ("general", "knowledge") for text in corpora[domain].heldout[: PROMPTS // 4]
    ]
    with settled(), torch.inference_mode():
        model, tokenizer = load(checkpoint).eval(), load_tokenizer(checkpoint)
        tokenizer.padding_side = "left"
        encoded = tokenizer(prompts + starts, return_tensors="pt", padding=True)
        fed = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        output = model.generate(**fed, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        rows = output[:, fed["input_ids"].shape[1] :].tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    right = [_answer(text) == _answer(rest) for text, (_, _, rest) in zip(texts, problems, strict=False)]
    return statistics.fmean(right), statistics.fmean(_loops(row) for row in rows)


def _answer(text: str) -> str:
    """What stands behind "Answer:" in the first problem."""
    return text.partition("\n\n")[0].partition("Answer:")[2].strip()


def _loops(tokens: list[int]) -> bool:
    runs = Counter(tuple(tokens[start : start + LOOP_TOKENS]) for start in range(len(tokens) - LOOP_TOKENS + 1))
    return max((count for run, count in runs.items() if len(set(run)) > 1), default=0) >= LOOP_TIMES


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: means and deviations over seeds, and the paired difference from reap in percent."""
    lines = ["# Reduced mixtures", ""]
    for mixture in dict.fromkeys(row["mixture"] for row in rows):
        own = [row for row in rows if row["mixture"] == mixture]
        seeds = sorted({row["seed"] for row in own})
        whole = [row for row in own if row["experts"] == 8]
        lines += [f"## {mixture}, {len(seeds)} seeds", "", f"All 8: perplexity {spread([row['perplexity'] for row in whole])}, "]
        lines[-1] += f"exact {spread([row['exact'] for row in whole])}, loops {spread([row['loops'] for row in whole])}"
        for size in sorted({row["experts"] for row in own} - {8}, reverse=True):
            lines += ["", f"### {size} experts", "", *_table([row for row in own if row["experts"] == size])]
        lines.append("")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    reap = {row["seed"]: row["perplexity"] for row in rows if row["row"] == "reap"}
    found = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        against = [100 * (row["perplexity"] / reap[row["seed"]] - 1) for row in own]
        domains = [spread([row["by_domain"][domain] for row in own]) for domain in DOMAINS]
        shares = [spread([row[key] for row in own]) for key in ("exact", "loops")]
        found.append([name, spread([row["perplexity"] for row in own]), f"{spread(against, 1)}%", *domains, *shares])
    return markdown(["", "perplexity", "against reap", *DOMAINS, "exact", "loops"], found)


if __name__ == "__main__":
    main()
