"""One expert of a model of whole experts, without the others in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.inference.loading import check_complete, explained, in_dtype

if TYPE_CHECKING:
    import torch


def load_one_expert(folder: Path, number: int) -> Any:
    """A `moerge_heterogeneous` checkpoint's body with a shared embedding, reduced to the expert of this number, which becomes 0.

    No router, no head; on the CPU, in the element type that it is stored in.
    """
    from transformers import AutoConfig

    from moerge.modeling import register
    from moerge.modeling.modeling_heterogeneous_moerge import MoergeHeterogeneousModel

    register()
    kind: Any = MoergeHeterogeneousModel
    with explained(str(folder)):
        config: Any = AutoConfig.from_pretrained(folder)
        config.expert_configs, config.expert_names = [config.expert_configs[number]], [config.expert_names[number]]
        config.routing = config.check_routing({"kind": "uniform"})
        model, found = kind.from_pretrained(
            None, config=config, state_dict=dict(_tensors(folder, number)), output_loading_info=True, **in_dtype(None)
        )
    check_complete(str(folder), found)
    return model.eval()


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
