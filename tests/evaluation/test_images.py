"""`moerge eval --perplexity` on conversations about images: the answers' loss, as transformers' model computes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moerge.runtime.loading import load
from tests.helpers.command import moerge
from tests.helpers.multimodal import VISION_LANGUAGE, save_with_processor, write_pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and documents with images."""
    folder = tmp_path_factory.mktemp("vision")
    save_with_processor(VISION_LANGUAGE["qwen2_5_vl"](), folder, ("model",))
    write_pictures(folder, "math", 4)
    return folder


def test_the_perplexity_of_answers_given_images(folder: Path) -> None:
    lines = [*(folder / "math.jsonl").read_text().splitlines(), json.dumps({"messages": [
        {"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8 w9"}]})]  # fmt: skip
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    done = moerge(
        "eval",
        folder / "model",
        "--perplexity",
        f"math={folder / 'mixed.jsonl'}",
        "--dtype",
        "float32",
        "--batch-size",
        "2",
        "--json",
    )
    assert done.code == 0, done.err
    loaded, nats, count = load(folder / "model", dtype="float32"), 0.0, 0
    from moerge.runtime.inputs import model_inputs
    from moerge.texts import read_documents

    for document in read_documents(str(folder / "mixed.jsonl")):
        inputs = model_inputs(loaded.tokenizer, document)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            log_TV = (
                loaded.model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
                .logits[0]
                .log_softmax(-1)
            )
        start = ids.index(4) + 1  # behind the word "assistant"
        nats -= sum(float(log_TV[place - 1, ids[place]]) for place in range(start, len(ids)))
        count += len(ids) - start
    found = {row["metric"]: row["value"] for measure in done.json["measures"] for row in measure["scores"]}
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_a_document_that_is_longer_than_the_window(folder: Path) -> None:
    done = moerge("eval", folder / "model", "--perplexity", f"math={folder / 'math.jsonl'}", "--window", "6")
    assert done.code == 2 and "math.jsonl, line 1" in done.err and "--window" in done.err, done.err
