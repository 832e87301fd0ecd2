"""One expert of a model of whole experts, without the others in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.runtime.loading import load_config, load_model

if TYPE_CHECKING:
    import torch


def load_one_expert(folder: Path, number: int) -> Any:
    """A `moerge_heterogeneous` checkpoint's body with a shared embedding, reduced to the expert of this number, which becomes 0.

    No router, no head; on the CPU, in the element type that it is stored in.
    """
    from moerge.modeling import register
    from moerge.modeling.modeling_heterogeneous_moerge import MoergeHeterogeneousModel

    register()
    config = load_config(folder)
    config.expert_configs, config.expert_names = [config.expert_configs[number]], [config.expert_names[number]]
    config.routing = config.check_routing({"kind": "uniform"})
    tensors = dict(_tensors(folder, number))
    return load_model(None, name=str(folder), auto=MoergeHeterogeneousModel, config=config, state_dict=tensors).eval()


def _tensors(folder: Path, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors wanted, by the names that they have in the reduced model."""
    from safetensors import safe_open

    renamed = {f"model.{part}.{number}.": f"{part}.0." for part in ("experts", "projectors_in", "projectors_out")}
    renamed["model.embed_tokens."] = "embed_tokens."
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                for before, after in renamed.items():
                    if name.startswith(before):
                        yield after + name.removeprefix(before), opened.get_tensor(name)
