"""Projectors of a model of whole experts: what carries the shared embedding into an expert, and its states to the shared head.

MergeME, section 3.2: Proj-in_i maps d_m to d_i, Proj-out_i maps d_i to d_m, MLPs. Here a projector is the map
linear(x) + down(gelu(up(x))), without the linear part where all of it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moerge.architecture.family import Expected
from moerge.checkpoint.tensor import Tensor
from moerge.moe.projector_in import ProjectorInFit
from moerge.moe.projector_out import ProjectorOutFit
from moerge.moe.token_weights import TokenWeights
from moerge.planning.operations import Draw, Fit, Operation

Kind = Literal["fitted", "random"]

FACTOR = 4
"""How many times as wide as the shared width the MLPs are."""


@dataclass(frozen=True, eq=False)
class ExpertTables:
    """An expert's embedding [V, D] and head [V, D], mapped to the shared vocabulary.

    `embedding` is what the expert's embedding module puts out; `head` is such that head @ h (+ head_bias) are its logits.
    """

    name: str
    embedding: Tensor
    head: Tensor
    head_bias: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """A tensor of a projector; `inputs` is how many inputs its layer has."""

    tensor: Expected
    side: Literal["in", "out"]
    layer: Literal["linear", "up", "down"]
    inputs: int

    @property
    def what(self) -> str:
        """How the plan calls it."""
        return f"projector_{self.side}.{self.layer}"


def projector_config(kind: Kind, width: int) -> dict[str, Any]:
    """`projectors` of config.json, given the shared width."""
    return {"linear": kind == "fitted", "width": FACTOR * width}


def expected_projectors(projectors: Mapping[str, Any], widths: Sequence[tuple[int, int]], width: int) -> list[Expected]:
    """Every tensor of the projectors, given `projectors` of config.json and the widths of each expert's embedding and head."""
    return [part.tensor for part in _parts(projectors, widths, width)]


def projector_outputs(kind: Kind, experts: Sequence[ExpertTables], width: int, seed: int = 0) -> list[tuple[Expected, Operation]]:
    """The projectors' tensors and where they come from, expert by expert, Proj-in before Proj-out.

    `random` (the paper's start): everything drawn as `torch.nn.Linear` draws it, uniformly within 1 / sqrt(inputs), a function of
    the seed and the tensor's name alone. `fitted`: see `ProjectorInFit` and `ProjectorOutFit`.
    """
    widths = [(expert.embedding.shape[1], expert.head.shape[1]) for expert in experts]
    parts = _parts(projector_config(kind, width), widths, width)
    if kind == "random":
        return [(part.tensor, _drawn(part, seed)) for part in parts]
    weights = TokenWeights()
    units = FACTOR * width
    into = [Fit(ProjectorInFit(e.name, e.embedding, weights, shared=width, units=units, seed=seed)) for e in experts]
    out = [Fit(ProjectorOutFit(e.name, e.head, weights, shared=width, bias=e.head_bias)) for e in experts]
    return [(part.tensor, _fitted(part, into, out, seed)) for part in parts]


def _parts(projectors: Mapping[str, Any], widths: Sequence[tuple[int, int]], width: int) -> Iterator[_Part]:
    for expert, (inner, outer) in enumerate(widths):
        yield from _projector("in", expert, width, inner, projectors)
        yield from _projector("out", expert, outer, width, projectors)


def _projector(
    side: Literal["in", "out"], expert: int, inputs: int, outputs: int, projectors: Mapping[str, Any]
) -> Iterator[_Part]:
    hidden = projectors["width"]
    layers: dict[Literal["linear", "up", "down"], tuple[int, int]] = {"up": (hidden, inputs), "down": (outputs, hidden)}
    if projectors["linear"]:
        layers = {"linear": (outputs, inputs), **layers}
    for layer, shape in layers.items():
        role, dense = f"projector_{side}.{expert}.{layer}", f"projector_{side}.{layer}"
        name = f"model.projectors_{side}.{expert}.{layer}"
        yield _Part(Expected(role, f"{name}.weight", shape, expert, dense), side, layer, shape[1])
        yield _Part(Expected(f"{role}.bias", f"{name}.bias", shape[:1], expert, f"{dense}.bias"), side, layer, shape[1])


def _fitted(part: _Part, into: Sequence[Operation], out: Sequence[Operation], seed: int) -> Operation:
    """An operation of a fitted projector. What is best is linear in the states, so the MLP behind them starts at zero."""
    assert part.tensor.expert is not None
    if part.side == "in":
        return into[part.tensor.expert]
    if part.layer == "up":
        return _drawn(part, seed)
    return Draw(seed=0, bound=0.0, what=part.what) if part.layer == "down" else out[part.tensor.expert]


def _drawn(part: _Part, seed: int) -> Draw:
    return Draw.of_linear(part.inputs, seed, what=part.what)
