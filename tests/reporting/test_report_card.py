"""`moerge report --update-card`: what was measured in the model card, read by the Hub's library, and still verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from moerge.errors import InputError
from moerge.reporting import report
from moerge.reporting.card import BEGIN, END, write_card
from tests.helpers.command import moerge
from tests.reporting.results import evaluation, write

pytestmark = pytest.mark.slow


def card(results: Path, name: str = "dense") -> Path:
    return results / "merged" / name / "README.md"


def update(results: Path) -> None:
    for made in report(results).card_updates():
        write_card(made)


def test_the_numbers_are_in_the_card_and_the_checkpoint_is_intact(results: Path) -> None:
    before = {name: card(results, name).read_text() for name in ("dense", "routed")}
    result = moerge("report", results, "--update-card")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()[1:]
    assert lines == [f"{card(results, name)}: what was measured is in it" for name in ("dense", "routed")]
    for name in ("dense", "routed"):
        assert moerge("verify", results / "merged" / name).code == 0
    after = card(results).read_text()
    without = after[: after.index(BEGIN)] + after[after.index(END) + len(END) :]
    assert without.split("---\n", 2)[2].split() == before["dense"].split("---\n", 2)[2].split()
    assert "| gsm8k | exact\\_match | 50.0% | 6.9% | 14.0% to 64.0% | 40 |" in after
    assert "| math | bits\\_per\\_byte | 1.3 | 0.04 | 1.2 to 1.6 | 30 |" in after
    assert "| math | base | nats\\_per\\_byte | -0.14 | -0.18 to -0.1 |" in after
    assert "Measured with `moerge eval`: 2026-11-18, moerge 0.1.0, torch 2.13.0." in after
    assert after.index(END) < after.index("## Use")
    routed = card(results, "routed").read_text()
    assert "| text | documents | base | math | code | accuracy |" in routed
    assert "| math | 8 | 25% | 60% | 15% | 70% |" in routed
    assert "| poems | 1,200 | 50% | 25% | 25% |  |" in routed


def test_the_hub_reads_them(results: Path) -> None:
    update(results)
    data = ModelCard.load(card(results)).data
    assert data.model_name == "dense"
    found = [
        (r.task_type, r.dataset_name, r.dataset_type, r.metric_type, r.metric_value, r.metric_args) for r in data.eval_results
    ]
    assert found == [
        ("text-generation", "gsm8k", "gsm8k", "exact_match", 0.5, {"documents": 40, "standard_error": 0.0685}),
        ("text-generation", "math (held-out text)", "math", "perplexity", 8.0, {"documents": 30, "standard_error": 0.5}),
        ("text-generation", "math (held-out text)", "math", "bits_per_byte", 1.3, {"documents": 30, "standard_error": 0.04}),
    ]
    assert data.tags == ["merge", "moerge"]
    assert "model-index" not in metadata(card(results, "routed"))  # it was only routed


def metadata(path: Path) -> Any:
    return yaml.safe_load(path.read_text().split("---\n")[1])


def test_again_changes_nothing_and_new_figures_replace_the_old(results: Path) -> None:
    update(results)
    once = {path.name: path.read_bytes() for path in (results / "merged" / "dense").iterdir()}
    (updated, _) = report(results).card_updates()
    assert updated.warning == ""
    update(results)
    assert {path.name: path.read_bytes() for path in (results / "merged" / "dense").iterdir()} == once
    later = evaluation(results).to_json()
    for measure in later["measures"]:
        measure["started"] = "2026-11-19T12:00:00+00:00"
        measure["scores"][0]["value"] = 0.75
    write(results / "a-later-one" / "results.json", later)
    update(results)
    assert "| gsm8k | exact\\_match | 75.0% |" in card(results).read_text()
    assert card(results).read_text().count(BEGIN) == 1
    assert "| math | perplexity | 0.75 |" in card(results).read_text()
    assert moerge("verify", results / "merged" / "dense").code == 0


def test_an_edited_card_keeps_its_text(results: Path) -> None:
    path = card(results)
    path.write_text(
        path.read_text().replace("---\n", "---\nlicense: mit\n", 1).replace("## Use", "## My words\n\nAre kept.\n\n## Use")
    )
    assert moerge("verify", results / "merged" / "dense").code == 2
    result = moerge("report", results, "--update-card")
    note = "was changed after the merge: its text stays as it is, and `moerge verify` takes it as right from now on"
    assert (result.code, result.err) == (0, f"warning: {path} {note}\n")
    assert "## My words\n\nAre kept." in path.read_text()
    assert metadata(path)["license"] == "mit"
    assert moerge("verify", results / "merged" / "dense").code == 0


def test_a_card_without_metadata_or_use(results: Path) -> None:
    card(results).write_text("# Mine\n")
    update(results)
    text = card(results).read_text()
    assert "# Mine\n" in text and text.endswith(f"{END}\n")
    assert ModelCard(text).data.eval_results is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"# A\n{BEGIN}\n", f"should have {BEGIN} and {END} once each: remove what is left of them, and try again"),
        (f"# A\n{END}\n{BEGIN}\n", "once each"),
        (f"# A\n{BEGIN}\n{BEGIN}\n{END}\n{END}", "once each"),
        ("---\n- a\n---\n# A\n", "is no YAML mapping: mend it, and try again"),
        ("---\na: [\n---\n# A\n", "is no YAML mapping: mend it, and try again"),
    ],
)
def test_a_damaged_card_is_refused_before_anything_is_written(text: str, message: str, results: Path) -> None:
    card(results).write_text(text)
    others = card(results, "routed").read_bytes()
    result = moerge("report", results, "--update-card")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"moerge: {card(results)}") and message in result.err and result.err.count("\n") == 1
    assert card(results).read_text() == text
    assert card(results, "routed").read_bytes() == others
    assert not (results / "report.html").exists()


def test_a_card_that_is_a_link_is_refused(results: Path) -> None:
    path = card(results)
    outside = path.rename(results.parent / "README.md")
    path.symlink_to(outside)
    with pytest.raises(InputError, match="is missing, or a link: merge again to have a model card"):
        report(results).card_updates()


def test_figures_of_other_weights_are_not_taken(results: Path) -> None:
    evaluated = json.loads((results / "eval" / "results.json").read_text())
    write(results / "eval" / "results.json", {**evaluated, "digests": dict.fromkeys(evaluated["checkpoints"], "0" * 32)})
    (results / "route" / "route.json").unlink()
    result = moerge("report", results, "--update-card")
    assert result.code == 2
    assert result.err.endswith(
        f"no result below {results} is of a checkpoint there, so no model card can be updated: measure one with "
        "`moerge eval CHECKPOINT ... --out DIR`, again if it was merged again\n"
    )
    assert BEGIN not in card(results).read_text()


def test_names_from_results_are_no_markup(results: Path) -> None:
    path = results / "eval" / "results.json"
    name = f"a|b <img src=x>\n{END} [x](y)"
    path.write_text(path.read_text().replace('"gsm8k"', json.dumps(name)))
    update(results)
    text = card(results).read_text()
    section = text[text.index(BEGIN) + len(BEGIN) : text.rindex(END)]
    assert "| a\\|b &lt;img src=x&gt; &lt;!-- moerge: end of measured --&gt; \\[x\\](y) | exact\\_match | 50.0% |" in section
    assert moerge("verify", results / "merged" / "dense").code == 0
    update(results)  # and the section is found again
    assert card(results).read_text() == text
