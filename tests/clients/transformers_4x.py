"""Whether merged checkpoints load in older versions of transformers, with the logits that the installed one gives.

    python tests/clients/transformers_4x.py 4.50.3 4.57.6

Each version gets a virtual environment of its own under --work, which is kept. Not part of the tests: it downloads packages.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TOLERANCE = 1e-5
MODELS = Path(__file__).parents[1] / "moe"
READER = """
import sys, torch, transformers
from pathlib import Path
worst = 0.0
for reference in sorted(Path(sys.argv[1]).glob("*/*.pt")):
    folder = reference.with_suffix("")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype="auto")
    assert not any(report.values()), (folder, report)
    stored = torch.load(reference)
    with torch.no_grad():
        difference = float((model.eval()(stored["tokens"]).logits - stored["logits"]).abs().max())
    print(f"{transformers.__version__:8} {folder.parent.name:16} {folder.name:6} {difference:.1e}")
    worst = max(worst, difference)
sys.exit(worst > float(sys.argv[2]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("clients-work"))
    arguments = parser.parse_args()
    write_references(arguments.work / "models")
    failed = [version for version in arguments.versions if not loads(version, arguments.work)]
    sys.exit(f"differs in transformers {', '.join(failed)}" if failed else 0)


def write_references(folder: Path) -> None:
    """A MoE and a dense merge of every kind of model in the tests, with logits as this environment computes them."""
    sys.path.insert(0, str(MODELS))
    import torch
    from test_mixtral import CONFIGS, TOKENS, load, logits, write_models

    import moerge

    for name, config in CONFIGS.items():
        experts = write_models(folder / name, config())
        recipe = {"base": str(folder / name / "base"), "experts": experts}
        for kind, section in (("moe", {"moe": {}}), ("dense", {})):
            out = folder / name / kind
            moerge.merge({**recipe, **section}, out, force=True)
            torch.save({"tokens": TOKENS, "logits": logits(load(out))}, out.with_suffix(".pt"))


def loads(version: str, work: Path) -> bool:
    """Compare in an environment with this version of transformers."""
    python = work / version / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", work / version], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0", f"transformers=={version}"], check=True)
    return subprocess.run([python, "-c", READER, work / "models", str(TOLERANCE)]).returncode == 0


if __name__ == "__main__":
    main()
