"""torch and transformers, set up for small models on a CPU, and put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moerge.extras import require
from moerge.quiet import without_progress_bars

_SPINS = "3000"
_MOST_THREADS = 4
"""More only wait for each other on matrices this small."""


def import_torch() -> None:
    """Import torch and transformers without busy waiting. Raises InputError if they are not installed."""
    # By default a thread that waits for another spins; as soon as anything else wants a core it spins on the core that
    # the other one needs, and training takes several times as long. The variable is read when torch is imported.
    unset = os.environ.setdefault("GOMP_SPINCOUNT", _SPINS) is _SPINS
    try:
        require("models", "moerge demo", "tokenizers", "torch", "transformers")
    finally:
        if unset:
            del os.environ["GOMP_SPINCOUNT"]


@contextmanager
def settled(seed: int = 0) -> Iterator[None]:
    """torch's random state and threads set, transformers' progress bars off."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(min(_MOST_THREADS, threads))
    try:
        with without_progress_bars(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def load(checkpoint: Path) -> Any:
    """The model in `checkpoint`, in float32: most CPUs are slower in bfloat16."""
    from moerge.runtime.loading import load_model

    return load_model(checkpoint).float()
