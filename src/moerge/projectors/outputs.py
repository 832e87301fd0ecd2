"""Projectors of a model of whole experts: what carries the shared embedding into an expert, and its states to the shared head.

MergeME, section 3.2: Proj-in_i maps d_m to d_i, Proj-out_i maps d_i to d_m, MLPs. Here a projector is the map
linear(x) + down(gelu(up(x))), without the linear part where all of it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moerge.architecture.family import ExpectedTensor
from moerge.architecture.heterogeneous import FACTOR, Kind, _Part, _parts, projector_config
from moerge.operations.operations import Draw, Fit, Operation
from moerge.projectors.proj_in import ProjectorInFit
from moerge.projectors.proj_out import ProjectorOutFit
from moerge.projectors.token_weights import TokenWeights
from moerge.tensors.tensor import Tensor


@dataclass(frozen=True, eq=False)
class ExpertTables:
    """An expert's embedding [V, D] and head [V, D], mapped to the shared vocabulary.

    `embedding` is what the expert's embedding module puts out; `head` is such that head @ h (+ head_bias) are its logits.
    """

    name: str
    embedding: Tensor
    head: Tensor
    head_bias: Tensor | None = None


def projector_outputs(
    kind: Kind, experts: Sequence[ExpertTables], width: int, seed: int = 0
) -> list[tuple[ExpectedTensor, Operation]]:
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
