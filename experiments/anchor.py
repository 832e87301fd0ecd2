"""How far experts may drift apart before merging a role costs what they learned: what the verdict of `moerge compare` rests on.

    python experiments/anchor.py --seeds 0 1 --scale 0.5 --work DIR --results experiments/results/anchor.json

For each seed: train the demo's base and, from it, three experts at several learning rates and lengths, so that they drift
differently far; then a second base of the same text and tokenizer from another initialisation, and experts from both, which have
no common anchor. For every case and role: `moerge compare`'s figures, and which share of what an expert learned (of its lead over
the base on its own held-out text, in nats per token) is lost when the tensors of that role are replaced by the base plus `scale`
times the sum of all task vectors; scale 1/3 is the average of the three experts. Models stay in DIR, so that a second run trains
nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.demonstration.runtime import import_torch, load, settled
from moerge.demonstration.text import Corpus, make_corpora
from moerge.demonstration.train import TRAININGS, Training, _new_model, _steps, pack, train_model, train_tokenizer

if TYPE_CHECKING:
    import torch

EXPERTS = ("math", "code", "knowledge")
OTHER_SEED = 1000
"""Added to the seed of the second base's initialisation and batches."""
ROWS = 24
"""Windows of held-out text of a domain, at most."""
SCALES = (1 / 3, 0.6, 1.0)
ROLES = ("attention", "ffn", "embedding", "head", "norm")


@dataclass(frozen=True)
class Case:
    """Experts that are compared: which base each starts from, how fast and how long it is trained (a factor of the demo's)."""

    name: str
    bases: tuple[str, str, str] = ("base", "base", "base")
    learning_rate: float = 1e-3
    length: float = 1.0

    @property
    def anchored(self) -> bool:
        """Whether all experts have one ancestor."""
        return len(set(self.bases)) == 1


CASES = (
    Case("gentle", learning_rate=3e-4),
    Case("demo"),
    Case("fast", learning_rate=3e-3, length=3),
    Case("faster", learning_rate=5e-3, length=3),
    Case("wild", learning_rate=1e-2, length=3),
    Case("two ancestors", ("base", "replica", "base")),
)


def main() -> None:
    """Run the seeds and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scale", type=float, default=0.5, help="multiplies text and training steps")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "anchor.json")
    parser.add_argument("--train-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    import_torch()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        folder, corpora = options.work / f"seed-{seed}-scale-{options.scale:g}", make_corpora(seed, scale=options.scale)
        train(corpora, folder, seed, options.scale)
        if options.train_only:
            continue
        with settled(seed):
            rows += measure(corpora, folder, seed)
        settings = {"scale": options.scale, "rows": ROWS, "moerge": version("moerge"), "cases": [asdict(case) for case in CASES]}
        options.results.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        options.results.with_suffix(".md").write_text(tables(rows))


def train(corpora: Mapping[str, Corpus], folder: Path, seed: int, scale: float) -> None:
    """All bases and experts that are not there yet."""
    import torch

    tokenizer = train_tokenizer(corpora)
    streams = {domain: pack(tokenizer, corpus.train) for domain, corpus in corpora.items()}
    jobs: list[tuple[str, str, Training]] = [("base", "", TRAININGS["base"]), ("replica", "", TRAININGS["base"])]
    for case in CASES:
        for expert, base in zip(EXPERTS, case.bases, strict=True):
            like = TRAININGS[expert]
            steps = round(like.steps * case.length)
            jobs.append((_folder(case, expert), base, Training(like.mixture, steps, case.learning_rate)))
    for name, base, training in jobs:
        path = folder / name
        if path.exists():
            continue
        with settled(seed + OTHER_SEED * (name == "replica")):
            model: Any = load(folder / base) if base else _new_model(tokenizer)
            *_, last = train_model(model, training, streams, _steps(training, scale))
            model.to(torch.bfloat16).save_pretrained(path)
            tokenizer.save_pretrained(path)
        print(f"seed {seed}: {name} from {base or 'nothing'}, loss {last:.2f}", flush=True)


def _folder(case: Case, expert: str) -> str:
    return f"{case.name.replace(' ', '-')}-{expert}"


def measure(corpora: Mapping[str, Corpus], folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """One row for every case and role."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = {domain: _windows(pack(tokenizer, corpus.heldout)) for domain, corpus in corpora.items()}
    model = load(folder / "base").eval()
    base_loss = {domain: _loss(model, text) for domain, text in texts.items()}
    for case in CASES:
        states = {expert: load(folder / _folder(case, expert)).state_dict() for expert in EXPERTS}
        base = load(folder / "base").state_dict()
        figures = compare(case, folder)
        own = {expert: _loss_of(model, states[expert], texts[expert]) for expert in EXPERTS}
        for role, figure in figures.items():
            lost = {}
            for scale in SCALES:
                merged = {n: base[n] + scale * sum(state[n] - base[n] for state in states.values()) for n in base if _is(role, n)}
                after = {e: _loss_of(model, {**states[e], **merged}, texts[e]) for e in EXPERTS}
                lost[f"{scale:.2g}"] = {e: (after[e] - own[e]) / (base_loss[e] - own[e]) for e in EXPERTS}
            row = {"seed": seed, "case": case.name, "anchored": case.anchored, "role": role, **figure}
            yield row | {"loss_own": own, "lost": lost}


def compare(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """What `moerge compare` says of each role, and of all of them together."""
    from moerge.comparison import compare as run

    found = run({"base": str(folder / "base"), "experts": {e: str(folder / _folder(case, e)) for e in EXPERTS}})
    figures = {verdict.role: verdict.model_dump() for verdict in found.verdicts}
    judged = ("answer", "reason")  # what follows from these results, not what they rest on
    return {role: {key: row[key] for key in row if key not in judged} for role, row in figures.items()} | {"all": {}}


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables in Markdown: what is lost where all is merged, by scale; and where one role is averaged. Means over seeds."""
    scales = [f"{scale:.2g}" for scale in SCALES]
    lines = ["| case | distance | cosine of parameters | cosine of task vectors |" + "".join(f" scale {s} |" for s in scales)]
    lines += ["|---|" + "---:|" * (3 + len(scales))]
    for case in CASES:
        ffn = [row for row in rows if (row["case"], row["role"]) == (case.name, "ffn")]
        whole = [row for row in rows if (row["case"], row["role"]) == (case.name, "all")]
        figures = [f"{_mean(row[key] for row in ffn):.2f}" for key in ("distance", "parameter_cosine", "cosine")]
        lost = [f"{100 * _mean(_mean(row['lost'][s].values()) for row in whole):.0f}%" for s in scales]
        lines.append(f"| {case.name} | {' | '.join([*figures, *lost])} |")
    lines += ["", f"| case | {' | '.join(ROLES)} |", "|---|" + "---:|" * len(ROLES)]
    for case in CASES:
        lost = [
            _mean(_mean(row["lost"][scales[0]].values()) for row in rows if (row["case"], row["role"]) == (case.name, role))
            for role in ROLES
        ]
        lines.append(f"| {case.name} | {' | '.join(f'{100 * share:.0f}%' for share in lost)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _is(role: str, name: str) -> bool:
    parts = {"attention": "self_attn", "ffn": "mlp", "norm": "norm", "embedding": "embed_tokens", "head": "lm_head", "all": ""}
    return parts[role] in name


def _windows(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[: len(tokens) // 128 * 128].view(-1, 128)[:ROWS]


def _loss_of(model: Any, state: Mapping[str, torch.Tensor], text: torch.Tensor) -> float:
    model.load_state_dict(state)
    return _loss(model, text)


def _loss(model: Any, text: torch.Tensor) -> float:
    """Nats per token."""
    import torch

    with torch.inference_mode():
        return float(model(input_ids=text, labels=text, use_cache=False).loss)


if __name__ == "__main__":
    main()
