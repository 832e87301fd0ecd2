"""Text to be measured on is compared with what a checkpoint was calibrated on."""

from __future__ import annotations

from typing import Any

import pytest

from moerge.errors import InputError
from moerge.texts import check_disjoint, document_hash, overlap

MANIFEST: dict[str, Any] = {
    "calibration": {"math": {"documents": [document_hash("one two"), document_hash("three")]}},
    "statistics": {"code": {"documents": [document_hash("four")]}},
}
LOCATIONS = {"math": "a.txt", "code": "b.jsonl"}


def test_whole_documents_count() -> None:
    assert overlap(["One  two", "three\n", "four", "one", "five"], MANIFEST) == 3
    assert overlap(["one two"], {}) == 0


@pytest.mark.parametrize(
    "section", [None, [], "text", {"math": None}, {"math": {"documents": 3}}, {"math": {"documents": [None]}}]
)
def test_a_garbled_manifest_has_no_documents(section: Any) -> None:
    assert overlap(["one two"], {"calibration": section}) == 0


def test_the_first_text_that_overlaps_is_named() -> None:
    texts = {"math": ["six", "seven"], "code": ["four", "eight", "three"]}
    with pytest.raises(InputError) as error:
        check_disjoint(texts, LOCATIONS, MANIFEST, "out")
    assert str(error.value) == (
        "text 'code' (b.jsonl): out was calibrated on 2 of its 3 documents, so figures on them are no evidence: "
        "name other text, or go on with --allow-calibration-text"
    )
    assert check_disjoint(texts, LOCATIONS, MANIFEST, "out", allow=True) == (str(error.value).split(": name other")[0],)
    both = {"math": ["three"], "code": ["four"]}
    assert len(check_disjoint(both, LOCATIONS, MANIFEST, "out", allow=True)) == 2


def test_text_of_its_own_and_other_checkpoints_pass() -> None:
    assert check_disjoint({"math": ["nine"]}, LOCATIONS, MANIFEST, "out") == ()
    assert check_disjoint({"math": ["three"]}, LOCATIONS, None, "out") == ()
