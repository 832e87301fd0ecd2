"""`moerge generate --chat`: the tokens that transformers gives in the same template, turn by turn, with the same routing."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moerge as package
from tests.helpers.chat import CHATML, ENDING, STRICT, chat_tokenizer
from tests.helpers.command import moerge as command
from tests.helpers.tiny import EXPERTS, make_models, write_recipe

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

WORDED = (
    "{%- for m in messages %}{{- {'user': 'w3 ', 'system': 'w6 '}.get(m.role, 'w4 ') + m.content + ' w5 ' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'w4 ' }}{%- endif %}"
)
"""A template in the words of the tiny models."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat expert merged with its base and others: dense, native, and routed by sequence."""
    folder = tmp_path_factory.mktemp("chats")
    models = make_models(folder, dtype="F32")
    (models["math"] / "chat_template.jinja").write_text(WORDED)
    moe = {"top_k": 2}
    forms = {
        "dense": {},
        "native": {"moe": moe},
        "routed": {"moe": {**moe, "format": "moerge", "router": {"kind": "perplexity"}}},
    }
    for name, sections in forms.items():
        package.merge(write_recipe(folder, f"{name}.yaml", merge={"method": "average"}, **sections), folder / name, threads=1)
    return folder


def loaded(folder: Path) -> tuple[Any, Any]:
    from moerge.modeling import register

    register()
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def expected(folder: Path, turns: list[dict[str, str]], **options: Any) -> str:
    model, tokenizer = loaded(folder)
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    new = model.generate(ids, max_new_tokens=5, do_sample=False, **options)[0, ids.shape[1] :].tolist()
    return str(tokenizer.decode(new[:-1] if new[-1] == 2 else new))


@pytest.mark.parametrize("name", ["dense", "native", "routed"])
def test_every_merge_of_a_chat_expert_answers_as_transformers_does_in_its_template(chats: Path, name: str) -> None:
    result = command("generate", chats / name, "--chat", "--prompt", "w9 w12", "--system", "w20", "--max-new-tokens", 5, "--json")
    turns = [{"role": "system", "content": "w20"}, {"role": "user", "content": "w9 w12"}]
    assert (result.code, result.err) == (0, "")
    assert result.json["text"] == expected(chats / name, turns)
    assert result.json["messages"] == [*turns, {"role": "assistant", "content": result.json["text"]}]
    assert (result.json["routing"] is None) == (name != "routed")


@pytest.mark.parametrize(("per", "by"), [("turn", "prompt"), ("turn", "last-turn"), ("conversation", "prompt")])
def test_sequences_are_routed_as_the_user_says(chats: Path, per: Any, by: Any) -> None:
    from moerge.inference.chat import Chat
    from moerge.runtime.loading import load

    model, tokenizer = loaded(chats / "routed")
    chat = Chat(load(chats / "routed"), max_new_tokens=5, route_per=per, route_by=by)
    assert (Chat(chat.loaded).route_per, Chat(chat.loaded).route_by) == ("turn", "prompt")
    said: list[dict[str, str]] = []
    routing = None
    for question in ("w9 w12", "w40 w41 w42"):
        said.append({"role": "user", "content": question})
        read = said if by == "prompt" else said[-1:]
        ids = tokenizer.apply_chat_template(read, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        routing = model.route(ids) if routing is None or per == "turn" else routing
        found = chat.ask(question)
        assert list((found.routing or {}).values()) == pytest.approx(routing.alpha[0].tolist(), rel=1e-5)
        assert found.text == expected(chats / "routed", said, routing=routing)
        said.append({"role": "assistant", "content": found.text})
    assert [dict(message) for message in chat.messages] == said


def test_a_pipe_is_a_conversation(chats: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moerge", "generate", chats / "native", "--chat", "--max-new-tokens", "5"],
        input="w9 w12\nw40\n/new\nw9 w12\n",
        capture_output=True,
        text=True,
        check=True,
    )
    first = expected(chats / "native", [{"role": "user", "content": "w9 w12"}])
    turns = [{"role": "user", "content": "w9 w12"}, {"role": "assistant", "content": first}, {"role": "user", "content": "w40"}]
    second = expected(chats / "native", turns)
    assert (result.stdout.splitlines(), result.stderr) == ([first, second, first], "")


def test_a_terminal_shows_answers_while_they_grow_and_ends_with_ctrl_d(chats: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "moerge", "generate", str(chats / "routed"), "--chat", "--max-new-tokens", "5"]
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    seen = _until(ours, "> ")
    os.write(ours, b"w9 w12\n")
    seen += _until(ours, "\n> ")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)
    assert "/new begins" in seen and expected(chats / "routed", [{"role": "user", "content": "w9 w12"}]) in seen
    assert any(f"{name} " in seen and "%" in seen for name in ("base", *EXPERTS))


def _until(terminal: int, end: str) -> str:
    text, deadline = "", time.monotonic() + 120
    while not text.replace("\r", "").endswith(end):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode()
    return text


def test_a_raw_prompt_to_a_chat_model_is_answered_with_a_note(chats: Path) -> None:
    result = command("generate", chats / "native", "--prompt", "w9", "--max-new-tokens", 3)
    assert result.code == 0 and result.out and "is a chat model" in result.err and "--chat" in result.err
    assert "notes" in command("generate", chats / "native", "--prompt", "w9", "--max-new-tokens", 3, "--json").json
    assert command("generate", chats / "native", "--prompt", "<s>w3 w9 w5 w4", "--max-new-tokens", 3).err == ""
    assert command("generate", chats / "code", "--prompt", "w9", "--max-new-tokens", 3).err == ""


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("code", ("--chat", "--prompt", "w9"), "has no chat template"),
        ("native", ("--chat", "--prompt", "w9", "--route-per", "conversation"), "does not route sequences"),
        ("native", ("--chat", "--prompt", "w9 " * 100), "begin a new one"),
        ("native", (), "--prompt, or talk with the model with --chat"),
        ("native", ("--prompt", "w9", "--system", "w20"), "are for conversations: add --chat"),
    ],
)
def test_what_cannot_be_is_one_sentence(chats: Path, name: str, arguments: tuple[str, ...], message: str) -> None:
    result = command("generate", chats / name, *arguments)
    assert (result.code, result.out) == (2, "") and message in result.err and len(result.err.splitlines()) == 1


def test_a_template_that_does_not_compile_is_named(chats: Path, tmp_path: Path) -> None:
    shutil.copytree(chats / "native", tmp_path / "broken")
    (tmp_path / "broken/chat_template.jinja").write_text("{% for m in messages %}")
    result = command("generate", tmp_path / "broken", "--chat", "--prompt", "w9")
    assert result.code == 2 and "the chat template does not compile" in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (ENDING, "<|end|>"), (STRICT, "</s>"), (WORDED, None)])
def test_the_token_that_the_template_ends_answers_with_ends_them(template: str, end: str | None) -> None:
    from moerge.inference.chat import end_tokens

    tokenizer = chat_tokenizer(template)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7]))
    found = end_tokens(SimpleNamespace(tokenizer=tokenizer, model=model))  # type: ignore[arg-type]
    assert found == {7, *([] if end is None else tokenizer.convert_tokens_to_ids([end]))}


def test_calls_and_thoughts_stay_in_an_answer(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moerge.inference import chat as module
    from moerge.runtime.loading import load

    chat = module.Chat(load(chats / "native"), max_new_tokens=5)
    marks = torch.tensor([1, 9, 2])
    monkeypatch.setattr(module, "continue_tokens", lambda *arguments, **options: (marks, 0.0))
    assert chat.ask("w9").text == chat.loaded.tokenizer.decode([1, 9])
    assert json.loads(json.dumps(chat.messages))[-1]["content"].startswith("<s>")
