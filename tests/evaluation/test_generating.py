"""What a checkpoint writes when the harness asks: greedy, whatever the batch, until a stop, and only once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.evaluation.records import Records
from moerge.runtime.loading import Loaded, load

torch = pytest.importorskip("torch", reason="needs moerge[models]")
pytest.importorskip("lm_eval", reason="needs moerge[eval]")

pytestmark = pytest.mark.slow

PROMPTS = ["w3 w24", "w7 w52", "w43 w60 w3", "w59", "w31 w37"]


@dataclass
class Request:
    args: tuple[str, dict[str, Any]]


def ask(loaded: Loaded, prompts: list[str], *, until: tuple[str, ...] = (), tokens: int = 6, **options: Any) -> list[str]:
    from moerge.evaluation.generating import GreedyModel

    model = GreedyModel(loaded, **{"records": Records(), "batch_size": 2, "context": 128, **options})
    return model.generate_until([Request((prompt, {"until": list(until), "max_gen_toks": tokens})) for prompt in prompts])


@pytest.fixture(scope="module", params=["math", "native", "routed", "spaced"])
def loaded(request: pytest.FixtureRequest, checkpoints: Path) -> Loaded:
    return load(checkpoints / request.param)


def greedy(loaded: Loaded, prompt: str, tokens: int = 6) -> str:
    """Word by word, without a cache; a sequence-routed model by the prompt's routing."""
    ids = [int(word[1:]) for word in prompt.split()]
    options = {"routing": loaded.model.route(torch.tensor([ids]))} if loaded.by_sequence else {}
    for _ in range(tokens):
        with torch.inference_mode():
            best = int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False, **options).logits[0, -1].argmax())
        if best == 2:  # eos
            break
        ids.append(best)
    return "".join(f" w{token}" for token in ids[len(prompt.split()) :] if token > 2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_is_greedy_whatever_the_batch(loaded: Loaded, batch_size: int) -> None:
    assert ask(loaded, PROMPTS, batch_size=batch_size) == [greedy(loaded, prompt) for prompt in PROMPTS]


def test_ends_before_a_stop(loaded: Loaded) -> None:
    whole = ask(loaded, PROMPTS, tokens=12)
    third = whole[0].split()[2]
    stopped = ask(loaded, PROMPTS, until=("never", f" {third}"), tokens=12)
    assert stopped == [text.split(f" {third}")[0] for text in whole]
    assert stopped[0] == "".join(f" {word}" for word in whole[0].split()[:2])


def test_settings_of_the_checkpoint_add_nothing(checkpoints: Path) -> None:
    loaded = load(checkpoints / "math")
    loaded.model.generation_config.repetition_penalty = 5.0
    loaded.model.generation_config.max_length = 3
    assert ask(loaded, PROMPTS) == [greedy(loaded, prompt) for prompt in PROMPTS]


def test_a_prompt_that_is_too_long_loses_its_beginning(loaded: Loaded) -> None:
    from moerge.evaluation.generating import GreedyModel

    model = GreedyModel(loaded, Records(), batch_size=1, context=9)
    request = Request(("w50 w51 w3 w4 w5", {"until": [], "max_gen_toks": 6}))
    assert model.generate_until([request]) == [greedy(loaded, "w3 w4 w5")]
    assert model.truncated == 1
    with pytest.raises(
        InputError, match=r"takes 6 tokens in all: no room for a prompt and 6 new ones, choose a smaller --max-new-tokens$"
    ):
        ask(loaded, PROMPTS, context=6)


def test_a_killed_run_goes_on_at_the_next_batch(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moerge.evaluation.generating import GreedyModel

    path, asked = tmp_path / "responses.jsonl", []
    once = GreedyModel._continue

    def continue_(self: Any, ids: Any, *rest: Any) -> list[str]:
        asked.append(len(ids))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return once(self, ids, *rest)

    monkeypatch.setattr(GreedyModel, "_continue", continue_)
    with pytest.raises(KeyboardInterrupt):
        ask(loaded, PROMPTS, records=Records(path, "same"))
    with open(path, "a") as file:
        file.write('{"key": "half a l')
    assert ask(loaded, PROMPTS, records=Records(path, "same")) == [greedy(loaded, prompt) for prompt in PROMPTS]
    assert asked == [2, 2, 1, 1]
    assert ask(loaded, PROMPTS, records=Records(path, "same")) == [greedy(loaded, prompt) for prompt in PROMPTS]
    assert len(asked) == 4
    assert len(Records(path, "another")) == 0  # and the file is started over
    assert len(Records(path, "same")) == 0
