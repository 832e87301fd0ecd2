"""MergeME's Table 3 in small: what merging and routing without fine-tuning make of held-out text.

    python experiments/routing.py --seeds 0 1 2 --scale 1.0 --work DIR --results experiments/results/routing.json

For each seed: train the demo's base and three experts, merge them in every way of the table, and take the perplexity of each
result on held-out text of each domain. Models and merges stay in DIR, so that a second run with the same settings trains
nothing. Results are written after each seed, so an interrupted run leaves those of the seeds it finished.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import train_demo
from rich.console import Console
from routing_report import Results, show, write

import moerge
from moerge.demonstration.runtime import import_torch, load, settled
from moerge.demonstration.text import DOMAINS, Corpus, make_corpora
from moerge.demonstration.train import TRAININGS, pack
from moerge.texts import overlap

if TYPE_CHECKING:
    import torch

EXPERTS = ("math", "code", "knowledge")
OWN = {"general": "base", **{expert: expert for expert in EXPERTS}}
"""The expert of each domain."""
PROMPT, ROW = 64, 128
"""Tokens that routing sees, and tokens of a row. The models never saw positions beyond 128, so rows are no longer."""
CALIBRATION = {"texts": 60, "tokens": 128, "dtype": "float32"}
PPL, TASK_VECTOR = {"kind": "perplexity", "top_k": 2}, {"kind": "task_vector", "top_k": 2}


@dataclass(frozen=True)
class Model:
    """A row of the table: a checkpoint, and for one that routes sequences how it does."""

    name: str
    group: str
    checkpoint: str
    routing: Mapping[str, Any] = field(default_factory=dict)
    mix: str = "layer"


def _sequence(name: str, separate: str, routing: Mapping[str, Any], mix: str = "layer") -> Model:
    return Model(f"{separate} attention, {name}", "routed by sequence", f"merged/{separate}", routing, mix)


MODELS = (
    *(Model(name, "trained", f"models/{name}") for name in TRAININGS),
    *(Model(f"dense {name}", "dense merge", f"merged/{name}") for name in ("average", "ties", "dare")),
    _sequence("random", "merged", {"kind": "random", "top_k": 2}),
    _sequence("task vector", "merged", TASK_VECTOR),
    _sequence("PPL", "merged", PPL),
    _sequence("random", "separate", {"kind": "random", "top_k": 2}),
    _sequence("task vector", "separate", TASK_VECTOR),
    _sequence("PPL", "separate", PPL),
    _sequence("PPL, mix output", "separate", PPL, "output"),
    _sequence("PPL, mix logits", "separate", PPL, "logits"),
    _sequence("PPL, temperature 0.1", "separate", {**PPL, "temperature": 0.1}),
    _sequence("PPL, temperature 0.01", "separate", {**PPL, "temperature": 0.01}),
    _sequence("PPL, top 1", "merged", {**PPL, "top_k": 1}),
    _sequence("PPL, top 1", "separate", {**PPL, "top_k": 1}),
    _sequence("the domain's own expert", "separate", {"kind": "fixed"}),
    Model("Mixtral, averaged, random router", "routed by token", "merged/mixtral-average-random"),
    Model("Mixtral, DARE, random router", "routed by token", "merged/mixtral-random"),
    Model("Mixtral, DARE, ridge router", "routed by token", "merged/mixtral-ridge"),
    Model("Mixtral, DARE, perplexity router", "routed by token", "merged/mixtral-perplexity"),
)


def main() -> None:
    """Run the seeds, print the tables, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies text and training steps")
    parser.add_argument("--rows", type=int, default=48, help=f"rows of {ROW} tokens for each domain, at most")
    parser.add_argument("--work", type=Path, required=True, help="where models and merges are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "routing.json")
    options = parser.parse_args()
    console = Console(width=max(140, Console().width))
    import_torch()
    results = Results(
        models=[(model.name, model.group) for model in MODELS],
        settings={"scale": options.scale, "prompt_tokens": PROMPT, "row_tokens": ROW, "calibration": CALIBRATION, **_versions()},
    )
    for seed in options.seeds:
        begun = time.perf_counter()
        run_seed(seed, options.scale, options.rows, options.work / f"seed-{seed}-scale-{options.scale:g}", results)
        results.seconds[seed] = round(time.perf_counter() - begun, 1)
        write(results, options.results)
        console.print(f"seed {seed}: {results.seconds[seed]:.0f} s", highlight=False)
    show(results, console)


def run_seed(seed: int, scale: float, most_rows: int, folder: Path, results: Results) -> None:
    """Train (unless `folder` holds the models), merge, evaluate."""
    corpora = make_corpora(seed, scale=scale)
    train_demo(corpora, folder, seed, scale, lambda name, loss: f"seed {seed}, training {name}, loss {loss:.2f}")
    heldout = [document for corpus in corpora.values() for document in corpus.heldout]
    for name, recipe in recipes(folder, seed).items():
        out = folder / "merged" / name
        moerge.merge(recipe, out, force=True)
        seen = overlap(heldout, json.loads((out / "moerge.json").read_text()))
        if seen:
            raise SystemExit(f"{name} was calibrated on {seen} of the documents that it is evaluated on")
    with settled(seed):
        rows = heldout_rows(folder / "models" / "base", corpora, most_rows)
        results.tokens[seed] = {domain: rows_RT[:, PROMPT:].numel() for domain, rows_RT in rows.items()}
        for model, measured in evaluate(folder, rows):
            results.add(seed, model.name, **measured)


def recipes(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Every merge of the table, in the paper's settings: density 0.8, lambda 1/3, the base among the experts, two of four."""
    folder = folder.resolve()
    models = {
        "base": str(folder / "models" / "base"),
        "experts": {expert: str(folder / "models" / expert) for expert in EXPERTS},
    }
    average, ties = {"method": "average"}, {"method": "ties", "density": 0.8, "scale": 0.3333}
    dare = {"method": "dare", "density": 0.8, "scale": 0.3333, "seed": seed}
    found: dict[str, dict[str, Any]] = {
        name: {**models, "merge": merge} for name, merge in (("average", average), ("ties", ties), ("dare", dare))
    }
    for name, separate in (("merged", ["ffn"]), ("separate", ["ffn", "attention"])):
        moe = {"format": "moerge", "separate": separate, "include_base": True, "top_k": 2, "router": {"kind": "perplexity"}}
        found[name] = {**models, "merge": dare, "moe": moe}
    random = {"kind": "random", "seed": seed}
    for name, merge, router in (
        ("mixtral-average-random", average, random),
        ("mixtral-random", dare, random),
        ("mixtral-ridge", dare, {"kind": "ridge", **CALIBRATION}),
        ("mixtral-perplexity", dare, {"kind": "perplexity", **CALIBRATION}),
    ):
        moe = {"separate": ["ffn"], "include_base": True, "top_k": 2, "router": router}
        found[name] = {**models, "merge": merge, "moe": moe}
        if router is not random:
            found[name]["calibration"] = {expert: str(folder / "text" / domain / "train.jsonl") for domain, expert in OWN.items()}
    return found


def heldout_rows(tokenizer: Path, corpora: Mapping[str, Corpus], most: int) -> dict[str, torch.Tensor]:
    """Rows of ROW tokens, spread evenly over each domain's held-out text."""
    import torch
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    found = {}
    for domain in DOMAINS:
        stream = pack(tokens, corpora[domain].heldout)
        rows_RT = stream[: len(stream) // ROW * ROW].view(-1, ROW)
        count = min(most, len(rows_RT))
        found[domain] = rows_RT[torch.arange(count) * len(rows_RT) // count]
    return found


def evaluate(folder: Path, rows: Mapping[str, torch.Tensor]) -> Iterator[tuple[Model, dict[str, dict[str, float]]]]:
    """Perplexity by domain of every model, of the same tokens after the same contexts, and what the own expert gets."""
    import torch

    from moerge.modeling import register

    register()
    loaded, at = None, ""
    for model in MODELS:
        if at != model.checkpoint:
            loaded, at = load(folder / model.checkpoint).eval(), model.checkpoint
        perplexity, first, weight = {}, {}, {}
        with torch.no_grad():
            for domain, rows_RT in rows.items():
                routing = _route(loaded, model, domain, rows_RT)
                perplexity[domain] = math.exp(nats_per_token(loaded, rows_RT, routing))
                if routing is not None:
                    own = loaded.config.expert_names.index(OWN[domain])
                    first[domain] = (routing.alpha.argmax(-1) == own).float().mean().item()
                    weight[domain] = routing.alpha[:, own].mean().item()
        yield model, {"perplexity": perplexity, "own_first": first, "own_weight": weight}


def _route(loaded: Any, model: Model, domain: str, rows_RT: torch.Tensor) -> Any:
    """The routing by the first PROMPT tokens of each row; None where tokens are routed, or nothing is."""
    if not model.routing:
        return None
    options = dict(model.routing)
    if options["kind"] == "fixed":
        options["expert"] = OWN[domain]
    loaded.set_routing(**options)
    loaded.config.mix = model.mix
    return loaded.route(rows_RT[:, :PROMPT])


def nats_per_token(loaded: Any, rows_RT: torch.Tensor, routing: Any) -> float:
    """Mean -log P of what follows the first PROMPT tokens of each row."""
    import torch.nn.functional as F

    given = {} if routing is None else {"routing": routing}
    logits_RTV = loaded(input_ids=rows_RT, use_cache=False, **given).logits[:, PROMPT - 1 : -1]
    return float(F.cross_entropy(logits_RTV.flatten(0, 1).float(), rows_RT[:, PROMPT:].flatten()).item())


def _versions() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    versions = {name: version(name) for name in ("moerge", "torch", "transformers")}
    return {**versions, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
