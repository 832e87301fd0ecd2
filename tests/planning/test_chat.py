"""The chat template of a result, with the tokens that end an answer: whose it is, and what the plan says about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import moerge as api
from moerge.planning.plan import Plan
from tests.helpers.command import refuses
from tests.helpers.tiny import (
    VOCABULARY,
    edit_config,
    llama_tensors,
    make_models,
    write_checkpoint,
    write_json,
    write_recipe,
    write_tokenizer,
)

A, B = "{{ messages }}w5", "w6{{ messages }}"


def chat(folder: Path, template: str, *, end: str = "w5", form: str = "file", **generation: Any) -> None:
    """Make a chat model of a model, with an end token and a template of its own."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "file":
        (folder / "chat_template.jinja").write_text(template)
    elif form == "json":
        write_json(folder / "chat_template.json", {"chat_template": template})
    elif form == "inline":
        settings["chat_template"] = template
    else:
        settings["chat_template"] = [{"name": "default", "template": template}]
    write_json(folder / "tokenizer_config.json", {**settings, "eos_token": end})
    number = int(end[1:]) if end.startswith("w") else VOCABULARY
    edit_config(folder, eos_token_id=[number, 2])
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [number, 2], **generation})


def merged(folder: Path, **sections: Any) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what of the result decides how it talks."""
    plan = api.plan(write_recipe(folder, experts=("math", "code"), **sections))
    out = folder / "out"
    api.merge(plan, out, force=out.exists())
    files = {
        name: json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json", "generation_config.json")
    }
    template = out / "chat_template.jinja"
    found = {
        "template": template.read_text() if template.exists() else files["tokenizer_config.json"].get("chat_template"),
        "eos_token": files["tokenizer_config.json"]["eos_token"],
        "config": files["config.json"]["eos_token_id"],
        "generation": files["generation_config.json"],
    }
    return plan, found


FROM_CODE = {"eos_token": "w5", "config": [5, 2], "generation": {"bos_token_id": 1, "eos_token_id": [5, 2], "temperature": 0.6}}
OF_BASE = {"template": None, "eos_token": "</s>", "config": 2, "generation": {"bos_token_id": 1, "eos_token_id": 2}}


@pytest.mark.parametrize("form", ["file", "inline", "listed"])
def test_the_only_template_is_the_results(tmp_path: Path, form: str) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    chat(models["code"], A, form=form, temperature=0.6)
    plan, found = merged(tmp_path)
    template = found.pop("template")
    assert template == (A if form != "listed" else [{"name": "default", "template": A}])
    assert found == FROM_CODE
    notes = " ".join(plan.notes)
    assert "chat template" in notes and "are code's" in notes and "'chat_template: base'" in notes
    assert "generation config from code" in notes and "base by '</s>' (id 2)" in notes
    assert plan.vocabulary["chat_template"] == "code"


def test_it_can_be_left_out(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    chat(models["code"], A, temperature=0.6)
    plan, found = merged(tmp_path, chat_template="base")
    assert found == OF_BASE
    assert "code by 'w5' (id 2, 5)" in " ".join(plan.notes)


def test_those_that_have_one_agree(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    chat(models["math"], A, form="json")
    chat(models["code"], f"{A}\n", form="inline")
    plan, found = merged(tmp_path)
    assert (found["config"], found["eos_token"]) == ([5, 2], "w5")
    assert json.loads((tmp_path / "out" / "chat_template.json").read_text()) == {"chat_template": A}
    assert "are math, code's" in " ".join(plan.notes)


def test_they_do_not_agree(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    chat(models["math"], B)
    chat(models["code"], A, temperature=0.6)
    plan, found = merged(tmp_path)
    assert found == OF_BASE
    assert "those of math, code differ: choose one, such as 'chat_template: math'" in " ".join(plan.notes)
    _, found = merged(tmp_path, chat_template="code")
    assert found == {"template": A, **FROM_CODE}


def test_the_bases_own_stays(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    chat(models["base"], B, end="w6")
    chat(models["code"], A)
    plan, found = merged(tmp_path)
    assert (found["template"], found["config"]) == (B, [6, 2])
    assert "the chat template is base's; those of code differ" in " ".join(plan.notes)
    _, found = merged(tmp_path, chat_template="code")
    assert (found["template"], found["config"]) == (A, [5, 2])


def test_a_file(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    chat(models["code"], A)
    (tmp_path / "mine.jinja").write_text("mine")
    plan, found = merged(tmp_path, chat_template="mine.jinja")
    assert found == {**OF_BASE, "template": "mine"}
    assert "that of mine.jinja" in " ".join(plan.notes)
    line = refuses(
        write_recipe(tmp_path, experts=("math", "code"), chat_template="cod"),
        tmp_path / "other",
        "chat_template: 'cod' is neither",
    )
    assert "code" in line


def words(*more: str) -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY)), *more]


def with_added_token(folder: Path, text: str) -> None:
    """A chat model with a token more, `text`, which ends its answers."""
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": VOCABULARY + 1}
    write_checkpoint(folder, llama_tensors(config, seed=3), config, tokenizer=False)
    write_tokenizer(folder, words(text))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    entry = {**tokenizer["added_tokens"][0], "id": VOCABULARY, "content": text}
    write_json(folder / "tokenizer.json", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], entry]})
    chat(folder, f"{{{{ messages }}}}{text}", end=text)


@pytest.mark.parametrize(
    ("setting", "config", "noted"),
    [("union", [VOCABULARY, 2], "are code's"), ("base", 2, "needs '<|im_end|>', which base's tokenizer lacks")],
)
def test_tokens_that_the_base_lacks(tmp_path: Path, setting: str, config: Any, noted: str) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    with_added_token(models["code"], "<|im_end|>")
    plan, found = merged(tmp_path, tokenizer=setting)
    assert found["config"] == config and found["generation"]["eos_token_id"] == config
    assert (found["template"] is not None) == (setting == "union")
    assert noted in " ".join(plan.notes)


PARTS: Mapping[str, tuple[str, Any]] = {
    "normalizer": ("normalizer", {"type": "Lowercase"}),
    "pre-tokenizer": ("pre_tokenizer", {"type": "WhitespaceSplit"}),
}


@pytest.mark.parametrize("part", PARTS)
def test_equal_tokens_that_are_cut_out_of_text_otherwise(tmp_path: Path, part: str) -> None:
    models = make_models(tmp_path, experts=("math", "code"))
    key, value = PARTS[part]
    tokenizer = json.loads((models["code"] / "tokenizer.json").read_text())
    write_json(models["code"] / "tokenizer.json", {**tokenizer, key: value})
    warnings = api.plan(write_recipe(tmp_path, experts=("math", "code"))).warnings
    assert any(f"not as code ({part} differ)" in warning for warning in warnings)


def test_nothing_is_said_where_models_agree(tmp_path: Path) -> None:
    make_models(tmp_path, experts=("math", "code"))
    plan = api.plan(write_recipe(tmp_path, experts=("math", "code")))
    assert plan.notes == ("config from base, tokenizer and generation config from base",)
    assert plan.warnings == ()
