"""What the models rely on in transformers: a version that renames it is noticed, by these tests and by the models themselves."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moerge import modeling
from moerge.modeling import MoergeCache, code_files, versions_moerge
from moerge.modeling.generation_moerge import MoergeGenerationMixin
from moerge.modeling.versions_moerge import CACHE, CACHES, Cache, GenerationMixin, check_overrides, check_takes
from tests.modeling.mixed_models import mixed
from tests.modeling.routed_models import prompts, routed

pytestmark = pytest.mark.slow

INHERITED = {
    *("early_initialization", "offload", "prefetch"),  # of static and offloaded caches
    *("update_conv_state", "update_recurrent_state", "update_indexer", "get_conv_state", "get_recurrent_state"),  # of a lane
    *("has_previous_state", "is_dummy"),  # asked of a lane
    *("max_batch_size", "max_cache_len", "get_max_cache_shape"),  # of static caches, before 5.20
}
"""Methods of a cache that nobody calls on a MoergeCache."""


def imports(path: Path) -> set[str]:
    return set(re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("auto_map", [modeling.AUTO_MAP, modeling.HETEROGENEOUS_AUTO_MAP])
def test_the_files_that_transformers_loads_name_all_others(auto_map: dict[str, str]) -> None:
    """transformers 5.5 to 5.9 copies what a file imports, and not what those files import."""
    files = code_files(auto_map)
    for home in {name.split(".")[0] for name in auto_map.values()}:
        wanted, waiting = set(), [home]
        while waiting:
            new = imports(files[f"{waiting.pop()}.py"]) - wanted
            wanted |= new
            waiting += new
        assert imports(files[f"{home}.py"]) >= wanted - {home}


def test_what_comes_from_transformers_comes_through_one_file() -> None:
    for path in Path(modeling.__file__).parent.glob("*_moerge.py"):
        if path.stem == "versions_moerge":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert path.stem.startswith("configuration")


def test_every_method_of_a_cache_is_ours_or_harmless() -> None:
    """What is inherited reads `layers`, of which a MoergeCache has none."""
    theirs = {name for name in vars(Cache) if not name.startswith("_")} | {"__len__"}
    assert theirs - set(vars(MoergeCache)) <= INHERITED


def test_what_generate_calls_is_there_with_the_same_arguments() -> None:
    check_overrides(MoergeGenerationMixin, GenerationMixin)

    class Renamed:
        def _prefill(self, tokens: Any, generation_config: Any) -> None: ...

    class Without: ...

    with pytest.raises(ImportError, match="_prefill takes input_ids, generation_config instead of tokens"):
        check_overrides(Renamed, GenerationMixin)
    with pytest.raises(ImportError, match="Without has no _prefill"):
        check_overrides(Renamed, Without)
    with pytest.raises(ImportError, match=r"for transformers 5\.5 to .* and this is .*takes no past\): run `moerge refresh"):
        check_takes(transformers.models.llama.modeling_llama.LlamaAttention.forward, [CACHE, "past"])


def test_the_cache_has_one_name_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions_moerge._cache_name() == CACHE
    monkeypatch.setattr(versions_moerge, "create_masks_for_generate", lambda memory: None)
    with pytest.raises(ImportError, match="its cache is not called cache or past_key_values"):
        versions_moerge._cache_name()


@pytest.mark.parametrize("make", [routed, lambda: mixed("llama", "gpt_neox"), lambda: routed().model])
@torch.no_grad()
def test_a_cache_is_taken_by_either_name_and_by_no_other(make: Any) -> None:
    model = make()
    if hasattr(model, "set_routing"):
        model.set_routing("uniform")
    else:
        model.config.routing = {"kind": "uniform"}
    ids = torch.stack(prompts(6))
    whole = model(ids)[0]
    for name in CACHES:
        assert name in inspect.signature(model.forward).parameters
        cache = model(ids[:, :4])[CACHE]
        torch.testing.assert_close(model(ids[:, 4:], **{name: cache})[0], whole[:, 4:], atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="forward takes a cache as cache or past_key_values, not as memory: it would be lost"):
        model(ids, memory=cache)
    with pytest.raises(TypeError, match="two caches"):
        model(ids, cache=cache, past_key_values=cache)
