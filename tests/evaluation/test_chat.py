"""Measuring chat models: benchmarks' questions as turns, conversations' answers as what is predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moerge.evaluation.benchmarks import BENCHMARKS
from moerge.evaluation.data import load_questions
from moerge.evaluation.likelihood import document_losses
from moerge.evaluation.records import Records
from moerge.runtime.loading import Loaded, load
from moerge.texts import Conversation
from tests.evaluation.problems import write_problems
from tests.helpers.chat import CHATML, chat_tokenizer, messages
from tests.helpers.command import moerge as command

torch = pytest.importorskip("torch", reason="needs moerge[models]")
pytest.importorskip("lm_eval", reason="needs moerge[eval]")

pytestmark = pytest.mark.slow

WORDED = "{%- for m in messages %}{{- ('w3 ' if m.role == 'user' else 'w4 ') + m.content + ' w5 ' }}{%- endfor %}"
TALKS = [
    messages("w9 w10", "w11 w12 w13", "w14", "w15"),
    messages("w30", "w31"),
    messages("w20 w21 w22", "w23 w24", "w25", "w26 w27"),
]


@pytest.fixture(scope="module", params=["math", "routed"])
def chat(request: pytest.FixtureRequest, checkpoints: Path) -> Loaded:
    loaded = load(checkpoints / request.param)
    loaded.tokenizer.chat_template = WORDED + "{%- if add_generation_prompt %}{{- 'w4 ' }}{%- endif %}"
    return loaded


@pytest.mark.parametrize("window", [64, 8])
def test_the_answers_alone_are_predicted(chat: Loaded, window: int) -> None:
    losses = document_losses(chat, [Conversation(tuple(talk)) for talk in TALKS], window=window, batch_size=2)
    for talk, loss in zip(TALKS, losses, strict=True):
        ids, labels = [], []
        for turn in talk:
            head, body = (3 if turn["role"] == "user" else 4), [*(int(word[1:]) for word in turn["content"].split()), 5]
            ids += [head, *body]
            labels += [-100, *(body if turn["role"] == "assistant" else [-100] * len(body))]
        count = sum(label != -100 for label in labels)
        assert loss.tokens == count
        assert loss.bytes == sum(len(turn["content"]) for turn in talk if turn["role"] == "assistant")
        first = next(place for place, label in enumerate(labels) if label != -100)
        options = {"routing": chat.model.route(torch.tensor([ids[:first]]))} if chat.by_sequence else {}
        if window == 64:
            with torch.no_grad():
                logits = chat.model(torch.tensor([ids]), **options).logits[0, :-1].float()
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
            assert loss.nats == pytest.approx(float(expected), rel=1e-4)


def test_examples_are_turns_in_the_models_template(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moerge.evaluation.generating import GreedyModel
    from moerge.evaluation.harness import run_task

    tokenizer, asked = chat_tokenizer(CHATML), list[str]()
    loaded = Loaded("chat", load(checkpoints / "math").model, tokenizer)
    monkeypatch.setattr(Loaded, "check_ids", lambda self, ids: None)

    def answer(self: Any, ids: list[list[int]], stops: Any, tokens: int) -> list[str]:
        asked.extend(tokenizer.decode(row) for row in ids)
        return ["The answer is 4." for _ in ids]

    monkeypatch.setattr(GreedyModel, "_continue", answer)
    model = GreedyModel(loaded, Records(), batch_size=2, context=100_000, chat=True)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model._settings.eos_token_id
    questions = load_questions(BENCHMARKS["gsm8k"], write_problems(tmp_path))
    run_task(model, questions, max_new_tokens=9, limit=1, chat=True)
    (prompt,) = asked
    turns = prompt.split("<|im_start|>")[1:]
    assert [turn.split("\n")[0] for turn in turns] == ["user", "assistant"] * 9
    assert turns[-1] == "assistant\n" and questions.rows[0]["question"] in turns[-2]
    assert all(turn.endswith("<|im_end|>\n") for turn in turns[:-1])


def test_what_cannot_be_asked_is_one_sentence(checkpoints: Path, tmp_path: Path) -> None:
    data = write_problems(tmp_path)
    for arguments, message in [
        (("--tasks", "humaneval", "--allow-code-execution"), "--tasks humaneval: it lets a model continue a program"),
        (("--perplexity", "a=a.jsonl"), "--chat is about benchmarks"),
        (("--tasks", "gsm8k", "--data", data, "--max-new-tokens", 4), "has no chat template"),
    ]:
        result = command("eval", checkpoints / "math", "--chat", *arguments)
        assert result.code == 2 and message in result.err.splitlines()[-1]
