"""What is said about roles, by how far apart experts are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from moerge.comparison import Comparison, compare
from moerge.comparison.advice import CLOSE, FAR, UNRELATED
from tests.helpers.tiny import llama_config, llama_tensors, write_checkpoint, write_recipe


@pytest.fixture
def compared(tmp_path: Path):
    """Compare experts a, b, ... whose difference to the base is drawn, then scaled by role."""

    def run(
        *drifts: dict[str, float], opposed: bool = False, ancestors: bool = True, base: bool = True, **sections
    ) -> Comparison:
        config = llama_config()
        start = llama_tensors(config)
        write_checkpoint(tmp_path / "base", start, config, dtype="F32")
        for index, drift in enumerate(drifts):
            own = start if ancestors else llama_tensors(config, seed=index)
            rng = np.random.default_rng(0 if opposed else index)
            tensors = {}
            for name, value in own.items():
                change = rng.standard_normal(value.shape, dtype=np.float32)
                change *= np.linalg.norm(value) / np.linalg.norm(change) * (-1 if opposed and index else 1)
                tensors[name] = value + np.float32(next((d for part, d in drift.items() if part in name), 0.01)) * change
            write_checkpoint(tmp_path / "abcd"[index], tensors, config, dtype="F32")
        experts = list("abcd"[: len(drifts)])
        return compare(write_recipe(tmp_path, base="base" if base else None, experts=experts, **sections))

    return run


def answers(found: Comparison) -> dict[str, str]:
    return {verdict.role: verdict.answer for verdict in found.verdicts}


def reason(found: Comparison, role: str) -> str:
    return next(verdict.reason for verdict in found.verdicts if verdict.role == role)


def test_experts_that_hardly_changed_can_be_merged(compared) -> None:
    found = compared({}, {})
    assert answers(found) == dict.fromkeys(("embedding", "attention", "ffn", "head", "norm"), "merge")
    assert reason(found, "ffn") == "no two experts are further than 0.014 of their norm apart"
    assert found.advice.startswith("a dense merge should work: begin with average")
    assert found.ignored_advice == ()


def test_experts_that_drifted_merge_with_care(compared) -> None:
    found = compared({"mlp": 0.2}, {"mlp": 0.2}, {"mlp": 0.2})
    assert answers(found)["ffn"] == "merge with care" and answers(found)["attention"] == "merge"
    assert re.fullmatch(
        r"[ab] and [bc] are 0\.2[89] of their norm apart: a merge keeps a part of what each learned "
        r"\(the average 3[345]% of its task vector\), a separate copy keeps all",
        reason(found, "ffn"),
    )
    assert "scales from 0.33 to 0.67; a MoE with separate [ffn] keeps more" in found.advice


def test_experts_that_drifted_far_stay_separate(compared) -> None:
    found = compared({"mlp": 0.8}, {"mlp": 0.8})
    assert answers(found)["ffn"] == "keep separate" and answers(found)["attention"] == "merge"
    assert "a and b are 0.8" in reason(found, "ffn")
    assert "little or nothing of what they learned survives a merge" in reason(found, "ffn")
    assert found.advice == "build a MoE that keeps [ffn] separate and merges the rest"
    assert found.ignored_advice == ("ffn",)
    kept = compared({"mlp": 0.8}, {"mlp": 0.8}, moe={"router": {"kind": "random"}})
    assert kept.ignored_advice == ()


def test_attention_that_drifted_far_is_routed_by_sequence(compared) -> None:
    found = compared({"mlp": 0.8, "attn": 0.8}, {"mlp": 0.8, "attn": 0.8})
    assert answers(found)["norm"] == "keep separate"
    assert reason(found, "norm") == "they scale what attention and ffn read, which stay separate"
    assert found.advice == "route whole sequences: moe with format moerge and separate [ffn, attention, norm]"


@pytest.mark.parametrize("base", [True, False])
def test_models_of_two_ancestors_are_not_averaged(compared, base: bool) -> None:
    found = compared({}, {}, ancestors=False, base=base)
    assert set(answers(found).values()) == {"keep separate"}
    assert "a and b are as unlike as models without a common ancestor (cosine of their parameters" in reason(found, "attention")
    assert found.advice.startswith("do not average these models: route whole sequences to them instead")
    assert "separate [ffn, attention, norm, embedding, head]" in found.advice
    assert found.ignored_advice == ("embedding", "attention", "ffn", "head", "norm")


def test_experts_that_undo_each_other(compared) -> None:
    found = compared({}, {}, opposed=True)
    assert reason(found, "head") == "a and b undo each other (cosine of their task vectors -1.00): let ties elect signs"
    assert answers(found)["head"] == "merge with care"


def test_an_expert_that_is_outvoted(compared) -> None:
    found = compared({"mlp": 0.05}, {"mlp": 0.01})
    assert reason(found, "ffn") == "a changed 5.0 times as much as b, which it will outvote: give b a larger weight"
    assert (answers(found)["ffn"], answers(found)["head"]) == ("merge with care", "merge")


def test_limits_are_in_order() -> None:
    """A distance d of parameters of equal norm is a cosine of 1 - d^2 / 2."""
    assert 0 < CLOSE < FAR < 2**0.5 * (1 - UNRELATED) ** 0.5
