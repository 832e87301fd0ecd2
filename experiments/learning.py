"""Expert Merging's table in small: learned coefficients against tuned and untuned merges of the demo's experts.

    python experiments/learning.py --seeds 0 1 2 --work DIR --results experiments/results/learning.json

For each seed: train the demo's base and experts, merge them in every way, and measure each result on held-out text of every
expert's domain: perplexity, and KL(expert || merged) in nats a token. What is tuned or learned sees N texts of each expert's
training text, N = 5, 10, 50; nothing sees the held-out text, but for the row that says so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import spread, train_demo
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import moerge
from moerge.demonstration.runtime import import_torch, load, settled
from moerge.demonstration.text import Corpus, make_corpora
from moerge.demonstration.train import pack
from moerge.learning.run import learn
from moerge.recipe import load_recipe

if TYPE_CHECKING:
    import torch

EXPERTS = ("math", "code", "knowledge")
TEXTS = (5, 10, 50)
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TUNED: dict[str, Mapping[str, Any]] = {
    "task arithmetic": {"method": "task_arithmetic"},
    "TIES, density 0.8": {"method": "ties", "density": 0.8},
    "DARE, density 0.8": {"method": "dare", "density": 0.8},
}
"""Methods whose scale is tuned."""
ROW, ROWS = 128, 40
"""Tokens of a row of held-out text, and rows of each domain."""
PUBLISHED = {"tokens": ROW, "heldout": 0.0, "gamma": 0.8}
LONGER = {"tokens": ROW, "heldout": 0.2, "gamma": 0.05, "learning_rate": 0.1, "patience": 10}
EPOCHS = {5: 30, 10: 20, 50: 5}
"""Published settings: one epoch, learning rate 0.5. Longer: many small steps, stopped by held-out calibration text."""
Measured = dict[str, float]


def main() -> None:
    """Run the seeds, print the table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies text and training steps")
    parser.add_argument("--work", type=Path, required=True, help="where models and merges are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    import_torch()
    found: dict[str, dict[int, Measured]] = {}
    for seed in options.seeds:
        begun = time.perf_counter()
        for name, measured in run_seed(seed, options.scale, options.work / f"seed-{seed}-scale-{options.scale:g}").items():
            found.setdefault(name, {})[seed] = measured
        report(found, options, Console(width=130))
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s")


def run_seed(seed: int, scale: float, folder: Path) -> dict[str, Measured]:
    """Train unless `folder` holds the models, merge, learn, measure."""
    corpora = make_corpora(seed, scale=scale)
    train_demo(corpora, folder, seed, scale)
    with settled(seed):
        heldout = {expert: _rows(folder, corpora[expert].heldout) for expert in EXPERTS}
        experts = {expert: _logits(folder / "models" / expert, heldout[expert]) for expert in EXPERTS}

        def measure(name: str) -> Measured:
            return _measure(folder / name, heldout, experts)

        found = {"base": measure("models/base")}
        found["each expert on its own text"] = {"perplexity": _own(heldout, experts), "kl": 0.0}
        found |= _training_free(folder, seed, measure)
        for texts in TEXTS:
            scales = _tuned(folder, corpora, texts)
            for method, best in scales.items():
                measured = measure(f"merged/{_slug(f'{method}, scale {best:g}')}")
                found[f"{method}, tuned on {texts} texts"] = {**measured, "scale": best}
            found |= _learned(folder, seed, texts, scales, measure)
        return found


def _recipe(folder: Path, merge: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    models, text = (folder / "models").resolve(), (folder / "text").resolve()
    return {
        "base": str(models / "base"),
        "experts": {expert: str(models / expert) for expert in EXPERTS},
        "merge": dict(merge),
        "calibration": {expert: str(text / expert / "train.jsonl") for expert in EXPERTS},
        "dtype": "float32",
        **sections,
    }


def _training_free(folder: Path, seed: int, measure: Callable[[str], Measured]) -> dict[str, Measured]:
    recipes: dict[str, Mapping[str, Any]] = {
        "average": {"method": "average"},
        "TIES, density 0.8, scale 1/3": {"method": "ties", "density": 0.8, "scale": 1 / 3},
        "TIES, density 0.2, scale 1, mean": {"method": "ties", "density": 0.2, "scale": 1.0, "aggregate": "mean"},
        "DARE, density 0.8, scale 1/3": {"method": "dare", "density": 0.8, "scale": 1 / 3, "seed": seed},
    }
    seeds = {"DARE, density 0.8": {"seed": seed}}
    grid = {
        f"{name}, scale {scale:g}": {**merge, **seeds.get(name, {}), "scale": scale}
        for name, merge in TUNED.items()
        for scale in SCALES
    }
    for name, merge in (recipes | grid).items():
        moerge.merge(_recipe(folder, merge), folder / "merged" / _slug(name), force=True)
    shown = [*recipes, *(f"task arithmetic, scale {scale:g}" for scale in SCALES)]
    found = {name: measure(f"merged/{_slug(name)}") for name in shown}
    best = min(SCALES, key=lambda scale: found[f"task arithmetic, scale {scale:g}"]["perplexity"])
    found["task arithmetic, best scale on the held-out text itself"] = {
        **found[f"task arithmetic, scale {best:g}"],
        "scale": best,
    }
    return found


def _tuned(folder: Path, corpora: Mapping[str, Corpus], texts: int) -> dict[str, float]:
    """Each method's scale that is best on the texts that learning gets."""
    seen = {expert: _documents(folder, corpora[expert].train[:texts]) for expert in EXPERTS}

    def loss(method: str, scale: float) -> float:
        model = load(folder / "merged" / _slug(f"{method}, scale {scale:g}")).eval()
        return statistics.fmean(_nats(model, seen[expert]) for expert in EXPERTS)

    return {method: min(SCALES, key=lambda scale: loss(method, scale)) for method in TUNED}


def _learned(
    folder: Path, seed: int, texts: int, scales: Mapping[str, float], measure: Callable[[str], Measured]
) -> dict[str, Measured]:
    """Learned coefficients that start from the method's tuned scale, which is also that of embedding, head and norms."""
    start, of_ties = ({**TUNED[name], "scale": min(scales[name], 0.95)} for name in ("task arithmetic", "TIES, density 0.8"))
    longer = {**LONGER, "epochs": EPOCHS[texts]}
    settings: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "Expert Merging, published settings, from 0.1": ({**start, "scale": 0.1}, PUBLISHED),
        "Expert Merging, from 0.3": ({**start, "scale": 0.3}, longer),
        "AdaMerging": (start, {**longer, "objective": "entropy", "gamma": 0.0}),
        "Expert Merging": (start, longer),
        "Expert Merging++": (start, {**longer, "extra": 1.0}),
        "Expert Merging++, 8 for each matrix": (start, {**longer, "extra": 7.0}),
        **(dict(_stages(start, longer)) if texts == max(TEXTS) else {}),
        "Expert Merging, layers": (start, {**longer, "granularity": "layer"}),
        "Expert Merging, TIES directions": (of_ties, longer),
    }
    found = {}
    for name, (merge, learning) in settings.items():
        full, out = f"{name}, {texts} texts", folder / "learned" / _slug(f"{name} {texts}")
        recipe = load_recipe(_recipe(folder, merge, learn={**learning, "texts": texts, "seed": seed}))
        begun = time.perf_counter()
        result = learn(recipe, out, force=True)
        seconds = time.perf_counter() - begun
        found[full] = {**measure(f"learned/{out.name}"), "seconds": seconds, **result.coefficients.means()}
    return found


def _stages(
    start: Mapping[str, Any], longer: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """What a second stage gains by itself, and by many coefficients."""
    yield "Expert Merging, a second stage without more coefficients", (start, {**longer, "extra": 1e-9})
    yield "Expert Merging++, 32 for each matrix", (start, {**longer, "extra": 31.0})


def _slug(name: str) -> str:
    name = name.replace("++", " plus plus")
    return "-".join("".join(character if character.isalnum() or character == "." else " " for character in name).split())


def _rows(folder: Path, documents: list[str]) -> torch.Tensor:
    from transformers import AutoTokenizer

    stream = pack(AutoTokenizer.from_pretrained(folder / "models" / "base"), documents)
    return stream[: len(stream) // ROW * ROW].view(-1, ROW)[:ROWS]


def _documents(folder: Path, documents: list[str]) -> list[torch.Tensor]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "base")
    rows = [tokenizer(document, truncation=True, max_length=ROW)["input_ids"] for document in documents]
    return [torch.tensor([ids]) for ids in rows if len(ids) > 1]


def _logits(checkpoint: Path, rows_RT: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = load(checkpoint).eval()(input_ids=rows_RT, use_cache=False).logits.float()
    return logits[:, :-1]


def _nats(model: Any, documents: list[torch.Tensor]) -> float:
    import torch
    import torch.nn.functional as F

    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids_1T in documents:
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").item()
            tokens += ids_1T.shape[1] - 1
    return total / tokens


def _measure(checkpoint: Path, heldout: Mapping[str, torch.Tensor], experts: Mapping[str, torch.Tensor]) -> Measured:
    """Geometric mean perplexity and mean KL over the experts' domains."""
    import torch.nn.functional as F

    nats, kl = [], []
    for expert, rows_RT in heldout.items():
        log_NV = _logits(checkpoint, rows_RT).flatten(0, 1).log_softmax(-1)
        nats.append(F.nll_loss(log_NV, rows_RT[:, 1:].flatten()).item())
        theirs_NV = experts[expert].flatten(0, 1).log_softmax(-1)
        kl.append((theirs_NV.exp() * (theirs_NV - log_NV)).sum(-1).mean().item())
    return {"perplexity": math.exp(statistics.fmean(nats)), "kl": statistics.fmean(kl)}


def _own(heldout: Mapping[str, torch.Tensor], experts: Mapping[str, torch.Tensor]) -> float:
    import torch.nn.functional as F

    pairs = [(experts[expert].flatten(0, 1), rows_RT[:, 1:].flatten()) for expert, rows_RT in heldout.items()]
    return math.exp(statistics.fmean(F.cross_entropy(logits, ids).item() for logits, ids in pairs))


def report(found: Mapping[str, Mapping[int, Measured]], options: Any, console: Console) -> None:
    """Mean and standard deviation over seeds, as a table, Markdown and JSON."""
    table = Table("model", "perplexity", "KL to the expert", "scale or mean coefficients", box=SIMPLE_HEAD)
    lines = ["| model | perplexity | KL to the expert, nats | scale or mean coefficients |", "|---|---|---|---|"]
    for name, by_seed in found.items():
        cells = [spread([measured[key] for measured in by_seed.values()], 3) for key in ("perplexity", "kl")]
        keys = [key for key in ("scale", *EXPERTS) if key in next(iter(by_seed.values()))]
        cells.append(", ".join(f"{statistics.fmean(m[key] for m in by_seed.values()):.2f}" for key in keys))
        table.add_row(name, *cells)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    console.print(table)
    lines += ["", *_paired(found)]
    data = {
        "seeds": sorted(next(iter(found.values()))),
        "scale": options.scale,
        "settings": {"published": PUBLISHED, "longer": LONGER},
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps({**data, "models": found}, indent=1) + "\n")
    title = f"# Learned coefficients: held-out text, mean ± standard deviation over seeds {data['seeds']}"
    options.results.with_suffix(".md").write_text("\n".join([title, "", *lines]) + "\n")


def _paired(found: Mapping[str, Mapping[int, Measured]]) -> list[str]:
    """What learning gains over tuned task arithmetic, and more coefficients over fewer, seed by seed."""
    rivals = {
        "task arithmetic, tuned on": (
            "TIES, density 0.8, tuned on",
            "DARE, density 0.8, tuned on",
            "AdaMerging",
            "Expert Merging",
        ),
        "Expert Merging": (
            "Expert Merging, a second stage without more coefficients",
            "Expert Merging++",
            "Expert Merging++, 8 for each matrix",
            "Expert Merging++, 32 for each matrix",
        ),
    }
    lines = ["| against | model | perplexity, % | KL, % | seeds ahead in both |", "|---|---|---|---|---|"]
    for texts in TEXTS:
        for rival, names in rivals.items():
            theirs = found[_with(rival, texts)]
            for name in names:
                ours = found.get(_with(name, texts), {})
                if len(ours) < len(theirs):
                    continue
                changes = [[100 * (ours[seed][key] / theirs[seed][key] - 1) for seed in theirs] for key in ("perplexity", "kl")]
                ahead = sum(max(both) < 0 for both in zip(*changes, strict=True))
                cells = [
                    _with(rival, texts),
                    _with(name, texts),
                    *(spread(change, 3) for change in changes),
                    f"{ahead} of {len(theirs)}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with(name: str, texts: int) -> str:
    return f"{name} {texts} texts" if name.endswith(" on") else f"{name}, {texts} texts"


if __name__ == "__main__":
    main()
