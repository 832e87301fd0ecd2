"""Which sequence comes when, and how text becomes sequences."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.errors import InputError
from moerge.tensors.random import stream_key
from moerge.tuning.mixture import Mixture
from moerge.tuning.settings import Source
from moerge.tuning.tokens import documents_of, tokenise

TABLE_5 = {
    "wiki1": 1.11,
    "wiki2": 0.82,
    "arxiv": 3.94,
    "commoncrawl": 11.74,
    "c4": 22.97,
    "stackexchange": 3.05,
    "openwebmath": 24.13,
    "github": 32.25,
}


def test_the_papers_mixture_is_drawn_with_its_weights() -> None:
    mixture = Mixture(TABLE_5, 100_000, seed=0)
    shares = [weight / sum(TABLE_5.values()) for weight in TABLE_5.values()]
    assert mixture.shares == pytest.approx(shares)
    drawn = np.array(mixture.counts) / 100_000
    assert np.abs(drawn - shares).max() < 4 * 0.5 / np.sqrt(100_000)
    assert sum(mixture.counts) == 100_000


@given(st.integers(0, 5), st.integers(1, 60), st.integers(0, 40))
def test_a_longer_run_begins_like_a_shorter_one(seed: int, short: int, more: int) -> None:
    weights = {"a": 1.0, "b": 2.5}
    few, many = Mixture(weights, short, seed), Mixture(weights, short + more, seed)
    assert [few.place(i, (3, 4)) for i in range(short)] == [many.place(i, (3, 4)) for i in range(short)]


@given(st.integers(0, 5), st.lists(st.integers(1, 7), min_size=2, max_size=2), st.booleans())
def test_every_sequence_of_a_source_comes_once_before_any_comes_twice(seed: int, available: list[int], shuffle: bool) -> None:
    mixture = Mixture({"a": 1.0, "b": 1.0}, 50, seed, shuffle)
    for source in (0, 1):
        numbers = [n for s, n in (mixture.place(i, available) for i in range(50)) if s == source]
        for start in range(0, len(numbers) - available[source] + 1, available[source]):
            assert sorted(numbers[start : start + available[source]]) == list(range(available[source]))
        if not shuffle:
            assert numbers == [n % available[source] for n in range(len(numbers))]


def test_order_changes_with_the_seed_and_from_one_reading_to_the_next() -> None:
    mixture = Mixture({"a": 1.0}, 40, seed=0)
    numbers = [mixture.place(i, (20,))[1] for i in range(40)]
    assert numbers[:20] != numbers[20:] and sorted(numbers[:20]) == sorted(numbers[20:])
    assert numbers != [Mixture({"a": 1.0}, 40, seed=1).place(i, (20,))[1] for i in range(40)]


@given(st.integers(0, 3), st.lists(st.integers(1, 30), min_size=3, max_size=3), st.booleans())
def test_which_sequences_are_drawn_at_all(seed: int, available: list[int], shuffle: bool) -> None:
    mixture = Mixture({"a": 5.0, "b": 1.0, "c": 1e-9}, 25, seed, shuffle)
    places = [mixture.place(i, available) for i in range(25)]
    for source in range(3):
        assert mixture.used(source, available[source]) == tuple(sorted({n for s, n in places if s == source}))


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Mixture(TABLE_5, 1000, seed=1).drawn_N
    expected = np.random.Generator(np.random.Philox(key=int(stream_key(1, "tune", "draws")))).random(1000)
    edges = np.cumsum(Mixture(TABLE_5, 1, seed=1).shares)
    assert whole.tolist() == [int((edges[:-1] <= u).sum()) for u in expected]
    monkeypatch.setattr("moerge.tuning.mixture._BLOCK", 7)
    assert Mixture(TABLE_5, 1000, seed=1).drawn_N.tolist() == whole.tolist()


def test_memory_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bytes a sequence, and at most five more meanwhile."""
    monkeypatch.setattr("moerge.tuning.mixture._BLOCK", 1 << 12)
    mixture = Mixture({"a": 1000.0, "b": 1.0}, 1_000_000, seed=0)
    tracemalloc.start()
    try:
        mixture.place(0, (1, 1))
        assert sum(mixture.counts) == 1_000_000
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8_200_000 and peak < 13_500_000


class Words:
    """A tokenizer that gives each word its number, after a token that begins the text."""

    eos_token_id: int | None = 2

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *map(int, text.split())] for text in texts]}


def test_documents_run_on_into_sequences(tmp_path: Path) -> None:
    found = tokenise(iter(["10 11", "12", "13 14 15"]), Words(), length=5, sequences=2, file=tmp_path / "a.bin")
    assert (found.tokens, found.documents, found.sequences, found.exhausted) == (12, 3, 2, True)
    assert found.sequence(0).tolist() == [1, 10, 11, 2, 1] and found.sequence(1).tolist() == [12, 2, 1, 13, 14]
    again = tokenise(iter(()), Words(), length=5, sequences=2, file=tmp_path / "a.bin")
    assert (again.digest, again.sequence(1).tolist()) == (found.digest, [12, 2, 1, 13, 14])


def test_no_more_is_read_than_the_run_needs(tmp_path: Path) -> None:
    read: list[int] = []
    documents = (read.append(i) or "5 6 7" for i in range(10_000))
    found = tokenise(documents, Words(), length=10, sequences=3, file=tmp_path / "a.bin")
    assert not found.exhausted and found.sequences >= 3
    assert len(read) == 65  # a round of 64, and one to see whether there is more


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path) -> None:
    words = Words()
    words.eos_token_id = None
    found = tokenise(iter(["10 11", "12"]), words, length=5, sequences=1, file=tmp_path / "a.bin")
    assert found.sequence(0).tolist() == [1, 10, 11, 1, 12]


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 4 tokens, less than one sequence of length 5: add text or lower 'length'"):
        tokenise(iter(["10 11"]), Words(), length=5, sequences=1, file=tmp_path / "a.bin")
    assert not (tmp_path / "a.json").exists()


def test_files_with_the_text_in_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "text 0"}\n')
    assert list(documents_of(Source(path="a.jsonl", field="body"), tmp_path)) == ["text 0"]
    with pytest.raises(InputError) as caught:
        list(documents_of(Source(path="a.jsonl"), tmp_path))
    where = f"{tmp_path / 'a.jsonl'}, line 1"
    assert str(caught.value) == (
        f'{where}: should be an object with a "text", such as {{"text": "..."}}, or say with \'field\' where its text is'
    )


def test_a_dataset_is_streamed(tmp_path: Path) -> None:
    """A folder stands in for the Hub: `datasets` reads both alike."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    rows = [{"body": f"text {i}", "other": i} for i in range(3)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(hub=str(tmp_path / "set"), field="body")
    assert list(documents_of(source, Path())) == ["text 0", "text 1", "text 2"]
    with pytest.raises(InputError, match="has no text in 'field: text', only body, other"):
        list(documents_of(Source(hub=str(tmp_path / "set")), Path()))
    with pytest.raises(InputError, match="cannot read the dataset"):
        list(documents_of(Source(hub=str(tmp_path / "set"), split="validation"), Path()))
