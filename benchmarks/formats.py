"""Peak memory and speed of reading FP8, MXFP4 and Q8_0 beside bfloat16: an average of two models of random matrices.

    python -m benchmarks.formats WORK [--gigabytes 2]

Each format is merged in a process of its own, whose peak resident memory the kernel tells. Ratios are comparable, times are
the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from moerge.checkpoint.header import build_header
from moerge.tensors.dtypes import DTYPES

WIDTH = 4096
Part = tuple[str, str, tuple[int, ...]]


def parts_of(kind: str, number: int) -> list[Part]:
    name, square = f"layers.{number}.weight", (WIDTH, WIDTH)
    if kind == "fp8":
        return [(name, "F8_E4M3", square), (f"{name}_scale_inv", "F32", (WIDTH // 128, WIDTH // 128))]
    if kind == "mxfp4":
        plain = f"layers.{number}.experts"
        return [(f"{plain}_blocks", "U8", (1, WIDTH, WIDTH // 32, 16)), (f"{plain}_scales", "U8", (1, WIDTH, WIDTH // 32))]
    return [(name, "BF16", square)]


def write_model(folder: Path, kind: str, matrices: int, seed: int) -> int:
    """A model of random matrices; the bytes of its file."""
    folder.mkdir(parents=True)
    method = {"fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "mxfp4": {"quant_method": "mxfp4"}}
    config = {"model_type": "random", **({"quantization_config": method[kind]} if kind in method else {})}
    (folder / "config.json").write_text(json.dumps(config))
    parts = sorted((p for n in range(matrices) for p in parts_of(kind, n)), key=lambda part: -DTYPES[part[1]].itemsize)
    header, _ = build_header([(name, DTYPES[dtype], shape) for name, dtype, shape in parts], {"format": "pt"})
    rng = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        for _, dtype, shape in parts:
            size = int(np.prod(shape))
            if dtype == "F32":
                file.write(rng.random(size, np.float32).tobytes())
            elif dtype == "BF16":
                file.write((rng.standard_normal(size, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
            else:
                file.write(rng.integers(100, 125, size, np.uint8).tobytes())
    return (folder / "model.safetensors").stat().st_size


def merge_once(work: Path, threads: int) -> None:
    """Merge a and b of `work` and print seconds and the peak of resident memory in bytes."""
    import moerge

    experts = {"a": str(work / "a"), "b": str(work / "b")}
    recipe = {"experts": experts, "merge": {"method": "average"}, "dtype": "bfloat16"}
    planned = moerge.plan(recipe)
    start = time.perf_counter()
    moerge.merge(planned, work / "out", threads=threads)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def q8_0_speed(elements: int) -> float:
    """Elements a second that one thread decodes of Q8_0."""
    from moerge.tensors.tensor import ArrayTensor
    from moerge.tensors.views.ggml import BlockTensor

    stored = np.random.default_rng(0).integers(0, 64, elements // 32 * 34).astype(np.uint8)
    tensor = BlockTensor("a", (elements,), "Q8_0", ArrayTensor("a", DTYPES["U8"], (stored.size,), stored))
    out_N = np.empty(1 << 18, np.float32)
    opened = tensor.open()
    opened.read(0, out_N)
    start = time.process_time()
    for begin in range(0, elements - out_N.size + 1, out_N.size):
        opened.read(begin, out_N)
    return elements / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of bfloat16 that each model stands for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    if given.once:
        merge_once(given.work, given.threads)
        return
    matrices = max(1, round(given.gigabytes * 1e9 / (2 * WIDTH * WIDTH)))
    for kind in ("bfloat16", "fp8", "mxfp4"):
        work = given.work / kind
        shutil.rmtree(work, ignore_errors=True)
        stored = sum(write_model(work / name, kind, matrices, seed) for seed, name in enumerate("ab"))
        command = [sys.executable, "-m", "benchmarks.formats", str(work), "--once", "--threads", str(given.threads)]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        figures = json.loads(run.stdout.splitlines()[-1])
        rate = 2 * matrices * WIDTH * WIDTH / figures["seconds"] / 1e6
        print(f"{kind:9} {stored / 1e9:5.2f} GB read, peak {figures['peak'] / 1e6:5.0f} MB, {rate:6.0f} million elements/s")
        shutil.rmtree(work)
    print(f"q8_0 decodes {q8_0_speed(1 << 26) / 1e6:.0f} million elements per second of one thread")


if __name__ == "__main__":
    main()
