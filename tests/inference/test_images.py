"""`moerge route` over images, on a mixture of experts that sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moerge.runtime.inputs import model_inputs
from moerge.runtime.loading import load
from moerge.texts import read_documents
from tests.helpers.command import moerge
from tests.helpers.multimodal import save_with_processor, vision_mixture, write_pictures

pytestmark = pytest.mark.slow


def test_routing_of_images_is_that_of_the_gates(tmp_path: Path) -> None:
    save_with_processor(vision_mixture(), tmp_path, ("mixture",))
    path = write_pictures(tmp_path, "math", 2)
    done = moerge("route", tmp_path / "mixture", "--text", f"math={path}", "--json")
    assert done.code == 0, done.err
    loaded = load(tmp_path / "mixture", dtype="float32")
    found, losses = [], []
    for document in read_documents(str(path)):
        inputs = model_inputs(loaded.tokenizer, document)
        with torch.no_grad():
            output = loaded.model(**inputs, output_router_logits=True, use_cache=False)
        found.append(torch.stack([logits.softmax(-1).mean(0) for logits in output.router_logits]).mean(0))
        losses.append(len(inputs["input_ids"][0]))
    alpha = list(done.json["texts"]["math"]["alpha"].values())
    torch.testing.assert_close(torch.tensor(alpha), torch.stack(found).mean(0), rtol=1e-4, atol=1e-6)
    assert all(value > 0 for value in done.json["texts"]["math"]["loss"].values())
