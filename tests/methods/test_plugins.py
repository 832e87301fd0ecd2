"""A merge method from another package: a class of its own and one entry point."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import moerge
from moerge import InputError
from moerge.methods import merge_method, merge_methods
from moerge.registry import _entry_points
from tests.helpers import tiny

PLUGIN = '''
import numpy as np
from moerge.methods import Block, MergeMethod


class Median(MergeMethod):
    """theta = the median of the experts, a multiple of it with `gain`."""

    name = "median"
    uses_weights = False
    gain: float = 1.0

    def merge(self, block: Block) -> None:
        np.multiply(np.median(block.theta_EN, axis=0), np.float32(self.gain), out=block.out_N)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution `moerge-median`, as pip would leave it in a folder on the path."""
    site = tmp_path / "site"
    metadata = site / "moerge_median-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "moerge_median.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moerge-median\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[moerge.methods]\nmedian = moerge_median:Median\n")
    monkeypatch.syspath_prepend(str(site))
    _entry_points.cache_clear()
    yield
    _entry_points.cache_clear()


@pytest.mark.usefixtures("plugin")
def test_a_recipe_can_name_it(tmp_path: Path) -> None:
    models = tiny.make_models(tmp_path, dtype="F32")
    recipe = tiny.write_recipe(tmp_path, base=None, merge={"method": "median"})
    result = moerge.merge(recipe, tmp_path / "out")
    assert result.plan.summary(1)["operations"] == {"median": len(result.plan.outputs)}
    experts = [tiny.read_values(models[name]) for name in tiny.EXPERTS]
    merged = tiny.read_values(tmp_path / "out")
    assert merged.keys() == experts[0].keys()
    for name, values in merged.items():
        np.testing.assert_array_equal(values, np.median(np.stack([expert[name] for expert in experts]), axis=0))


@pytest.mark.usefixtures("plugin")
def test_its_parameters_are_checked_like_our_own(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    recipe = tiny.write_recipe(tmp_path, merge={"method": "median", "gian": 2})
    with pytest.raises(InputError, match=r"recipe\.yaml, line \d+: merge\.gian: unknown key.*, did you mean 'gain'\?"):
        moerge.plan(recipe)


@pytest.mark.usefixtures("plugin")
def test_it_merges_state_dicts_and_stands_in_the_list() -> None:
    experts = [{"w": np.float32([value, -value])} for value in (1, 5, 2)]
    merged = moerge.merge_state_dicts(None, experts, method="median", gain=2)
    np.testing.assert_array_equal(merged["w"], [4, -4])
    assert "median" in merge_methods()


def test_without_the_package_the_method_is_unknown() -> None:
    assert "median" not in merge_methods()
    with pytest.raises(InputError, match=r"^unknown merge method 'median': "):
        merge_method("median")
