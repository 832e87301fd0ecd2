"""A whole report by its data: the JSON that the page embeds, against tests/reporting/golden.json.

After a wanted change: MOERGE_WRITE_GOLDEN=1 pytest -n 0 tests/reporting/test_golden.py, and read the difference.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from moerge.reporting import report

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden.json"


def test_the_data_of_a_whole_report(results: Path) -> None:
    page = report(results, title="An experiment").to_html()
    embedded = re.search(r'<script type="application/json" id="moerge-report">(.*?)</script>', page)
    assert embedded is not None
    found = settled(json.loads(embedded[1]), results)
    if os.environ.get("MOERGE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert_same(found, json.loads(GOLDEN.read_text()), "report")


def settled(value: Any, folder: Path) -> Any:
    """Without what depends on the machine: versions, and where the folder is."""
    if isinstance(value, dict):
        return {
            key: {"*": "*"} if key == "versions" else "*" if key == "moerge" else settled(x, folder) for key, x in value.items()
        }
    if isinstance(value, list):
        return [settled(item, folder) for item in value]
    return value.replace(str(folder), "EXPERIMENT") if isinstance(value, str) else value


def assert_same(found: Any, wanted: Any, where: str) -> None:
    """Equal, numbers to nine digits."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12), where
    else:
        assert found == wanted, where
