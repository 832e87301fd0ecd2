"""The number of processes, and launches that would silently do something else than what was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from moerge.errors import InputError, MachineError, MoergeError
from moerge.tuning.settings import TuneConfig

_DISK_FULL = ("No space left", "PytorchStreamWriter failed writing", "inline_container")
"""What torch says where it cannot write a file to its end."""

_TORCHRUN = "torchrun --nproc_per_node {} -m moerge tune ..."


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes that run together."""
    return int(environment.get("WORLD_SIZE", 1))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number."""
    return int(environment.get("RANK", 0))


def check_launch(tune_config: TuneConfig, environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes. Raises InputError for a launch that does not do what it says.

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing; its FSDP and DeepSpeed settings would be
    taken over by Trainer, on a CPU as plain data parallelism.
    """
    settings, processes = tune_config.settings, world_size(environment)
    told = "ACCELERATE_MIXED_PRECISION" in environment
    if told and "WORLD_SIZE" not in environment and "MASTER_ADDR" in environment:
        raise InputError(
            f"accelerate launch was asked for several processes but started one, as it does on a CPU: use {_TORCHRUN.format('N')}"
        )
    for key, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environment.get(key, "false").lower() in ("true", "1", "yes"):
            raise InputError(
                f"{key} is set, but moerge tune does not shard with {name}: use {_TORCHRUN.format('N')}, which is DDP"
            )
    if settings.processes is not None and settings.processes != processes:
        many = "process runs" if processes == 1 else "processes run"
        wanted = _TORCHRUN.format(settings.processes)
        raise tune_config.error(("processes",), f" is {settings.processes}, but {processes} {many}: start it with {wanted}")
    if settings.sharding != "none" and processes == 1:
        wanted = _TORCHRUN.format("N")
        raise tune_config.error(
            ("sharding",), f" is {settings.sharding}, but one process runs, with nothing to share: use {wanted}"
        )
    if settings.batch % (settings.accumulation * processes):
        parts = f"accumulation {settings.accumulation} times {processes} processes"
        raise tune_config.error(("batch",), f" is {settings.batch}, which {parts} do not divide")
    return processes


def on_main(job: Callable[[], None]) -> None:
    """Run `job` on the first process while the others wait; where it fails there, the others end without a word."""
    failure: BaseException | None = None
    if rank() == 0:
        try:
            job()
        except BaseException as error:
            failure = error
    if world_size() > 1 and not isinstance(failure, KeyboardInterrupt):
        import torch.distributed as dist

        code = getattr(failure, "exit_code", 1) if failure is not None else 0
        box: list[Any] = [code]
        dist.broadcast_object_list(box)
        if rank() and box[0]:
            raise SystemExit(box[0])
    if failure is not None:
        raise failure


def check_device(tune_config: TuneConfig) -> str:
    """The device to train on: the GPU where there is one. Raises InputError for one that cannot be used."""
    import torch

    device = tune_config.settings.device
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise tune_config.error(("device",), f" is {device!r}: use cpu or cuda, and CUDA_VISIBLE_DEVICES to say which")
    if device == "cuda" and not torch.cuda.is_available():
        raise tune_config.error(("device",), " is cuda, but torch sees no GPU here: use cpu, or install torch for your GPU")
    return device


def explain(error: Exception) -> MoergeError | None:
    """A failure of running as a sentence for people, where it is one."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return MachineError("the GPU's memory is full: raise 'accumulation', lower 'length', or set gradient_checkpointing")
    if any(sign in str(error) for sign in _DISK_FULL):
        return MachineError(
            "no space left for a training checkpoint: free some and run the same command again with --resume", code="no-space"
        )
    return None
