"""The corpora: reproducible, disjoint, consistent."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from random import Random

import pytest

from moerge.demonstration import stdlib
from moerge.demonstration.text import DOMAINS, Corpus, make_corpora, write_corpora
from moerge.demonstration.world import make_world
from moerge.errors import MachineError


def test_a_seed_gives_the_same_corpora_and_another_others() -> None:
    one, same, other = (make_corpora(seed, scale=0.02) for seed in (0, 0, 1))
    assert tuple(one) == DOMAINS
    assert one == same
    for domain in DOMAINS:
        assert one[domain].train != other[domain].train


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_heldout_document_is_in_the_training_text(corpora: dict[str, Corpus], domain: str) -> None:
    corpus = corpora[domain]
    assert corpus.train and corpus.heldout
    assert not set(corpus.train) & set(corpus.heldout)


def test_no_heldout_problem_is_in_the_training_text(corpora: dict[str, Corpus]) -> None:
    train, heldout = (
        [problem for document in part for problem in document.split("\n\n")]
        for part in (corpora["math"].train, corpora["math"].heldout)
    )
    assert len(set(train)) == len(train)
    assert not set(train) & set(heldout)


def test_facts_are_the_same_in_other_words() -> None:
    world = make_world(Random(0))
    documents = world.train_documents(Random(1))
    train = "\n".join(next(documents) for _ in range(2000))
    for entry in world.entries.values():
        for fact in entry:
            assert fact.heldout() not in train
            assert any(fact.object in line for line in train.splitlines() if fact.subject in line)


def test_a_relation_has_one_object_and_names_are_unique() -> None:
    entries = make_world(Random(0)).entries
    facts = [(fact.subject, fact.relation) for entry in entries.values() for fact in entry]
    assert len(set(facts)) == len(facts)
    capitals = [fact.object for entry in entries.values() for fact in entry if fact.relation == "capital"]
    assert len(set(capitals)) == len(capitals) == 24


def test_code_and_prose_have_nothing_in_common() -> None:
    modules = stdlib.modules(Random(0))
    for _ in range(10):
        module = next(modules)
        assert '"""' not in module.code
        assert not re.search(r"^\s*#", module.code, flags=re.MULTILINE)


def test_a_python_without_source_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(MachineError, match="no source of its standard library"):
        next(stdlib.modules(Random(0)))


def test_files_hold_the_documents(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    write_corpora(corpora, tmp_path)
    for domain in DOMAINS:
        for part in ("train", "heldout"):
            lines = (tmp_path / domain / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            assert [json.loads(line)["text"] for line in lines] == getattr(corpora[domain], part)


def test_making_text_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys, moerge.demonstration; from moerge.demonstration.text import make_corpora; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
