"""Other tasks of lm-evaluation-harness: its figures, ours beside them, and an independent likelihood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moerge
from moerge.errors import InputError
from tests.helpers.command import moerge as command
from tests.helpers.hf_models import load
from tests.helpers.tiny import make_models

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_models(folder, experts=("math",))
    rows = [
        {"question": f"w{index} w{index + 3}", "choices": [f"w{(index * 7 + k) % 40}" for k in range(3)], "answer": index % 3}
        for index in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own").mkdir()
    (folder / "own" / "colours.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder


def right(world: Path, name: str) -> np.ndarray:
    """The choice with the largest likelihood in float64, by transformers' model alone."""
    import transformers

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(world / name), load(world / name).double()
    found = []
    for line in (world / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            context = len(tokenizer(row["question"])["input_ids"])
            with torch.no_grad():
                log_TV = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_TV[place - 1, whole[place]]) for place in range(context, len(whole))))
        found.append(float(np.argmax(scores) == row["answer"]))
    return np.array(found)


def test_figures_are_the_harness_own_and_differences_are_paired(world: Path, tmp_path: Path) -> None:
    names = [str(world / "base"), str(world / "math")]
    found = moerge.evaluate(names, tasks=["colours"], task_folder=world / "own", dtype="float32", out=tmp_path / "out")
    expected = {name: right(world, Path(name).name) for name in names}
    assert {score.checkpoint: score.value for score in found.scores} == {name: rows.mean() for name, rows in expected.items()}
    assert {(score.metric, score.documents) for score in found.scores} == {("acc", 24)}
    difference = found.differences[0]
    assert difference.value == pytest.approx((expected[names[1]] - expected[names[0]]).mean())
    assert difference.low is not None and difference.low <= difference.value
    again = moerge.evaluate(
        names, tasks=["colours"], task_folder=world / "own", dtype="float32", out=tmp_path / "out", resume=True
    )
    assert again.scores == found.scores


def test_the_command_shows_other_tasks_beside_texts(world: Path) -> None:
    (world / "text.jsonl").write_text(json.dumps({"text": "w1 w2 w3 w4"}) + "\n")
    arguments = ["--tasks", "colours", "--task-folder", world / "own", "--limit", 6, "--perplexity", f"t={world / 'text.jsonl'}"]
    result = command("eval", world / "base", *arguments)
    assert result.code == 0 and "colours" in result.out and "bits per byte" in result.out, result.err


def test_unknown_names_and_data_that_need_a_network_are_said(world: Path) -> None:
    with pytest.raises(InputError, match=r"'gsm8'.*'gsm8k'"):
        moerge.evaluate(world / "base", tasks=["gsm8"])
    with pytest.raises(InputError, match=r"arc_easy.*network"):
        moerge.evaluate(world / "base", tasks=["arc_easy"])
    with pytest.raises(InputError, match="sandbox"):
        (world / "own" / "unsafe.yaml").write_text(
            TASK.format(file=world / "rows.jsonl").replace("colours", "unsafe") + "unsafe_code: true\n"
        )
        moerge.evaluate(world / "base", tasks=["unsafe"], task_folder=world / "own")
