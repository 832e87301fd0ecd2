"""Statistics files: what is written is read, sums add up, and what does not belong together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moerge.checkpoint.header import read_metadata
from moerge.errors import InputError, MachineError
from moerge.statistics import Statistics, add_up, files, open_statistics
from moerge.statistics.facts import Facts, Gram, ModelFacts, Settings, TextFacts
from moerge.statistics.files import StatisticsWriter, check_replaceable

FISHER = np.arange(6, dtype=np.float32).reshape(2, 3)
SHAPES = {"fisher:w": (2, 3), "gram:w": (6,)}
GRAM = np.array([[1, 2, 3], [2, 5, 6], [3, 6, 9]], np.float64)


def text(*documents: str, part: tuple[int, int] = (1, 1), digest: str = "whole") -> TextFacts:
    return TextFacts(location="math.txt", digest=digest, part=part, documents=documents)


def facts(**changes: Any) -> Facts:
    plain: dict[str, Any] = {
        "expert": "math",
        "model": ModelFacts(location="m", folder="/m", revision=None, stamps=(("f", 1, 2),), digests={"w": "00"}),
        "settings": Settings(tokens=8, dtype="float32"),
        "texts": (text("a", "b"),),
        "sequences": 4,
        "tokens": 40,
        "predicted": 36,
        "fisher": {"w": (0.0, 0.0)},
        "grams": {"w": Gram(stored="gram:w")},
    }
    return Facts(**{**plain, **changes})


def write(path: Path, *, fisher: np.ndarray = FISHER, gram: np.ndarray = GRAM, **changes: Any) -> Statistics:
    with StatisticsWriter(path, {"fisher:w": fisher.shape, "gram:w": (6,)}, facts(**changes)) as writer:
        writer.add("gram:w", gram)
        writer.add("fisher:w", fisher)
        writer.finish()
    return open_statistics(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = write(tmp_path / "deep" / "math.safetensors")
    assert found.facts == facts(fisher={"w": (15.0, 55.0)})
    arrays = load_file(found.path)
    np.testing.assert_array_equal(arrays["fisher:w"], FISHER)
    np.testing.assert_array_equal(arrays["gram:w"], [1, 2, 3, 5, 6, 9])
    assert (found.fisher_mean, found.fisher_norm) == (2.5, 55**0.5)
    assert [path.name for path in found.path.parent.iterdir()] == ["math.safetensors"]


@pytest.mark.parametrize("value", [1.2345678901234567e-30, 9.999999e37, 0.0, 1.0])
def test_the_header_has_room_for_any_sum(value: float, tmp_path: Path) -> None:
    found = write(tmp_path / "m.safetensors", fisher=np.array([[value]], np.float32))
    assert found.facts.fisher["w"][0] == float(np.float32(value))


def test_nothing_is_left_where_writing_ends_early(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        StatisticsWriter(tmp_path / "math.safetensors", {"fisher:w": (2, 3)}, facts()) as writer,
    ):
        writer.add("fisher:w", FISHER)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write"):
        StatisticsWriter(tmp_path / "file" / "math.safetensors", {"fisher:w": (2, 3)}, facts())


def test_sums_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WINDOW", 4)
    rng = np.random.default_rng(0)
    parts, squares = [], [rng.standard_normal((2, 3)).astype(np.float32) ** 2 for _ in range(3)]
    for index, square in enumerate(squares):
        changes = {"texts": (text(f"text {index}", part=(index + 1, 3)),), "sequences": index + 1, "tokens": 10, "predicted": 9}
        parts.append(write(tmp_path / f"{index}.safetensors", fisher=square, gram=(index + 1) * GRAM, **changes))
    total = add_up(parts, tmp_path / "sum.safetensors")
    found = open_statistics(tmp_path / "sum.safetensors")
    expected = sum(square.astype(np.float64) for square in squares).astype(np.float32)
    assert (total.sequences, total.tokens, total.predicted) == (6, 30, 27)
    assert [document for t in total.texts for document in t.documents] == ["text 0", "text 1", "text 2"]
    assert found.facts == total
    arrays = load_file(found.path)
    np.testing.assert_array_equal(arrays["fisher:w"], expected)
    np.testing.assert_array_equal(arrays["gram:w"], [6, 12, 18, 30, 36, 54])
    assert total.fisher["w"][0] == pytest.approx(expected.sum(dtype=np.float64), rel=1e-12)


def test_the_sum_may_replace_one_of_its_parts(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{i}.safetensors", texts=(text(str(i)),)) for i in range(2)]
    add_up(parts, parts[0].path)
    np.testing.assert_array_equal(load_file(parts[0].path)["fisher:w"], 2 * FISHER)


REFUSED = {
    "models": (
        {"model": ModelFacts(location="m", folder="/m", revision=None, stamps=(), digests={"w": "11"})},
        "were gathered on different models: gather one of them again",
    ),
    "settings": (
        {"settings": Settings(tokens=9, dtype="bfloat16")},
        "were gathered with different settings (tokens 8 and 9, dtype float32 and bfloat16): gather one of them again",
    ),
    "kinds": ({"grams": {}}, "hold different statistics: gather both with the same --kind"),
    "texts": (
        {"texts": (text("b", "c", digest="other"),)},
        "1 of its texts are counted in another file too: gather each text once",
    ),
    "the same text": ({}, "2 of its texts are counted in another file too: gather each text once"),
    "another division": (
        {"texts": (text("b", part=(1, 2)),)},
        "1 of its texts are counted in another file too: gather each text once",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    first = write(tmp_path / "1.safetensors")
    path = tmp_path / "2.safetensors"
    sums = {"fisher:w": FISHER} | ({} if "grams" in changes else {"gram:w": GRAM})
    with StatisticsWriter(path, {name: SHAPES[name] for name in sums}, facts(**changes)) as writer:
        for name, total in sums.items():
            writer.add(name, total)
        writer.finish()
    with pytest.raises(InputError) as caught:
        add_up([first, open_statistics(path)], tmp_path / "sum.safetensors")
    assert str(caught.value).endswith(message)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "sum.safetensors").exists()


def test_parts_of_one_text_may_share_documents(tmp_path: Path) -> None:
    """A text that stands twice in a file may fall into two parts, and counts twice then as it does in the whole."""
    parts = [write(tmp_path / f"{i}.safetensors", texts=(text("a", part=(i, 2)),)) for i in (1, 2)]
    assert add_up(parts, tmp_path / "sum.safetensors").documents == ("a", "a")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": FISHER}, path)
    message = f"{path} holds no statistics that this moerge can read: gather them again with 'moerge stats'"
    with pytest.raises(InputError) as caught:
        open_statistics(path)
    assert str(caught.value) == message
    with pytest.raises(InputError, match=r"is no statistics file, so --force does not replace it: remove it yourself"):
        check_replaceable(path)
    path.write_bytes(b"no header")
    with pytest.raises(InputError, match="is no statistics file"):
        check_replaceable(path)


def test_a_file_that_lacks_what_it_lists_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "math.safetensors")
    save_file({"fisher:w": FISHER}, tmp_path / "odd.safetensors", metadata=read_metadata(whole.path))
    with pytest.raises(InputError, match="does not hold the statistics that it lists: gather them again"):
        open_statistics(tmp_path / "odd.safetensors")
    check_replaceable(tmp_path / "odd.safetensors")
