"""The models of a tuning: where they lie, the one that is tuned without values, and in parts on several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moerge.checkpoint.locate import locate
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.reader import Checkpoint, is_adapter
from moerge.errors import InputError
from moerge.tuning.settings import TuneConfig


def locate_models(tune_config: TuneConfig, *, weights: bool = True) -> dict[str, Checkpoint]:
    """The model, under "", and each source's teacher. Raises InputError that names the line where one is not there."""
    wanted: dict[str, tuple[tuple[str, ...], str]] = {"": (("model",), tune_config.settings.model)}
    if tune_config.settings.distils:
        for name, source in tune_config.settings.data.items():
            wanted[name] = (("data", name, "teacher"), str(source.teacher))
    found = {}
    for name, (path, location) in wanted.items():
        try:
            found[name] = locate(location, relative_to=tune_config.folder, weights=weights)
        except InputError as error:
            raise tune_config.error(path, f": {error}", code=error.code) from None
        if is_adapter(found[name]):
            raise tune_config.error(path, f" is {location}, an adapter and no model: merge it with its base first")
    return found


def expert_names(model: Checkpoint) -> list[str]:
    """The names of a MoE's experts, where moerge made it."""
    return list((read_manifest(model.folder) or {}).get("experts", ()))


def skeleton_of(folder: Path) -> tuple[Any, Any]:
    """The model without values, and its tokenizer. Raises InputError where transformers cannot load them."""
    import torch
    from transformers import AutoModelForCausalLM

    from moerge.modeling import register
    from moerge.runtime.loading import check_runnable, explained, load_config, load_tokenizer

    register()
    check_runnable(folder)
    auto: Any = AutoModelForCausalLM
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    with explained(str(folder)), torch.device("meta"):
        model = auto.from_config(config)
    tokenizer.model_max_length = sys.maxsize  # documents are cut afterwards
    return model, tokenizer


def load_sharded(folder: Path, processes: int) -> Any:
    """The model in float32, each process with a part of every parameter. Raises InputError where transformers cannot."""

    from moerge.runtime.loading import load_model

    try:
        from transformers import distributed as untyped

        distributed: Any = untyped
        shards = distributed.DistributedConfig(fsdp_size=processes)
    except (ImportError, AttributeError):
        raise InputError("sharding fsdp2 needs transformers 5.20 or newer: pip install --upgrade transformers") from None
    model = load_model(folder, dtype="float32", distributed_config=shards)
    if not is_sharded(model):
        raise InputError(f"transformers did not shard {folder} over {processes} processes: leave out 'sharding', which gives DDP")
    return model


def is_sharded(model: Any) -> bool:
    """Return whether this process has a part of every parameter (FSDP2), but for adapters that are new."""
    from torch.distributed.tensor import DTensor

    return all(isinstance(parameter, DTensor) for name, parameter in model.named_parameters() if ".lora_" not in name)


def part_of(whole: Any, like: Any) -> Any:
    """This process's part of a tensor that all have, shared out by rows as `like` is; all of it where that is not."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def local(value: Any) -> Any:
    """This process's part of a tensor, in place."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value
