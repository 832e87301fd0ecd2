"""Gates have the same bytes whatever the number of threads, of moerge, of torch and of NumPy's BLAS."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import moerge
from moerge.merging import fitting
from moerge.runtime.forced_routing import ForcedRoutingModel
from moerge.runtime.replicas import ModelReplicas
from moerge.tensors.threads import single_threaded_blas
from tests.helpers import tiny

torch = pytest.importorskip("torch", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

NAMES = ("base", *tiny.EXPERTS)
SIZES = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd sizes and texts of odd lengths: what libraries divide among threads then does not come out even."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make_models(folder, dtype="F32", config={**SIZES, "torch_dtype": "float32"})
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        texts = (" ".join(f"w{word}" for word in rng.integers(3, tiny.VOCABULARY, 17 + 12 * n)) for n in range(5))
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    return folder


@contextlib.contextmanager
def torch_threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count  # left as it was
    finally:
        torch.set_num_threads(before)


def gates(models: Path, out: Path, kind: str, threads: int) -> dict[str, bytes]:
    texts = {} if kind == "projection" else {"calibration": {name: f"{name}.txt" for name in NAMES}}
    statistics = {"statistics": str(out.with_name(f"{out.name}-statistics"))} if kind in ("ridge", "hidden") else {}
    recipe = tiny.write_recipe(models, f"{out.name}.yaml", moe={"router": {"kind": kind, **statistics}}, **texts)
    with torch_threads(threads), threadpool_limits(threads):
        moerge.merge(recipe, out, threads=threads)
    files = {name: tensor.tobytes() for name, tensor in tiny.read_tensors(out).items() if "gate" in name}
    return files | {path.name: path.read_bytes() for path in out.parent.glob(f"{out.name}-statistics/*")}


@pytest.mark.parametrize("kind", ["hidden", "ridge", "perplexity", "projection"])
def test_gates_do_not_depend_on_threads(kind: str, models: Path, tmp_path: Path) -> None:
    once = gates(models, tmp_path / "one", kind, 1)
    assert len(once) == (6 if kind in ("hidden", "ridge") else 2)
    for threads in (3, 4):
        assert gates(models, tmp_path / f"{threads}", kind, threads) == once


def test_they_would_without_care(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    monkeypatch.setattr(fitting, "single_threaded_blas", contextlib.nullcontext)
    if gates(models, tmp_path / "one", "ridge", 1) == gates(models, tmp_path / "three", "ridge", 3):
        pytest.skip("on this processor torch's sums do not depend on the number of threads")


def test_libraries_get_one_thread_meanwhile() -> None:
    with torch_threads(3), threadpool_limits(2), single_threaded_blas():
        assert torch.get_num_threads() == 1
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} <= {1}


def test_a_crew_works_in_order_with_one_model_a_thread(models: Path, tmp_path: Path) -> None:
    gates(models, tmp_path / "moe", "hidden", 1)
    model = ForcedRoutingModel(tmp_path / "moe", experts=4, layers=2)
    ids = [model.encode(f"w{word} w7 w9", 512) for word in range(3, 10)]
    expected = [model.losses(each, 1) for each in ids]
    with single_threaded_blas(), ModelReplicas(model, 3) as replicas:
        seen = []

        def look(model: ForcedRoutingModel, each: Any) -> tuple[ForcedRoutingModel, Any, int]:
            return model, model.losses(each, 1), torch.get_num_threads()

        batches = list(replicas.run(look, ids))
        assert [len(batch) for batch in batches] == [1, 3, 3]
        seen = [result for batch in batches for result in batch]
        assert all(torch.equal(losses, wanted) for (_, losses, _), wanted in zip(seen, expected, strict=True))
        assert {threads for *_, threads in seen} == {1}
        twins = [each for each, *_ in batches[1]]
        assert [each for each, *_ in batches[2]] == twins and len({id(replica) for replica in twins}) == 3
        assert [each for each, *_ in batches[0]] == twins[:1] == [model]
        weights = [{name: tensor.data_ptr() for name, tensor in replica._model.named_parameters()} for replica in twins]
        assert weights[0] == weights[1] == weights[2]
        assert replicas.map_layers(lambda number: number * 2, range(5)) == [0, 2, 4, 6, 8]
