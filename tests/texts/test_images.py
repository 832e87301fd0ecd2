"""Images in conversations: the spellings of files, what a processor makes of them, and files that are no images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moerge.errors import InputError
from moerge.runtime.inputs import model_inputs, processor_of, text_tokens
from moerge.runtime.loading import load_tokenizer
from moerge.texts import Conversation, encode, read_documents
from tests.helpers.multimodal import VISION_LANGUAGE, write_pictures, write_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without its weights."""
    VISION_LANGUAGE["qwen2_5_vl"]().save_pretrained(tmp_path)
    write_processor(tmp_path)
    return tmp_path


def _documents(folder: Path, *rows: Any) -> list[Any]:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return list(read_documents(str(folder / "rows.jsonl")))


def _picture(folder: Path, name: str = "a.png", size: tuple[int, int] = (16, 16)) -> str:
    Image.new("RGB", size, (200, 30, 90)).save(folder / name)
    return name


def test_all_spellings_are_one_conversation(folder: Path) -> None:
    name = _picture(folder)
    part = {"type": "text", "text": "w5 w6"}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": name}, part]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": name}, part]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(folder / name)}}, part]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, part]}], "images": [name]},
        {"messages": [{"role": "user", "content": "w5 w6"}], "images": [name]},
        {"conversations": [{"from": "human", "value": "<image>\nw5 w6"}], "image": name},
        {"text": "w5 w6", "images": [name]},
    ]
    found = _documents(folder, *rows)
    assert all(isinstance(document, Conversation) and len(document.images) == 1 for document in found)
    assert {json.dumps(document.messages) for document in found} == {
        json.dumps([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5 w6"}]}])
    }


def test_parquet_holds_images(folder: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    content = (folder / _picture(folder)).read_bytes()
    rows = [{"messages": [{"role": "user", "content": "<image>w5"}], "images": [{"bytes": content, "path": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    from_file = _documents(folder, {"messages": [{"role": "user", "content": "<image>w5"}], "images": ["a.png"]})
    assert next(read_documents(str(folder / "rows.parquet"))).images[0].digest == from_file[0].images[0].digest


def test_inputs_are_the_processors_own(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    documents = list(read_documents(str(write_pictures(folder, "math", 3))))
    for index, document in enumerate(documents):
        found = model_inputs(tokenizer, document)
        processor = processor_of(tokenizer, "here")
        messages = [dict(message) for message in document.messages]
        messages[0]["content"] = [{"type": "image", "path": str(folder / f"math{index}.png")}, *messages[0]["content"][1:]]
        wanted = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert found.keys() == wanted.keys() - {"attention_mask"} and "pixel_values" in found
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        text = text_tokens(tokenizer, found["input_ids"][0].tolist())
        assert text.count(False) == int(found["image_grid_thw"].prod()) // 4 > 0


def test_tokens_behind_the_images_are_cut_and_images_are_not(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    document = _documents(folder, {"text": "w5 w6 w7 w8", "images": [_picture(folder)]})[0]
    whole, cut = model_inputs(tokenizer, document), model_inputs(tokenizer, document, 8)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :8]) and torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: its images end behind 6 tokens, of which 5 are read"):
        model_inputs(tokenizer, document, 5)
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1 has images, and here only text is read"):
        encode(tokenizer, document)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("missing.png", ["line 1", "missing.png", "cannot be read"]),
        ("text.png", ["line 1", "text.png", "no image that can be read"]),
        ("half.png", ["half.png", "no image that can be read"]),
        ("figure.eps", ["figure.eps", "no image that can be read"]),
        (".", ["cannot be read"]),
        ("https://example.com/a.png", ["should be the path of a file", "download it first"]),
        (7, ["should be the path of a file, not 7"]),
    ],
)
def test_files_that_are_no_images(folder: Path, image: Any, words: list[str]) -> None:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(content, "PNG")
    (folder / "half.png").write_bytes(content.getvalue()[:900])
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(folder / "figure.eps")
    with pytest.raises(InputError) as raised:
        _documents(folder, {"text": "w5", "images": [image]})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("content", "images"), [("<image>w5<image>", 1), ("<image>", 2), ([{"type": "image"}], 0), ([{"type": "video"}], 0)]
)
def test_places_and_images_that_do_not_match(folder: Path, content: Any, images: int) -> None:
    rows = {"messages": [{"role": "user", "content": content}], "images": [_picture(folder)] * images}
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1"):
        _documents(folder, rows)


def test_a_model_without_a_processor_says_so(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    document = _documents(folder, {"text": "w5", "images": [_picture(folder)]})[0]
    with pytest.raises(InputError, match=r"line 1 has images: .*preprocessor_config\.json"):
        model_inputs(load_tokenizer(folder), document)
