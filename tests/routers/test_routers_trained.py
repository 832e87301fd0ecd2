"""Computed routers on experts that were trained: held-out text finds its expert, and is predicted better than at random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import moerge
from moerge.checkpoint.manifest import read_manifest
from moerge.texts import overlap, read_documents

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

DOMAINS = {"base": "general", "math": "math", "code": "code", "knowledge": "knowledge"}
HELD_OUT = 12
"""Texts a domain that perplexity is measured on."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base and experts, trained for a tenth of the time, and their text."""
    from moerge.demonstration.train import train_experts

    folder = tmp_path_factory.mktemp("demo")
    train_experts(folder, seed=0, scale=0.1)
    return folder


def merged(demo: Path, router: dict[str, Any]) -> Path:
    out = demo / "-".join(map(str, router.values()))
    needs_text = router["kind"] not in ("random", "projection")
    recipe = {
        "base": str(demo / "models/base"),
        "experts": {name: str(demo / "models" / name) for name in ("math", "code", "knowledge")},
        "merge": {"method": "dare"},
        "moe": {"router": router | ({"texts": 30, "tokens": 128} if needs_text else {})},
        **({"calibration": {n: str(demo / "text" / d / "train.jsonl") for n, d in DOMAINS.items()}} if needs_text else {}),
    }
    if not out.exists():
        moerge.merge(recipe, out)
    return out


def held_out(demo: Path, domain: str) -> list[str]:
    return list(read_documents(f"text/{domain}/heldout.jsonl", relative_to=demo))[:HELD_OUT]


def measured(demo: Path, router: dict[str, Any]) -> tuple[float, list[float]]:
    """The geometric mean of the domains' perplexities, and the share of tokens whose first choice is their own expert."""
    folder = merged(demo, router)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    nats, shares = [], []
    for index, domain in enumerate(DOMAINS.values()):
        losses, hits = [], []
        for document in held_out(demo, domain):
            ids = tokenizer(document, return_tensors="pt", truncation=True, max_length=256).input_ids
            with torch.no_grad():
                output = model(ids, output_router_logits=True)
            losses.append(torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none"))
            hits += [(logits_TE.argmax(dim=1) == index).float() for logits_TE in output.router_logits]
        nats.append(torch.cat(losses).mean().item())
        shares.append(torch.cat(hits).mean().item())
    return math.exp(sum(nats) / len(nats)), shares


@pytest.mark.parametrize(
    ("kind", "gain", "share"),
    [("ridge", 0.92, 0.55), ("perplexity", 0.92, 0.45), ("hidden", 0.93, 0.55), ("projection", 0.97, 0.35)],
)
def test_held_out_text_is_predicted_better_than_with_random_gates(kind: str, gain: float, share: float, demo: Path) -> None:
    perplexity, shares = measured(demo, {"kind": kind})
    random, _ = measured(demo, {"kind": "random"})
    assert perplexity < gain * random
    assert sum(shares) / len(shares) >= share  # a quarter is chance


def test_held_out_text_was_not_calibrated_on_and_training_text_was(demo: Path) -> None:
    manifest = read_manifest(merged(demo, {"kind": "ridge"}))
    assert manifest is not None
    for domain in DOMAINS.values():
        assert overlap(read_documents(f"text/{domain}/heldout.jsonl", relative_to=demo), manifest) == 0
        train = list(read_documents(f"text/{domain}/train.jsonl", relative_to=demo))
        assert overlap(train, manifest) >= min(len(train), 30)
