"""Texts to tune on that are not as most are, from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moerge.tuning.run import plan_tune
from tests.tuning.tune_models import refused, write_texts, write_tuning

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data": {"broken": "broken.jsonl"}}, "line 3: data.broken"),
        ({"heldout": {"broken": "broken.jsonl"}}, "heldout.broken"),
    ],
)
def test_half_a_character_is_named(folder: Path, changes: dict[str, Any], where: str) -> None:
    path = write_tuning(folder, "broken.yaml", **changes)
    lines = (folder / "math.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*lines, '{"text": "w3 \\ude00"}']))
    for out in (None, folder / "never"):
        assert f"{where}: {folder / 'broken.jsonl'}, line 13: the text has \\ude00, half of a character" in refused(path, out)


def test_neither_byte_order_mark_nor_the_fields_name_changes_the_tokens(folder: Path) -> None:
    write_texts(folder)
    texts = [json.loads(line)["text"] for line in (folder / "math.jsonl").read_text().splitlines()]
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(texts).encode())
    (folder / "body.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps({"body": t}).encode() + b"\n" for t in texts))
    data = {"plain": "math.jsonl", "marked": "marked.txt", "body": {"path": "body.jsonl", "field": "body"}}
    found = plan_tune(write_tuning(folder, data=data)).sources()
    assert {source["digest"] for source in found.values()} == {found["plain"]["digest"]}
    assert found["body"]["documents"] == 12
