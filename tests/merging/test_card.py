"""The model card's metadata: what the Hub reads of it, and what strangers' cards may and may not put into it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from moerge.checkpoint import locate
from moerge.merging.pipeline import merge
from tests.checkpoint.test_hub import COMMIT
from tests.helpers.tiny import make_models, write_recipe

APACHE = {"license": "apache-2.0", "language": "en", "datasets": ["org/texts"]}
LLAMA = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
SOURCES = {"base": "org/base@v1", "math": "org/math", "code": "code"}


def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any], **sections: Any) -> ModelCard:
    """The card of a merge of two models of the Hub and a local one, with these cards of their own: metadata, or a whole file."""
    models = make_models(tmp_path / "hub", experts=("math",)) | make_models(tmp_path, base=False, experts=("code",))
    for name, data in written.items():
        text = data if isinstance(data, str) else f"---\n{yaml.safe_dump(data)}---\n# A model\nlicense: wtfpl\n"
        (models[name] / "README.md").write_bytes(text.encode())

    def fetch(repo: str, revision: str | None, weights: bool) -> object:
        assert "README.md" in locate.SMALL_FILES
        snapshot = tmp_path / repo.split("/")[1] / COMMIT
        return shutil.copytree(models[repo.split("/")[1]], snapshot, dirs_exist_ok=True), None

    monkeypatch.setattr(locate, "_fetch", fetch)
    recipe = write_recipe(tmp_path, base=SOURCES["base"], experts={name: SOURCES[name] for name in ("math", "code")}, **sections)
    merge(recipe, tmp_path / "out", threads=1)
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert ModelCard(str(found)).data.to_dict() == found.data.to_dict()
    return found


def test_all_that_the_hub_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"license": ["apache-2.0"], "language": ["en", "de"], "datasets": ["org/texts", "squad"], "tags": ["mine"]}
    found = card(tmp_path, monkeypatch, {"base": APACHE, "math": other, "code": {"license": "apache-2.0"}}, moe={})
    assert found.data.to_dict() == {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "datasets": ["org/texts", "squad"],
        "tags": ["merge", "moerge", "moe"],
    }
    assert f"| base | `org/base@v1` | {COMMIT} | base | apache-2.0 |" in found.text
    assert "| code | `code` | local | 1 | apache-2.0 |" in found.text
    assert "claims none" not in found.text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ({"base": APACHE, "math": APACHE}, ["apache-2.0", "apache-2.0", "unknown"]),
        ({"base": APACHE, "math": {"license": "mit"}, "code": APACHE}, ["apache-2.0", "mit", "apache-2.0"]),
        ({"base": LLAMA, "math": {**LLAMA, "license_name": "gemma"}, "code": LLAMA}, ["llama3", "gemma", "llama3"]),
        ({name: {"license": "other"} for name in SOURCES}, ["other"] * 3),
        ({}, ["unknown"] * 3),
    ],
    ids=["one unknown", "two", "two others", "others without a name", "no cards"],
)
def test_a_licence_is_claimed_only_where_all_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any], shown: list[str]
) -> None:
    found = card(tmp_path, monkeypatch, written)
    assert [key for key in found.data.to_dict() if key.startswith("license")] == []
    rows = [line.split(" | ")[-1].removesuffix(" |") for line in found.text.splitlines() if line.startswith("| ")][1:]
    assert rows == shown
    assert "differ or are not known, so this card claims none: each source's own terms hold.\n" in found.text


def test_another_licence_keeps_its_name_and_a_link_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = card(tmp_path, monkeypatch, dict.fromkeys(SOURCES, LLAMA))
    assert {key: value for key, value in found.data.to_dict().items() if key.startswith("license")} == {
        "license": "other",
        "license_name": "llama3",
        "license_link": f"https://huggingface.co/org/base/blob/{COMMIT}/LICENSE",
    }


HOSTILE: dict[str, Any] = {
    "types": {"license": {"a": 1}, "language": [False, 3, ["en"]], "datasets": {"x": "y"}},
    "markup": {"license": "mit](javascript:x)", "language": ["en\nlicense: mit"], "datasets": ["../../x", "a b", "<script>"]},
    "link": {"license": "other", "license_name": "x", "license_link": "javascript:alert(1)"},
    "code": "---\nlicense: !!python/object/apply:os.system ['false']\n---\n",
    "no end": "---\nlicense: mit\n",
    "not at the start": "\n---\nlicense: mit\n---\n",
    "no mapping": "---\n- license\n---\n",
    "broken": "---\nlicense: [mit\n---\n",
    "deep": "---\nlicense: " + "[" * 5000 + "\n---\n",
    "far down": "---\n" + "x: y\n" * 60_000 + "license: mit\n---\n",
    "zero byte": "---\nlicense: \x00\n---\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_strangers_cards_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = card(tmp_path, monkeypatch, dict.fromkeys(SOURCES, HOSTILE[name]))
    expected = {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "moerge"],
    }
    own_name = {"license": "other", "license_name": "x"} if name == "link" else {}
    assert found.data.to_dict() == {**expected, **own_name}
    assert "script" not in str(found)


def test_local_sources_have_no_name_on_the_hub(tmp_path: Path) -> None:
    make_models(tmp_path, experts=("math", "code"))
    merge(write_recipe(tmp_path, experts=("math", "code")), tmp_path / "out", threads=1)
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["merge", "moerge"]}
