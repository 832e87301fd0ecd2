"""A chat expert merged with its base: conversations are what its template writes wherever they are read, and it stays one.

The tiny tokenizer adds nothing to a text, so that what a template writes can also be given as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moerge as package
from moerge.texts import Conversation
from tests.helpers.chat import messages
from tests.helpers.command import moerge as command
from tests.helpers.tiny import make_models, read_tensors, write_recipe

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

WORDED = (
    "{%- for m in messages %}{{- ('w3 ' if m.role == 'user' else 'w4 ') + m.content + ' w5 ' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'w4 ' }}{%- endif %}"
)
NAMES = ("base", "math", "code")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models with one chat expert among them, and the same text as conversations and as its template writes them."""
    models = make_models(tmp_path, experts=("math", "code"), dtype="F32")
    for model in models.values():
        (model / "chat_template.jinja").write_text(WORDED)
    for number, name in enumerate(NAMES):
        talks = [messages(f"w{9 + number} w{20 + i}", f"w{30 + 2 * i} w{40 + number}", f"w{50 + i}", "w12") for i in range(6)]
        (tmp_path / f"{name}-chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        plain = ["".join(f"{'w3' if m['role'] == 'user' else 'w4'} {m['content']} w5 " for m in talk) for talk in talks]
        (tmp_path / f"{name}-text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in plain))
    return tmp_path


def recipe(folder: Path, kind: str, **sections: Any) -> Path:
    calibration = {name: f"{name}-{kind}.jsonl" for name in NAMES}
    return write_recipe(
        folder, f"{kind}.yaml", experts=("math", "code"), calibration=calibration, **{"merge": {"method": "average"}, **sections}
    )


@pytest.mark.parametrize("router", ["ridge", "hidden", "perplexity"])
def test_routers(folder: Path, router: str) -> None:
    found = {}
    for kind in ("chat", "text"):
        moe = {"top_k": 2, "router": {"kind": router}}
        path = recipe(folder, kind, moe=moe, merge={"method": "average"})
        package.merge(path, folder / kind, threads=1)
        found[kind] = {name: value.tobytes() for name, value in read_tensors(folder / kind).items()}
        assert (folder / kind / "chat_template.jinja").read_text() == WORDED
    assert found["chat"] == found["text"]


def test_prompts_of_routers_are_lists_of_messages(folder: Path) -> None:
    talk = {name: messages(f"w{10 + number} w11") for number, name in enumerate(NAMES)}
    gates = []
    for prompts in (talk, {name: f"w3 {turns[0]['content']} w5 " for name, turns in talk.items()}):
        listed = {name: {"positive": [prompt]} for name, prompt in prompts.items()}
        path = recipe(
            folder, "text", moe={"top_k": 2, "router": {"kind": "hidden", "prompts": listed}}, merge={"method": "average"}
        )
        package.merge(path, folder / "out", threads=1, force=True)
        gates.append({name: value.tobytes() for name, value in read_tensors(folder / "out").items()})
    assert gates[0] == gates[1]
    broken = {name: {"positive": [[{"content": "w9"}]]} for name in NAMES}
    path = recipe(folder, "text", moe={"top_k": 2, "router": {"kind": "hidden", "prompts": broken}})
    result = command("plan", path)
    assert result.code == 2 and "message 1 has no role" in result.err


def test_statistics_and_learning(folder: Path) -> None:
    merge = {"method": "task_arithmetic", "scale": 0.5}
    results = {}
    for kind in ("chat", "text"):
        path = recipe(folder, kind, merge=merge, learn={"epochs": 1, "texts": 4, "tokens": 32})
        outcomes = package.stats(path, folder / f"stats-{kind}", kind="fisher")
        learned = package.learn(path, folder / f"learnt-{kind}")
        sums = [read_tensors_of(outcome.file) for outcome in outcomes]
        results[kind] = (sums, learned.coefficients.means(), [outcome.facts.tokens for outcome in outcomes])
        assert (folder / f"learnt-{kind}/chat_template.jinja").read_text() == WORDED
    assert results["chat"] == results["text"]


def read_tensors_of(file: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(file).items()}


def test_routes_read_what_stands_before_the_last_answer(folder: Path) -> None:
    from moerge.modeling import register

    moe = {"top_k": 1, "format": "moerge", "router": {"kind": "perplexity"}}
    package.merge(recipe(folder, "text", moe=moe, merge={"method": "average"}), folder / "routed", threads=1)
    register()
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder / "routed").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "routed")
    talks = [json.loads(line)["messages"] for line in (folder / "math-chat.jsonl").read_text().splitlines()]
    for options, read in (((), talks), (("--route-by", "last-turn"), [[talk[2]] for talk in talks])):
        arguments = ("--text", f"math={folder / 'math-chat.jsonl'}", "--json", "--no-oracle", *options)
        found = command("route", folder / "routed", *arguments).json["texts"]["math"]["alpha"]
        alpha = torch.zeros(3)
        for turns in read:
            turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            alpha += model.route(encoded["input_ids"]).alpha[0]
        assert list(found.values()) == pytest.approx((alpha / len(read)).tolist(), rel=1e-5)


def test_a_question_is_what_stands_before_the_last_answer() -> None:
    talk = Conversation(tuple(messages("a", "b", "c", "d")))
    assert talk.question == talk.until(3) and talk.question.question == talk.question
    assert [message["content"] for message in talk.last_turn.messages] == ["c"]
