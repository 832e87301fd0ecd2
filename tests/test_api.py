"""The public names of `moerge`, methods from functions, and how results show themselves."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moerge
from moerge.registry import Registry
from tests.helpers.tiny import make_models, write_recipe

RECIPES = ["plan", "merge", "compare", "learn", "stats"]
CHECKPOINTS = ["verify", "inspect", "route", "generate", "evaluate", "push", "extract", "refresh"]
VERBS = [*RECIPES, *CHECKPOINTS, "tune", "report", "demo", "search", "export"]
ZERO = {"w": np.zeros(5, np.float32)}
EXPERTS = [{"w": np.arange(5, dtype=np.float32) * factor} for factor in (1, -2, 7)]


def test_completion_lists_every_verb_and_nothing_private() -> None:
    names = dir(moerge)
    assert set(VERBS) <= set(names) and not [name for name in names if name.startswith("_") and name != "__version__"]
    assert all(getattr(moerge, name) is not None for name in names)


def test_verbs_stay_functions_whatever_is_imported() -> None:
    code = "import moerge, moerge.cli.app, moerge.comparison, moerge.learning, moerge.reporting\n"
    code += f"print([name for name in {VERBS} if not callable(getattr(moerge, name))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_keywords(verb: str) -> None:
    several = {"merge", "learn", "search", "tune", "extract", "stats", "push", "route", "generate", "evaluate", "export"}
    kinds = [parameter.kind for parameter in inspect.signature(getattr(moerge, verb)).parameters.values()]
    assert sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) <= 1 + (verb in several)


def test_a_function_is_a_method_in_state_dicts_and_recipes(tmp_path: Path) -> None:
    @moerge.method(task_vectors=True)
    def middle_of_three(tau_EN: np.ndarray, weights_E: np.ndarray, *, power: float = 1.0) -> np.ndarray:
        return power * np.median(tau_EN, axis=0)

    merged = moerge.merge_state_dicts(ZERO, EXPERTS, method="middle_of_three", scale=0.5, power=4.0)
    np.testing.assert_array_equal(merged["w"], 2 * np.arange(5, dtype=np.float32))
    again = moerge.merge_state_dicts(ZERO, EXPERTS, method=middle_of_three(scale=0.5, power=4.0))
    assert again["w"].tobytes() == merged["w"].tobytes()
    make_models(tmp_path)
    planned = moerge.plan(write_recipe(tmp_path, merge={"method": "middle_of_three", "power": 2.0}))
    assert {output.action for output in planned.outputs} == {"middle_of_three"}
    with pytest.raises(moerge.InputError, match="pover"):
        moerge.plan(write_recipe(tmp_path, merge={"method": "middle_of_three", "pover": 2.0}))


def test_parameters_beside_a_method_object_are_refused() -> None:
    method = moerge.merge_methods()["ties"](density=0.5)
    with pytest.raises(moerge.InputError, match="density"):
        moerge.merge_state_dicts(ZERO, EXPERTS, method=method, density=0.2)


def test_registered_parts_come_before_declared_ones() -> None:
    registry: Registry[str] = Registry("moerge.nothing", "part")
    registry.register("mine", "part")
    assert (registry.names(), registry.get("mine"), registry.find("yours")) == (["mine"], "part", None)
    with pytest.raises(moerge.InputError, match="mine"):
        registry.get("min")


def test_plans_and_results_show_one_line_and_a_table(tmp_path: Path) -> None:
    make_models(tmp_path)
    planned = moerge.plan(write_recipe(tmp_path))
    result = moerge.merge(planned, tmp_path / "<out>")
    for value in (planned, result, moerge.verify(result.folder), moerge.inspect(result.folder)):
        assert len(repr(value).splitlines()) == 1 and len(repr(value)) < 400
        assert value._repr_html_().startswith("<table>") and "<out>" not in value._repr_html_()
    assert str(result.folder) in repr(result)
