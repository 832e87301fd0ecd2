"""Whether merged checkpoints load in older versions of transformers, with the logits that the installed one gives.

    python tests/clients/transformers_4x.py 4.50.3 4.57.6

A dense merge of every case of the families' tests, and every native MoE of theirs. Each version gets a virtual environment of
its own under --work, which is kept. Not part of the tests: it downloads packages. The exit code is 1 where a version does
something else than `moerge plan --for transformers-4` says; what it has no architecture for is listed only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import environments

TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]
READER = """
import sys, torch, transformers
from pathlib import Path
transformers.utils.logging.set_verbosity_error()
failed = 0
for reference in sorted(Path(sys.argv[1]).glob("*/*.pt")):
    folder = reference.with_suffix("")
    label = f"{transformers.__version__:8} {folder.parent.name:24} {folder.name:6}"
    stored = torch.load(reference)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, torch_dtype="auto", attn_implementation="eager"
        )
        assert not any(report.values()), report
        transformers.AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model.eval()(input_ids=stored["tokens"], use_cache=False).logits
    except Exception as error:
        if "does not recognize this architecture" in str(error):
            print(label, "not in this version", flush=True)
            continue
        outcome, shown = "cannot", f"{type(error).__name__}: {str(error).splitlines()[0][:110]}"
    else:
        difference = float((logits - stored["logits"]).abs().max())
        outcome, shown = "runs" if difference <= float(sys.argv[2]) else "differs", f"{difference:.1e}"
    failed += outcome != stored["predicted"]
    print(label, shown, "" if outcome == stored["predicted"] else f"<- moerge says: {stored['predicted']}", flush=True)
sys.exit(failed > 0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("clients-work"))
    arguments = parser.parse_args()
    models = arguments.work / "transformers-models"
    write_references(models)
    failed = [version for version in arguments.versions if not loads(version, models, arguments.work)]
    sys.exit(f"transformers {', '.join(failed)}: not what moerge says" if failed else 0)


def write_references(folder: Path) -> None:
    """Merges and their logits as this environment computes them."""
    sys.path.insert(0, str(ROOT))
    import moerge
    from moerge.clients import check_folder
    from tests.helpers.hf_models import CASES, TOKENS, load, logits, torch
    from tests.routers import test_native_formats

    dense = {name: make for name, make in CASES.items() if not name.startswith("gemma3") or name.startswith("gemma3_text")}
    native = {f"native-{name}": lambda name=name: test_native_formats.make(name) for name in test_native_formats.CASES}
    for name, make in {**dense, **native}.items():
        kind = "moe" if name in native else "dense"
        out = folder / name / kind
        if out.with_suffix(".pt").exists():
            continue
        test_native_formats.write_experts(folder / name, make())
        experts = {expert: str(folder / name / expert) for expert in ("math", "code")}
        recipe = {"base": str(folder / name / "base"), "experts": experts, **({"moe": {}} if kind == "moe" else {})}
        moerge.merge(recipe, out, force=True)
        reference = logits(load(out, attn_implementation="eager"))
        predicted = check_folder(out, "transformers-4")
        torch.save({"tokens": TOKENS, "logits": reference, "predicted": predicted}, out.with_suffix(".pt"))


def loads(version: str, models: Path, work: Path) -> bool:
    """Compare in an environment with this version of transformers."""
    python = environments.transformers(version).python(work)
    return subprocess.run([python, "-c", READER, models, str(TOLERANCE)]).returncode == 0


if __name__ == "__main__":
    main()
