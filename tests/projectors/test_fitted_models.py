"""Models of whole experts whose projectors are fitted: end to end, with and without text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.projectors.divergence import STEPS
from moerge.projectors.proj_in import ProjectorInFit
from moerge.projectors.proj_out import ProjectorOutFit
from moerge.projectors.states import STATES
from tests.helpers import tiny
from tests.helpers.command import moerge as command
from tests.helpers.recorded import Recorded

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

from moerge.modeling import register  # noqa: E402

pytestmark = pytest.mark.slow

WIDTHS = {"wide": 16, "narrow": 8}


def texts(name: str, seed: int = 0) -> list[str]:
    rng = np.random.default_rng([seed, list(WIDTHS).index(name)])
    own = range(3, 40) if name == "wide" else range(20, 60)
    return [" ".join(f"w{word}" for word in rng.choice(own, 60)) for _ in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts that have nothing in common, with large logits, so that it matters what is lost."""
    register()
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, width) in enumerate(WIDTHS.items()):
        config = tiny.llama_config(hidden_size=width, torch_dtype="float32")
        tensors = tiny.llama_tensors(config, seed=seed)
        tensors["lm_head.weight"] = 5 * tensors["lm_head.weight"]
        tiny.write_checkpoint(folder / name, tensors, config, dtype="F32")
        (folder / f"{name}.txt").write_text("\n\n".join(texts(name)))
    return folder


def recipe(models: Path, out: str, *, text: bool = True, experts: Any = tuple(WIDTHS), **moe: Any) -> Path:
    calibration = {"calibration": {name: f"{name}.txt" for name in experts}} if text else {}
    section = {"format": "moerge", "router": {"kind": "uniform"}, **moe}
    return tiny.write_recipe(models, f"{out}.yaml", base=None, experts=experts, moe=section, **calibration)


def divergence(models: Path, out: Path, name: str) -> float:
    """KL of an expert's path from the expert, on other text of its kind, in nats a token."""
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    alone = transformers.AutoModelForCausalLM.from_pretrained(models / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    merged.set_routing("fixed", expert=name)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts(name, seed=1)])
    with torch.no_grad():
        q, p = (model(input_ids=ids).logits.log_softmax(-1) for model in (merged, alone))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_fitted_is_ahead_of_random_and_text_helps(models: Path) -> None:
    for out, options in {"text": {}, "no-text": {"text": False}, "random": {"projectors": "random", "text": False}}.items():
        moerge.merge(recipe(models, out, **options), models / out, threads=1)
    for name in WIDTHS:
        text, bare, drawn = (divergence(models, models / out, name) for out in ("text", "no-text", "random"))
        assert text < 0.9 * bare < 0.8 * drawn


def test_the_plan_lists_what_is_fitted(models: Path) -> None:
    result = command("plan", recipe(models, "plan"))
    out = " ".join(result.out.split())
    assert (result.code, result.err) == (0, "")
    assert "fit 12" in out and "projector_in, units 64, penalty 1e-06, seed 0" in out
    assert "fit 4" in out and "projector_out, penalty 1e-06" in out and "projector_out.up, seed 0, uniform within" in out
    assert "the projectors are computed after merging with one expert after the other in memory" in out and "from 24 texts" in out
    planned = moerge.plan(recipe(models, "plan"))
    assert [(type(each.fitter), each.fitter.expert) for each in planned.fit_jobs] == [  # type: ignore[attr-defined]
        (fitter, name) for name in WIDTHS for fitter in (ProjectorInFit, ProjectorOutFit)
    ]
    bare = " ".join(command("plan", recipe(models, "plan", text=False)).out.split())
    assert "computed after merging with a few tensors in memory, about 0.2 GB" in bare and "texts" not in bare


def test_progress_counts_rows_and_states(models: Path) -> None:
    progress = Recorded()
    planned = moerge.plan(recipe(models, "progress"))
    moerge.merge(planned, models / "progress", threads=1, progress=progress)
    rows = planned.outputs[0].shape[0]
    assert progress.totals("tokens") == [4 * rows + 2 * STATES * STEPS] == [progress.done["tokens"]]
    assert not progress.totals("texts")


def test_threads_change_nothing(models: Path) -> None:
    for threads in (1, 3):
        moerge.merge(recipe(models, "threads"), models / f"threads-{threads}", threads=threads)
    once, again = (tiny.read_tensors(models / f"threads-{threads}") for threads in (1, 3))
    assert all(once[name].tobytes() == again[name].tobytes() for name in once)


def test_an_interrupted_fit_goes_on_where_it_was(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proj-in of both experts are not fitted again; the result is as if nothing had happened."""
    written = recipe(models, "resumed")
    moerge.merge(written, models / "whole", threads=1)
    fit, fitted = ProjectorOutFit.fit, []

    def stop(self: ProjectorOutFit, context: Any) -> Any:
        if self.expert == "narrow":
            raise KeyboardInterrupt
        return fit(self, context)

    monkeypatch.setattr(ProjectorOutFit, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        moerge.merge(written, models / "resumed", threads=1)

    def count(self: ProjectorOutFit, context: Any) -> Any:
        fitted.append(self.expert)
        return fit(self, context)

    monkeypatch.setattr(ProjectorOutFit, "fit", count)
    monkeypatch.setattr(ProjectorInFit, "fit", lambda self, context: pytest.fail("it had been fitted already"))
    moerge.merge(written, models / "resumed", threads=1, resume=True)
    assert fitted == ["narrow"]
    assert (models / "resumed" / "model.safetensors").read_bytes() == (models / "whole" / "model.safetensors").read_bytes()


def test_two_names_of_one_model_are_exact(models: Path) -> None:
    experts = {"one": "wide", "two": "wide"}
    path = tiny.write_recipe(
        models,
        "twins.yaml",
        base=None,
        experts=experts,
        moe={"format": "moerge", "projectors": "fitted", "router": {"kind": "uniform"}},
    )
    moerge.merge(path, models / "twins", threads=1)
    merged = transformers.AutoModelForCausalLM.from_pretrained(models / "twins").eval()
    alone = transformers.AutoModelForCausalLM.from_pretrained(models / "wide").eval()
    ids = torch.tensor([[1, 5, 9, 33, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, alone(ids).logits, rtol=0, atol=1e-4)


def test_without_what_runs_models_text_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(moerge.InputError, match=r"fitting projectors to text .* pip install 'moerge\[models\]'"):
        moerge.merge(recipe(models, "refused"), models / "refused")
    moerge.merge(recipe(models, "bare", text=False), models / "bare")


def test_an_expert_that_transformers_cannot_run_is_said_in_a_sentence(models: Path, tmp_path: Path) -> None:
    for name in WIDTHS:
        tiny.write_checkpoint(
            tmp_path / name, tiny.read_values(models / name), tiny.llama_config(hidden_size=WIDTHS[name]), dtype="F32"
        )
        (tmp_path / f"{name}.txt").write_text((models / f"{name}.txt").read_text())
    tiny.edit_config(tmp_path / "wide", hidden_act="zz")
    result = command("merge", recipe(tmp_path, "odd"), tmp_path / "odd")
    assert result.code == 2 and "transformers cannot load" in result.err and "zz" in result.err, result
    assert not (tmp_path / "odd").exists()
