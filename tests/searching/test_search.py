"""Searches and sweeps of tiny models: what is measured, what is written, and how they end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

import moerge
from moerge.errors import InputError
from moerge.searching.study import Study
from moerge.searching.sweep import try_merges
from tests.helpers.command import moerge as command
from tests.helpers.hf_models import load
from tests.helpers.tiny import EXPERTS, make_models, write_recipe

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

WORDS = ["the", "cat", "sat", "12", "plus", "def", "return", "a", "b"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_models(folder)
    write_recipe(folder, merge={"method": "ties", "scale": 0.3})
    draw = Random(0)
    for name in ("math", "code"):
        texts = [" ".join(draw.choices(WORDS, k=30)) + f" {name} {number}" for number in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def write(world: Path, folder: Path, **changes: Any) -> Path:
    content = {
        "recipe": str(world / "recipe.yaml"),
        "search": {"merge.scale": {"range": [0.1, 1.0]}, "merge.method": {"choice": ["ties", "task_arithmetic"]}},
        "objective": {"bits_per_byte": {name: str(world / f"{name}.jsonl") for name in ("math", "code")}, "over": "worst"},
        "trials": 6,
        "given": 0,
        **changes,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(content))
    return folder / "search.yaml"


def recipe_of(world: Path, folder: Path, **sections: Any) -> Path:
    return write_recipe(folder, base=str(world / "base"), experts={name: str(world / name) for name in EXPERTS}, **sections)


def bits_per_byte(checkpoint: Path, texts: list[str]) -> float:
    """In float64, document by document, from transformers' own model."""
    import transformers

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(checkpoint), load(checkpoint).double()
    nats = size = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            log_TV = model(input_ids=ids).logits[0].log_softmax(-1)
        nats -= float(log_TV[:-1].gather(-1, ids[0, 1:, None]).sum())
        size += len(text.encode())
    return nats / size / math.log(2)


def test_the_winner_is_a_recipe_that_measures_as_was_said(world: Path, tmp_path: Path) -> None:
    result = command("search", write(world, tmp_path, dtype="float32", prune=False), tmp_path / "out", "--json")
    assert result.code == 0, result.err
    found = result.json
    best = next(trial for trial in found["trials"] if trial["number"] == found["best"])
    assert found["finished"] and len(found["trials"]) == 6 and {trial["state"] for trial in found["trials"]} == {"complete"}
    assert best["values"] == [min(trial["values"][0] for trial in found["trials"])]
    assert best["values"][0] == max(best["figures"]["bits_per_byte"].values())
    assert found["trials"][0]["point"] == {"merge.scale": 0.3, "merge.method": "ties"}  # the recipe as it is
    moerge.merge(tmp_path / "out" / "best.yaml", tmp_path / "merged")
    texts = [json.loads(line)["text"] for line in (world / "math.jsonl").read_text().splitlines()]
    judged = {row["domain"]: row for row in found["judged"] if row["name"] == "best"}
    everything = bits_per_byte(tmp_path / "merged", texts)
    both = (best["figures"]["bits_per_byte"]["math"] + judged["math"]["value"]) / 2  # halves of about the same bytes
    assert both == pytest.approx(everything, rel=0.01)
    assert (tmp_path / "out" / "report.md").read_text().count("| best |") == 2
    again = command("search", tmp_path / "search.yaml", tmp_path / "out")
    assert again.code == 2 and "--resume" in again.err


def test_an_interrupted_search_keeps_its_best_and_goes_on_as_it_would_have(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = write(world, tmp_path)
    whole = moerge.search(search, tmp_path / "whole")
    measured = Study._measured

    def stops(study: Study, record: Any, trial: Any) -> Any:
        if record.number == 3:
            raise KeyboardInterrupt
        return measured(study, record, trial)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Study, "_measured", stops)
        moerge.search(search, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(kept["trials"]) == 3 and not kept["finished"] and (tmp_path / "out" / "best.yaml").exists()
    moerge.search(search, tmp_path / "out", resume=True)
    resumed = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(resumed["trials"]) == 6 and resumed["finished"]
    ours = [(trial.point, trial.values) for trial in whole.trials[:3]]
    assert [(trial["point"], trial["values"]) for trial in resumed["trials"][:3]] == ours


def test_only_what_a_parameter_touches_is_merged_again(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        world, tmp_path, merge={"method": "average", "overrides": [{"match": "norm", "method": "task_arithmetic", "scale": 0.5}]}
    )
    swept = try_merges(
        recipe,
        sweep={"merge.overrides[0].scale": [0.1, 0.2, 0.2]},
        prompts=["the cat"],
        texts={"math": str(world / "math.jsonl")},
    )
    assert [merge.merged for merge in swept.merges] == [21, 5, 0]
    assert swept.merges[1].bits_per_byte == swept.merges[2].bits_per_byte != swept.merges[0].bits_per_byte


def test_divergence_from_the_experts_is_that_of_their_distributions(world: Path, tmp_path: Path) -> None:
    search = write(world, tmp_path, objective={"kl": {"math": str(world / "math.jsonl")}}, trials=1, dtype="float32")
    found = moerge.search(search, tmp_path / "out").judged[1]
    moerge.merge(tmp_path / "out" / "best.yaml", tmp_path / "merged")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "math")
    expert, merged = load(world / "math").double(), load(tmp_path / "merged").double()
    nats, tokens = 0.0, 0
    texts = [json.loads(line)["text"] for line in (world / "math.jsonl").read_text().splitlines()]
    from moerge.texts import document_hash

    for text in sorted(texts, key=document_hash)[:8]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (expert, merged))
        nats, tokens = nats + float((p.exp() * (p - q)).sum()), tokens + ids.shape[1]
    assert found.domain == "math" and found.value == pytest.approx(nats / tokens, rel=1e-3)


def test_several_objectives_have_a_front(world: Path, tmp_path: Path) -> None:
    texts = {name: str(world / f"{name}.jsonl") for name in ("math", "code")}
    search = write(
        world,
        tmp_path,
        search={"moe.separate": {"choice": [["ffn"], ["ffn", "attention"]]}, "merge.scale": {"range": [0.1, 1.0]}},
        recipe=str(recipe_of(world, tmp_path, merge={"method": "ties"}, moe={"format": "moerge", "router": {"kind": "uniform"}})),
        objective=["bytes", "bits_per_byte"],
        texts=texts,
        given=10,
        trials=5,
    )
    found = moerge.search(search, tmp_path / "out")
    assert found.objectives == ["bytes", "bits_per_byte"]
    values = {trial.number: trial.values for trial in found.trials}
    for number in found.pareto:
        assert not any(all(a < b for a, b in zip(other, values[number], strict=True)) for other in values.values() if other)
        assert (tmp_path / "out" / f"pareto-{number}.yaml").exists()
    assert found.best in found.pareto


@pytest.mark.parametrize("trouble", ["calibration", "heldout", "storage", "text", "expert"])
def test_bad_searches_end_with_a_sentence(trouble: str, world: Path, tmp_path: Path) -> None:
    math_text = str(world / "math.jsonl")
    texts = {**dict.fromkeys(("base", "knowledge"), str(world / "code.jsonl")), "math": math_text, "code": math_text}
    recipe = recipe_of(world, tmp_path, merge={"method": "ties"}, calibration=texts, moe={"router": {"kind": "ridge"}})
    (tmp_path / "empty.jsonl").write_text("")
    changes: dict[str, Any] = {
        "calibration": {"recipe": str(recipe)},
        "heldout": {"heldout": {"math": math_text}},
        "storage": {"storage": f"sqlite:///{tmp_path / 'nowhere' / 'a.db'}"},
        "text": {"objective": {"bits_per_byte": {"math": str(tmp_path / "empty.jsonl")}}},
        "expert": {"objective": {"kl": {"physics": math_text}}},
    }[trouble]
    named = {"calibration": "calibrate", "heldout": "searched on", "text": "empty.jsonl", "expert": "physics"}.get(
        trouble, "storage"
    )
    with pytest.raises(InputError, match=named):
        moerge.search(write(world, tmp_path, **changes), tmp_path / "out")


def test_a_storage_of_another_search_is_refused(world: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    moerge.search(write(world, tmp_path, storage=storage, trials=1), tmp_path / "a")
    joined = moerge.search(write(world, tmp_path, storage=storage, trials=2), tmp_path / "b")
    assert [trial.number for trial in joined.trials] == [0, 1]
    with pytest.raises(InputError, match="another search"):
        moerge.search(write(world, tmp_path, storage=storage, seed=5), tmp_path / "c")


def test_a_sweep_on_the_command_line(world: Path) -> None:
    recipe = world / "recipe.yaml"
    result = command("try", recipe, "--sweep", "merge.scale=0.2:0.8:3", "--prompt", "the cat", "--max-new-tokens", 3)
    assert result.code == 0 and [f"merge.scale={value}" in result.out for value in ("0.2", "0.5", "0.8")] == [True] * 3
    assert command("try", recipe, "--sweep", "merge.scale=0.2:0.8:3").code == 2
