"""Try every causal language model and vision-language model of transformers, in a small size.

    python tests/matrix/families.py FILE.jsonl [--only TYPE ...] [--checks CHECK ...] [--seconds N]   # goes on where it stopped
    python tests/matrix/families.py FILE.jsonl --docs                                                 # writes docs/families.md

For each: does its table cover the checkpoint, does a dense merge give averaged modules (transformers' own, the judge), do slices,
extracted adapters and token rows work. A row has `yes`, or the reason why not.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from transformers.models.auto import modeling_auto

import moerge
from moerge.errors import InputError
from moerge.planning.checks import expected_of
from moerge.planning.models import SourceModel
from tests.helpers.tiny import write_tokenizer
from tests.matrix.small_configs import SPECIAL, VOCABULARY, small

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
CHECKS = ("load", "table", "dense", "slices", "vocabulary", "adapter")
LIMIT = 240
"""Seconds for a model."""
TOLERANCE = 1e-4
"""Of logits in float32: sums in another order."""


class Difference(Exception):
    """A result that is not the judge's."""


def class_of(kind: str, task: str) -> Any:
    named = TASKS[task][kind]
    return getattr(transformers, named if isinstance(named, str) else named[0])


def _part(config: Any, wanted: Any) -> Any:
    """The config that a class is made of: of some types only the language model's."""
    parts = (config, *(getattr(config, key) for key in config.sub_configs))
    return next((part for part in parts if isinstance(part, wanted)), config)


def small_config(kind: str, task: str) -> tuple[Any, Any]:
    """A class, and a config of a few thousand parameters for it, with as few layers as the model allows."""
    values = transformers.CONFIG_MAPPING[kind]().to_dict()
    reason: Exception | None = None
    for layers, kinds in itertools.product((2, 4, 6), (True, False)):
        try:
            config = transformers.CONFIG_MAPPING[kind].from_dict(small(values, layers, SPECIAL.get(kind, {}), kinds=kinds))
            with torch.device("meta"):
                return class_of(kind, task), class_of(kind, task)(_part(config, class_of(kind, task).config_class)).config
        except Exception as error:
            reason = reason or error
    assert reason is not None
    raise reason


def random_model(kind: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name and name.endswith("weight")))
    model.tie_weights()
    return model


def outputs(model: Any) -> Any:
    """Logits on a few tokens; None where the model does not run on text alone."""
    tokens = torch.randint(3, 19, (1, 8), generator=torch.Generator().manual_seed(1))
    for more in ({}, {"decoder_input_ids": tokens}):
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                return model(input_ids=tokens, use_cache=False, **more).logits
        except Exception:
            continue
    return None


def close(found: Any, wanted: Any, what: str) -> None:
    if (found is None) != (wanted is None) or (found is not None and found.shape != wanted.shape):
        raise Difference(f"{what} is of another shape")
    if (
        found is not None
        and found.numel()
        and not (found - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
    ):
        raise Difference(f"{what} differs by {float((found - wanted).abs().max()):.2g}")


class Trial:
    """One model type in a folder: two random models, `a` and `b`."""

    def __init__(self, kind: str, task: str, folder: Path) -> None:
        self.kind, self.task, self.folder = kind, task, folder

    def load(self) -> str:
        self.model_class, config = small_config(self.kind, self.task)
        self.models = {name: self.random(config, seed) for seed, name in enumerate("ab")}
        for name, model in self.models.items():
            model.save_pretrained(self.folder / name)
            write_tokenizer(self.folder / name)
        self.source = SourceModel.of(moerge.checkpoint.locate.locate(str(self.folder / "a")))
        again = self.again("a")
        for name, parameter in self.models["a"].state_dict().items():
            close(again.state_dict()[name], parameter, f"transformers' own reading of {name}")
        return "yes"

    def random(self, config: Any, seed: int) -> Any:
        return random_model(self.model_class, config, seed)

    def again(self, name: str) -> Any:
        model, report = self.model_class.from_pretrained(
            self.folder / name, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
        )
        wrong = [
            f"{key} {sorted(report[key])[:2]}" for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
        ]
        if wrong:
            raise Difference(f"transformers reports {wrong[0]}")
        return model.eval()

    def table(self) -> str:
        """Does the table name every tensor, and is a name's role the role's name?"""
        family = self.source.family
        if family is None:
            from moerge.architecture.derived import no_family

            raise Difference(no_family(self.source.written))
        expected = {tensor.name: tensor for tensor in expected_of(self.source)}
        for name, tensor in self.source.tensors.items():
            role = family.role_of(name)
            if role is None and not family.is_unmodeled(name):
                raise Difference(f"{name} has no role")
            if role is not None and (family.name_of(role) != name or expected[name].shape != tensor.shape):
                raise Difference(f"{name} is not what its role {role} says")
        missing = [name for name in expected if name not in self.source.tensors]
        if missing:
            raise Difference(f"{missing[0]} is in the table and not in the checkpoint")
        return "table" if not family.source else "yes"

    def merge(self, recipe: Mapping[str, Any], out: str) -> Any:
        path = self.folder / f"{out}.yaml"
        path.write_text(json.dumps(recipe))
        shutil.rmtree(self.folder / out, ignore_errors=True)
        moerge.merge(moerge.plan(path), self.folder / out, threads=1)
        return self.again(out)

    def dense(self) -> str:
        merged = self.merge({"experts": {"a": "a", "b": "b"}, "merge": {"method": "average"}}, "dense")
        first, other = self.models["a"], dict(self.models["b"].named_parameters())
        self.before = outputs(first)
        mean = self.random(first.config, 0)
        with torch.no_grad():
            for name, parameter in mean.named_parameters():
                parameter.copy_((dict(first.named_parameters())[name] + other[name]) / 2)
        state = merged.state_dict()
        for name, value in mean.state_dict().items():
            if value.is_floating_point():
                close(state[name], value, name)
        close(outputs(merged), outputs(mean), "the logits")
        return "yes" if outputs(mean) is not None else "yes (parameters only: it does not run on text alone)"

    def slices(self) -> str:
        """All layers once are the model; with the last layer twice it loads, and says something else."""
        layers = self.source.config["num_hidden_layers"]
        place = str(self.folder / "a")

        def recipe(*ranges: tuple[int, int]) -> dict[str, Any]:
            parts = [{"sources": [{"model": place, "layer_range": list(span)}]} for span in ranges]
            return {"merge_method": "passthrough", "slices": parts, "dtype": "float32"}

        whole = self.merge(recipe((0, 1), (1, layers)) if layers > 1 else recipe((0, layers)), "whole")
        close(outputs(whole), outputs(self.again("a")), "the logits of all layers")
        more = outputs(self.merge(recipe((0, layers), (layers - 1, layers)), "more"))
        if more is not None and not more.isfinite().all():
            raise Difference("the logits with the last layer twice are not finite")
        return "yes"

    def vocabulary(self) -> str:
        """The tensors with a row for each token are those that transformers resizes."""
        from moerge.planning.vocab.token_tensors import sizes_of, token_tensors

        models = (self.source,)
        found = token_tensors(models, sizes_of(models))
        model = self.random(self.models["a"].config, 0)
        before = {name: value.shape for name, value in model.state_dict().items()}
        model.resize_token_embeddings(VOCABULARY + 16, mean_resizing=False)
        resized = {name for name, value in model.state_dict().items() if value.shape != before.get(name)}
        shapes = {tuple(value.shape) for name, value in self.source.tensors.items() if name in found}
        if not found or len(resized) < len(found):
            raise Difference(f"{sorted(found)} are rows of tokens here, {sorted(resized)} in transformers")
        del shapes
        return "yes"

    def adapter(self) -> str:
        """An adapter extracted from `b`, of full rank: peft computes with it what a merge with it is."""
        import peft

        out = self.folder / "adapter"
        shutil.rmtree(out, ignore_errors=True)
        moerge.extract(str(self.folder / "b"), str(out), base=str(self.folder / "a"), rank=8)
        merged = self.merge(
            {"experts": {"b": {"model": str(self.folder / "a"), "adapter": str(out)}}, "merge": {"method": "average"}}, "adapted"
        )
        with_peft = peft.PeftModel.from_pretrained(self.again("a"), str(out)).eval()
        close(outputs(merged), outputs(with_peft), "the logits with the adapter")
        return "yes"


def kinds() -> list[tuple[str, str]]:
    return [(task, kind) for task, names in TASKS.items() for kind in sorted(names)]


def run_one(task: str, kind: str, checks: tuple[str, ...] = CHECKS) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task, "kind": kind}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(kind, task, Path(folder))
        for check in checks:
            if check != "load" and row["load"] != "yes":
                break
            row[check] = _outcome(getattr(trial, check))
    return row


def _outcome(check: Callable[[], str]) -> str:
    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        return check()
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, Difference | InputError) else f"{type(error).__name__}: "
        return (kind + " ".join(str(error).split()))[:300]
    finally:
        signal.alarm(0)


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by task and type; of a check that was run again the later outcome."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        rows.setdefault((row["task"], row["kind"]), {}).update(row)
    return rows


_BEGIN, _END = "<!-- families.jsonl: begin -->", "<!-- families.jsonl: end -->"
_TITLES = {
    "load": "tried",
    "table": "roles",
    "dense": "dense",
    "slices": "slices",
    "vocabulary": "vocabulary",
    "adapter": "adapter",
}


def _cell(row: Mapping[str, str], check: str, reasons: dict[str, int]) -> str:
    found = row.get(check)
    if found is None:
        return "" if row["load"] == "yes" else "-"
    if found in ("yes", "table"):
        return found
    return f"{'yes' if found.startswith('yes') else 'no'} ({reasons.setdefault(found, len(reasons) + 1)})"


def table(rows: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    """The rows as Markdown: numbers first, then a table for each task, then the reasons."""
    reasons: dict[str, int] = {}
    lines = []
    for task, title in (("causal", "causal language models"), ("image", "image-text models")):
        own = [row for (kind, _), row in sorted(rows.items()) if kind == task]
        counts = {
            check: (sum(row[check].startswith(("yes", "table")) for row in own if check in row), sum(check in row for row in own))
            for check in CHECKS
        }
        said = ", ".join(f"{_TITLES[check]} {good} of {tried}" for check, (good, tried) in counts.items())
        lines += [f"**{len(own)} {title}**: {said}.", "", "| type | " + " | ".join(_TITLES.values()) + " |", "|---" * 7 + "|"]
        lines += [f"| `{row['kind']}` | " + " | ".join(_cell(row, check, reasons) for check in CHECKS) + " |" for row in own]
        lines.append("")
    clean = (text.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'") for text in reasons)
    return "\n".join([*lines, *(f"{number}. {text[:160]}" for number, text in enumerate(clean, 1))])


def write_docs(results: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "families.md"
    before, _, rest = page.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    page.write_text(f"{before}{_BEGIN}\n{table(rows_of(results))}\n{_END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--checks", nargs="*", default=CHECKS, choices=CHECKS)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--docs", action="store_true", help="write the table in docs/families.md, and try nothing")
    arguments = parser.parse_args()
    if arguments.docs:
        write_docs(arguments.out)
        return
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    checks = tuple(arguments.checks)
    rows = {} if arguments.only else rows_of(arguments.out)
    done = {key for key, row in rows.items() if row["load"] != "yes" or set(checks) <= row.keys()}
    begun = time.monotonic()
    for task, kind in kinds():
        if (task, kind) in done or (arguments.only and kind not in arguments.only):
            continue
        if time.monotonic() - begun > arguments.seconds:
            break
        row = run_one(task, kind, tuple(check for check in CHECKS if check in ("load", *checks)))
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
