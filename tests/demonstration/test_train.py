"""Training: reproducible, and each expert learns its domain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moerge.demonstration.evaluate import perplexities
from moerge.demonstration.text import Corpus
from moerge.demonstration.train import END, TRAININGS, pack, total_steps, train_experts, train_models

pytestmark = pytest.mark.slow

EXPERTS = ("math", "code", "knowledge")


@pytest.fixture
def one_thread() -> Any:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contents(models: dict[str, Path]) -> dict[str, bytes]:
    return {f"{name}/{file.name}": file.read_bytes() for name, path in models.items() for file in sorted(path.iterdir())}


@pytest.mark.usefixtures("one_thread")
def test_a_seed_gives_the_same_bytes(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    first = contents(train_models(corpora, tmp_path / "first", seed=0, scale=0.004))
    again = contents(train_models(corpora, tmp_path / "again", seed=0, scale=0.004))
    other = contents(train_models(corpora, tmp_path / "other", seed=1, scale=0.004))
    assert first == again
    for name in TRAININGS:
        assert first[f"{name}/model.safetensors"] != other[f"{name}/model.safetensors"]


def test_the_callers_random_state_and_threads_stay(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    import torch

    threads, state, environment = torch.get_num_threads(), torch.get_rng_state(), dict(os.environ)
    told: list[str] = []
    train_models(corpora, tmp_path, scale=0.004, on_step=lambda name, loss: told.append(name))
    assert len(told) == total_steps(0.004)
    assert list(dict.fromkeys(told)) == list(TRAININGS)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == environment


def test_text_lies_beside_the_models(tmp_path: Path) -> None:
    models = train_experts(tmp_path, scale=0.004)
    assert models == {name: tmp_path / "models" / name for name in TRAININGS}
    assert all((path / "model.safetensors").exists() for path in models.values())
    assert (tmp_path / "text" / "math" / "heldout.jsonl").exists()


def test_experts_beat_the_base_on_their_own_domain(trained: dict[str, Path], corpora: dict[str, Corpus]) -> None:
    found = {name: perplexities(path, corpora) for name, path in trained.items()}
    for expert in EXPERTS:
        assert found[expert][expert] < 0.8 * found["base"][expert], found
        assert found[expert][expert] == min(row[expert] for row in found.values()), found


def test_models_differ_only_in_their_weights(trained: dict[str, Path]) -> None:
    from safetensors import safe_open

    base = contents({"": trained["base"]})
    for expert in EXPERTS:
        files = contents({"": trained[expert]})
        assert files.keys() == base.keys()
        assert [name for name in files if files[name] != base[name]] == ["/model.safetensors"]
        with safe_open(trained[expert] / "model.safetensors", "pt") as tensors:
            assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_tokens_give_the_text_back(trained: dict[str, Path], corpora: dict[str, Corpus]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained["base"])
    for corpus in corpora.values():
        document = corpus.heldout[0]
        tokens = pack(tokenizer, [document])
        assert tokenizer.decode(tokens) == document + END
        assert tokenizer(document)["input_ids"] == tokens[:-1].tolist()
    assert len(tokenizer("1234")["input_ids"]) == 4
