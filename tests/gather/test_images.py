"""Statistics of a vision-language model over images, against slow and obvious computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moerge.gather.running import gram_sums, layout_of, tokenized
from moerge.runtime.inputs import model_inputs
from moerge.runtime.loading import load
from moerge.statistics import open_statistics
from moerge.texts import read_documents
from tests.gather import gathered_texts as texts
from tests.helpers.command import moerge
from tests.helpers.multimodal import VISION_LANGUAGE, save_with_processor, write_pictures
from tests.helpers.tiny import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an expert, documents with images, and the expert's statistics."""
    folder = tmp_path_factory.mktemp("vision")
    save_with_processor(VISION_LANGUAGE["qwen2_5_vl"](), folder, ("base", "math"))
    calibration = {"math": write_pictures(folder, "math", 3).name}
    recipe = write_recipe(folder, experts=["math"], merge={"method": "fisher"}, calibration=calibration, config="base")
    done = moerge("stats", recipe, folder / "stats", "--kind", "all", "--json")
    assert done.code == 0, done.err
    return folder


def test_fisher_information_is_of_the_text_given_the_images(folder: Path) -> None:
    loaded, found = load(folder / "math", dtype="float32"), open_statistics(folder / "stats" / "math.safetensors")
    expected, predicted = {name: torch.zeros_like(p).double() for name, p in loaded.model.named_parameters()}, 0
    for document in read_documents(str(folder / "math.jsonl")):
        loaded.model.zero_grad()
        inputs = model_inputs(loaded.tokenizer, document)
        ids_T = inputs["input_ids"][0]
        log_TV = loaded.model(**inputs).logits[0].log_softmax(-1)
        places = [place for place in range(1, len(ids_T)) if ids_T[place] != loaded.model.config.image_token_id]
        torch.stack([log_TV[place - 1, ids_T[place]] for place in places]).sum().backward()
        predicted += len(places)
        for name, parameter in loaded.model.named_parameters():
            expected[name] += parameter.grad.double() ** 2
    assert found.facts.predicted == predicted < found.facts.tokens - found.facts.sequences
    assert len(found.facts.fisher) == len(expected)
    for name, square in expected.items():
        stored = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        np.testing.assert_allclose(
            texts.read(found, "fisher", stored), square.numpy(), rtol=1e-3, atol=1e-6 * float(square.max()), err_msg=name
        )


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"])
def test_gram_matrices_hold_what_layers_read_of_images(folder: Path, name: str) -> None:
    loaded, found = load(folder / "math", dtype="float32"), open_statistics(folder / "stats" / "math.safetensors")
    path = name.removesuffix(".weight").replace("model.", "model.language_model.").replace("visual.", "model.visual.")
    inputs: list[torch.Tensor] = []
    loaded.model.get_submodule(path).register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    for document in read_documents(str(folder / "math.jsonl")):
        with torch.no_grad():
            loaded.model(**model_inputs(loaded.tokenizer, document))
    rows_NI = torch.cat([state.reshape(-1, state.shape[-1]) for state in inputs]).double()
    expected = rows_NI.T @ rows_NI
    stored = texts.gram(found, name)
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-4, atol=1e-5 * float(np.abs(stored).max()))


def test_documents_with_images_run_alone_in_a_batch(folder: Path) -> None:
    loaded = load(folder / "math", dtype="float32")
    pictures = list(read_documents(str(folder / "math.jsonl")))
    documents = ["w5 w6 w7", "w8 w9", pictures[0], "w10 w11 w12 w13", pictures[1], pictures[2], "w6 w7"]
    sequences, weight = tokenized(loaded.tokenizer, documents, 512), "model.layers.0.self_attn.q_proj.weight"
    assert [len(ids) for ids, _ in sequences.batches(2)] == [2, 1, 1, 1, 1, 1]
    tensors = {weight: open_tensors(folder / "math")[weight]}
    layout = layout_of(loaded.model, tensors, {"gram": frozenset([weight])}, sequences.ids[0])
    sums = [
        gram_sums(loaded.model, layout, [f"gram:{weight}"], sequences, batch_size=size, advance=lambda count: None)
        for size in (1, 3)
    ]
    for name, total in sums[0].items():
        torch.testing.assert_close(total, sums[1][name], rtol=1e-5, atol=1e-6)


def open_tensors(folder: Path) -> dict[str, object]:
    """The tensors of a checkpoint by name."""
    from moerge.checkpoint.header import read_header

    return dict(read_header(folder / "model.safetensors"))
