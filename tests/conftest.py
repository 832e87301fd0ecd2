"""What all tests share: a deterministic hypothesis, one thread a process for torch, and where shared data lies."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if "MOERGE_TEST_CACHE" not in os.environ:  # workers and programs that tests start share it
    os.environ["MOERGE_TEST_CACHE"] = tempfile.mkdtemp(prefix="moerge-cache-")
    atexit.register(shutil.rmtree, os.environ["MOERGE_TEST_CACHE"], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.environ["MOERGE_TEST_CACHE"]
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)  # what is printed must not depend on where the tests are started
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by nohup or a shell's &, and programs that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "moerge",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=int(os.environ.get("MOERGE_EXAMPLES", 100)),
)
settings.load_profile("moerge")


OF_EXTRAS = "torch|transformers|tokenizers|safetensors|peft|accelerate|datasets|pyarrow|lm_eval|matplotlib|jinja2|ml_dtypes"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip what cannot be imported without an extra, so that the others run in a core installation."""
    report = yield
    missing = re.search(rf"No module named '({OF_EXTRAS})\b", str(report.longrepr)) if report.failed else None
    if missing:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed, see the extras of moerge")
    return report


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Inputs and outputs of published merging code; they are not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "oracles"
    folder = Path(os.environ.get("MOERGE_ORACLES", default))
    if not folder.is_dir():
        pytest.skip("the published implementations' oracles are not on this machine (set MOERGE_ORACLES)")
    return folder


@pytest.fixture(scope="session")
def tokenizers_of_others() -> Path:
    """Published tokenizers; they are not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
    folder = Path(os.environ.get("MOERGE_TOKENIZERS", default))
    if not folder.is_dir():
        pytest.skip("no published tokenizers on this machine (set MOERGE_TOKENIZERS)")
    return folder
